"""The fields of the shared memory: the header, and one slot for each worker.

All fields are aligned signed 64-bit integers, which the machine stores and loads whole: a process
that is killed leaves each field either as it was or as it should be. Who writes a field is said
beside it. A field has one writer, or it is written only by who holds the gate's lock, or (for the
few that are said so) several write it without harm.

Order. A machine may show the stores of one process to another one in another order (aarch64 does).
So what must be seen in its order is

- read by who holds the gate's lock, of which each taking and releasing orders all before and after;
- or made known by a system call, which does the same: a fork, a signal, an eventfd, a message;
- or acted upon so much later that the order cannot matter, as is said beside it;
- or read by who can tell that it is not whole: names and events have checksums.

All else that is read without the lock is for reports, which may for an instant show one number
without the other.

A worker's counts only grow: what it has open is `opened - closed`, what it runs is
`admitted - (succeeded + failed)`. So a dead worker's slot is cleared by a few stores, and no total
is lost with the worker.
"""

import ctypes

from cpanbridge.supervisor.memory import robustlock
from cpanbridge.supervisor.memory.overload_state import KINDS

# Goes up whenever a field moves: a master of other code must not misread this memory.
LAYOUT = 16

GATE_OPEN = 0
GATE_CLOSED = 1

# What waits, and for what: a slot's leading thread for a connection's room, its requests for all
# the others. The gate's answer to a request is one of them, or that it is admitted.
ADMITTED = 0
WAITS_FOR_NOTHING = 0
WAITS_FOR_CONNECTION = 1
WAITS_FOR_REQUEST = 2
WAITS_FOR_LOAD = 3
WAITS_FOR_RATE = 4
WAITS_FOR_THREAD = 5  # all that its worker has (`threads`) are busy
WAITS_FOR_TURN = 6  # another one came first, and there is room

# What a worker was told to do, besides to serve (Slot.command).
COMMAND_NONE = 0
COMMAND_RETIRE = 1  # exit; the daemon goes on
COMMAND_STOP = 2  # exit; the daemon ends
COMMAND_RESTART = 3  # exit; the daemon ends, and another one goes on with its sockets

# Why a worker asks to be retired (Slot.retirement_request).
RETIREMENT_NONE = 0
RETIREMENT_HANGS = 1  # a call has not ended in its time
RETIREMENT_WORN = 2  # it has run max_requests

# Why a request was answered Overloaded, or waited: in the order of Slot.overloaded and Slot.waits.
REASONS = ("overload", "connections", "concurrency", "rate", "threads")
OVERLOAD, CONNECTIONS, CONCURRENCY, RATE, THREADS = REASONS
REASON_OF = {
    WAITS_FOR_LOAD: OVERLOAD,
    WAITS_FOR_CONNECTION: CONNECTIONS,
    WAITS_FOR_REQUEST: CONCURRENCY,
    WAITS_FOR_RATE: RATE,
    WAITS_FOR_THREAD: THREADS,
}
# Security events, in the order of Slot.security_events.
EVENT_KINDS = ("invalid_request", "module_not_allowed", "function_not_allowed", "permission_denied")

DEATHS_KEPT = 32  # times of deaths; more in a few minutes are many in any case


class Ring(ctypes.Structure):
    """What a ring of admission times is used for."""

    _fields_ = (
        ("limit", ctypes.c_int64),  # max_requests_per_minute; 0: none
        ("keeps", ctypes.c_int64),  # admissions that it remembers, or runs
    )


class Header(ctypes.Structure):
    """What there is one of in the daemon."""

    _fields_ = (
        # Written once.
        ("layout", ctypes.c_int64),  # LAYOUT
        ("lock", ctypes.c_char * robustlock.SIZE),  # the gate's: see robustlock.py
        ("capacity", ctypes.c_int64),  # slots
        ("max_sessions", ctypes.c_int64),  # rows of the table of sessions
        ("started_at", ctypes.c_int64),  # CLOCK_REALTIME, nanoseconds
        ("started_monotonic", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds
        # Written by the master.
        ("overload_state", ctypes.c_int64),  # GATE_OPEN or GATE_CLOSED
        ("closings", ctypes.c_int64),  # times that the gate was closed
        ("changed_at", ctypes.c_int64),  # when it last opened or closed, CLOCK_MONOTONIC, ns
        ("deaths", ctypes.c_int64),  # workers that ended without being told to
        ("death_times", ctypes.c_int64 * DEATHS_KEPT),  # the last ones, CLOCK_MONOTONIC, ns
        ("generation", ctypes.c_int64),  # the one in service
        # 1: another master has the listening sockets as well, and serves them when this one ends.
        ("sockets_are_passed_on", ctypes.c_int64),
        ("slots_used", ctypes.c_int64),  # only grows, and before a worker is forked into a slot
        ("retired", ctypes.c_int64),  # workers that were retired to give memory back
        ("listener_changes", ctypes.c_int64),  # see listener_box.py
        # What the monitor measured last.
        ("sampled_at", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: not yet
        ("sample_due", ctypes.c_int64),  # when the next sample is due, the same
        ("checked_at", ctypes.c_int64),  # the last check after resource_check_interval, the same
        ("values", ctypes.c_int64 * KINDS),  # in thousandths of each kind's unit
        ("alerts", ctypes.c_int64 * KINDS),  # violations that have begun
        ("peak_memory", ctypes.c_int64),  # bytes
        ("peak_cpu", ctypes.c_int64),  # thousandths of a percent
        ("processes", ctypes.c_int64),  # in the tree
        ("processes_by_rss", ctypes.c_int64),  # of these, those whose PSS cannot be read
        ("backlog", ctypes.c_int64),  # clients in the listen queues
        # Nine tenths of what a cgroup may use, in bytes; 0: no cgroup limits memory.
        ("tightest_cgroup", ctypes.c_int64),  # of the one with the lowest limit
        ("fullest_cgroup", ctypes.c_int64),  # of the one that is nearest to its limit
        # Written by the master, the rings' number under the gate's lock.
        ("max_connections", ctypes.c_int64),
        ("max_concurrent_requests", ctypes.c_int64),
        ("max_memory_mb", ctypes.c_int64),
        ("max_cpu", ctypes.c_int64),  # thousandths of a percent
        ("rings", Ring * 2),  # the one in use, and the next one
        ("ring_number", ctypes.c_int64),  # how often it was replaced; its lowest bit says which
        # The gate's counters, written under its lock: see Counters in layout.py.
        ("connections", ctypes.c_int64),  # open, or about to be accepted
        ("running", ctypes.c_int64),  # requests
        ("admissions", ctypes.c_int64),  # requests ever admitted
        ("waiting", ctypes.c_int64),  # requests, and threads that accept: see Slot.waiting
        ("peak_connections", ctypes.c_int64),
        # 1: a worker has died, and the counters above may still count what it held. Set by the
        # master, cleared by who counts anew under the gate's lock.
        ("recount", ctypes.c_int64),
        # Set by any worker, without a lock, and never cleared: `system.shutdown` was called.
        ("stop_requested", ctypes.c_int64),
        # Written by leading threads, without a lock: the last store counts.
        (
            "awake_acceptor",
            ctypes.c_int64,
        ),  # 1 + the slot of a worker: see listen_queue.py; 0: none
        # Written under the gate's lock.
        ("tickets", ctypes.c_int64),  # that requests were given which wait: see gate.py
        ("runs", ctypes.c_int64),  # without a rate limit: see rate_window.py
        ("functions", ctypes.c_int64),  # names in the table: see function_stats.py
        ("cleanups", ctypes.c_int64),  # times that stale connections were to be closed at once
        ("cleanup_at", ctypes.c_int64),  # the last time, CLOCK_MONOTONIC, nanoseconds
    )


class Slot(ctypes.Structure):
    """One worker's part. Totals go on counting when a replacement takes the slot."""

    _fields_ = (
        # Written by the master.
        ("pid", ctypes.c_int64),  # 0: no process has the slot
        ("started", ctypes.c_int64),  # that process: see start_time.py; 0: not known
        ("generation", ctypes.c_int64),
        ("command", ctypes.c_int64),  # COMMAND_..., before the worker is sent a TERM
        ("exit_by", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: when all has finished
        ("since", ctypes.c_int64),  # when the process was forked, CLOCK_MONOTONIC, nanoseconds
        ("admitted_before", ctypes.c_int64),  # what `admitted` was then
        ("memory", ctypes.c_int64),  # bytes, with all that the worker has started
        # Changes when a worker has ended: its state is lost. See owners.py.
        ("incarnation", ctypes.c_int64),
        # Set by the worker's main thread; cleared by it too, and by the master when it hangs or is
        # dead.
        ("serves", ctypes.c_int64),  # 1: it may become the owner of new state
        # Written by the worker when it boots.
        ("threads", ctypes.c_int64),  # requests that it may run at a time; 0: any number
        # Written by the worker's main thread.
        ("shut", ctypes.c_int64),  # 1: it accepts no client any more
        ("retirement_request", ctypes.c_int64),  # RETIREMENT_...: why it asks to be retired
        # Written by the worker under the lock of its call timeouts: which of its calls is the first
        # whose time will be over. See processes/watchdog.py.
        # The master reads the function at the earliest 0.2 s after it has found the deadline.
        ("call_deadline", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: it has none
        ("call_function", ctypes.c_int64),  # that call's: see function_stats.py
        # Written by the worker under the gate's lock; by the master, without it, once that is dead.
        ("opened", ctypes.c_int64),  # connections that it has taken room for
        ("closed", ctypes.c_int64),  # connections whose room it has given back
        ("taken_over", ctypes.c_int64),  # of those opened, clients of other workers
        ("admitted", ctypes.c_int64),  # requests that it was let run
        ("succeeded", ctypes.c_int64),  # requests that have run and returned a result
        ("failed", ctypes.c_int64),  # requests that have run and did not
        ("accept_waits_for", ctypes.c_int64),  # WAITS_FOR_...: the thread that accepts
        ("request_waits_for", ctypes.c_int64),  # the requests that wait
        ("queued", ctypes.c_int64),  # how many these are
        ("first_ticket", ctypes.c_int64),  # the oldest one's; 0: none waits
        # Written under the gate's lock by any worker that let it have the turn: when that was, if
        # it has not taken it (CLOCK_MONOTONIC, nanoseconds); 0: it has.
        ("passed_over_at", ctypes.c_int64),
        # Written by the thread that accepts; there is one at a time.
        ("accepted", ctypes.c_int64),  # clients from the listen queue
        ("full", ctypes.c_int64),  # times that it found all connections taken
        # Written by the worker under the lock of its sessions.
        ("sessions", ctypes.c_int64),  # client processes that have state here
        # Written by the worker under the lock of its statistics.
        ("refused", ctypes.c_int64),  # requests answered with an error without running
        ("rejected", ctypes.c_int64),  # of their clients, those that were not accepted either
        ("pings", ctypes.c_int64),  # test.ping, which is no request
        ("overloaded", ctypes.c_int64 * len(REASONS)),  # requests answered so, by the reason
        ("waits", ctypes.c_int64 * len(REASONS)),  # requests that have waited, by the reason
        ("waited_ns", ctypes.c_int64 * len(REASONS)),  # for how long, all together
        ("security_events", ctypes.c_int64 * len(EVENT_KINDS)),  # by their kind
        ("busy_ns", ctypes.c_int64),  # time that finished requests took, all together
    )

    @property
    def is_staying(self) -> bool:
        """Whether its worker serves and has not been told to exit, which it may not know yet."""
        return bool(self.serves and self.command == COMMAND_NONE)

    @property
    def connections(self) -> int:
        """Connections that have room now. Without the lock it may for an instant be another."""
        closed: int = self.closed
        opened: int = self.opened
        return opened - closed

    @property
    def running(self) -> int:
        """Requests running now. Without the lock it may for an instant be another."""
        finished = self.finished
        admitted: int = self.admitted
        return admitted - finished

    @property
    def finished(self) -> int:
        """Requests that have run, well or not."""
        return int(self.succeeded + self.failed)

    @property
    def waiting(self) -> int:
        """What is registered as waiting: its requests, and the thread that accepts."""
        return bool(self.accept_waits_for) + int(self.queued)
