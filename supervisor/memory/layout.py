"""The memory that the master and its workers share.

One memfd, laid out by the master before it forks, mapped by every process: a header, the names of
the functions, a row of slots with each worker's books, the tables that tell which worker has what
state, and the ring of admission times. It has no name in any file system, so a killed master leaves
nothing behind, and a descriptor can be passed on to a master that takes over.

There are more slots than workers: while one generation of workers drains, the next one has taken
free slots. `slots_used` says how far the row has ever been used, so that nobody looks further.

This is the only file that knows where a part begins; everyone else says `slot.opened` or
`shared.header.verdict`. All fields are aligned signed 64-bit integers, which the machine stores and
loads whole, so a process that is killed leaves every field either as it was or as it should be.

Who writes what is said at each field. A field has one writer, so that no update is ever lost, or
is written only under the gate's lock. What is open now is told by counters that only grow:
`opened - closed` connections, `admitted - (succeeded + failed)` requests. Clearing a dead worker's
slot is then a few stores, and no total is lost with the worker.
"""

import ctypes
import mmap
import os
import time
from typing import NamedTuple

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import (
    connection_table,
    event_ring,
    function_stats,
    handoff_claims,
    histogram,
    owners,
    robustlock,
)
from cpanbridge.supervisor.memory.connection_table import ConnectionTable
from cpanbridge.supervisor.memory.event_ring import EventRing
from cpanbridge.supervisor.memory.function_stats import FunctionStats, Names
from cpanbridge.supervisor.memory.handoff_claims import Claims
from cpanbridge.supervisor.memory.histogram import Histogram
from cpanbridge.supervisor.memory.overload_state import KINDS, SCALE
from cpanbridge.supervisor.memory.owners import Owner, OwnerTable
from cpanbridge.supervisor.memory.rate_window import Window, entries_for
from cpanbridge.supervisor.memory.robustlock import SharedLock

# Goes up whenever a field moves: a master of other code must not read this memory wrongly.
LAYOUT = 12

GATE_OPEN = 0
GATE_CLOSED = 1

# What a thread at the gate waits for: nothing that rings (a time, or nothing at all), or whose
# giving back rings it.
WAITS_FOR_NOTHING = 0
WAITS_FOR_CONNECTION = 1
WAITS_FOR_REQUEST = 2
WAITS_FOR_LOAD = 3
WAITS_FOR_RATE = 4  # told for whoever looks; the time that it waits for is exact, and nobody rings

# What a worker was told to do, besides to serve (see Slot.order).
COMMAND_NONE = 0
COMMAND_RETIRE = 1  # the daemon goes on without it
COMMAND_STOP = 2  # the daemon ends

# Why a worker asks to be retired.
RETIREMENT_NONE = 0
RETIREMENT_HANGS = 1  # a call has not ended in its time
RETIREMENT_WORN = 2  # it has run max_requests

DEATHS_KEPT = 32  # of the times at which workers died; more in a few minutes are many in any case
MODULE_OWNERS = 1024  # modules whose state all clients share

_CACHE_LINE = 64


class Ring(ctypes.Structure):
    """Where a ring of admission times stands, and the limit that it serves."""

    _fields_ = (
        ("at", ctypes.c_int64),  # bytes from the memory's beginning
        ("limit", ctypes.c_int64),  # max_requests_per_minute; 0: none
        ("keeps", ctypes.c_int64),  # admissions that it remembers
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
        ("overload_state", ctypes.c_int64),  # VERDICT_OPEN or VERDICT_CLOSED
        ("closings", ctypes.c_int64),  # times that the verdict has closed
        ("changed_at", ctypes.c_int64),  # when it last opened or closed, CLOCK_MONOTONIC, ns
        ("deaths", ctypes.c_int64),  # workers that ended without being told to
        ("death_times", ctypes.c_int64 * DEATHS_KEPT),  # the last ones, CLOCK_MONOTONIC, ns
        ("generation", ctypes.c_int64),  # the one in service
        ("slots_used", ctypes.c_int64),  # only grows, and before a worker is forked into a slot
        ("retired", ctypes.c_int64),  # workers that were told to leave, to give memory back
        # What the monitor saw last.
        ("sampled_at", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: not yet
        ("sample_due", ctypes.c_int64),  # when it means to look again, the same
        ("checked_at", ctypes.c_int64),  # the last check after resource_check_interval, the same
        ("values", ctypes.c_int64 * KINDS),  # in thousandths of each kind's unit
        ("alerts", ctypes.c_int64 * KINDS),  # violations that have begun
        ("peak_memory", ctypes.c_int64),  # bytes
        ("peak_cpu", ctypes.c_int64),  # thousandths of a percent
        ("processes", ctypes.c_int64),  # in the tree
        ("processes_by_rss", ctypes.c_int64),  # of these, those whose PSS cannot be read
        ("backlog", ctypes.c_int64),  # clients in the listen queues
        # Written by the master under the gate's lock.
        ("max_connections", ctypes.c_int64),
        ("max_concurrent_requests", ctypes.c_int64),
        ("max_memory_mb", ctypes.c_int64),
        ("max_cpu", ctypes.c_int64),  # thousandths of a percent
        ("rings", Ring * 2),  # the one in use, and the one before it
        ("ring_number", ctypes.c_int64),  # how often it was replaced; its lowest bit says which
        # Written under the gate's lock.
        ("admissions", ctypes.c_int64),  # requests ever admitted
        ("runs", ctypes.c_int64),  # without a rate limit: see window.py
        ("functions", ctypes.c_int64),  # names in the table: see tally.py
        ("cleanups", ctypes.c_int64),  # times that stale connections were to be closed at once
        ("cleanup_at", ctypes.c_int64),  # the last time, CLOCK_MONOTONIC, nanoseconds
        ("peak_connections", ctypes.c_int64),
        # How often room can be taken, for whatever, before all slots must be counted: see gate.py.
        ("passes", ctypes.c_int64),
        ("somebody_waits", ctypes.c_int64),  # 1: a thread may wait at the gate, as its slot says
        # Written by each thread at a door, without a lock: the last one counts.
        ("last_door", ctypes.c_int64),  # the slot whose worker let the last client in
    )


class Slot(ctypes.Structure):
    """A worker's place. Totals go on counting when a replacement takes the slot over."""

    _fields_ = (
        # Written by the master.
        ("pid", ctypes.c_int64),  # 0: no process has the slot
        ("generation", ctypes.c_int64),
        ("command", ctypes.c_int64),  # ORDER_..., before the worker is sent a TERM
        ("exit_by", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: when all has finished
        ("since", ctypes.c_int64),  # when the process was forked, CLOCK_MONOTONIC, nanoseconds
        ("admitted_before", ctypes.c_int64),  # what `admitted` was then
        ("memory", ctypes.c_int64),  # bytes, with all that the worker has started
        # Changes when a worker has ended: what its state was is lost. See owners.py.
        ("incarnation", ctypes.c_int64),
        # Set by the worker's main thread; cleared by it too, and by the master when it hangs or is
        # dead.
        ("serves", ctypes.c_int64),  # 1: it may become the owner of new state
        # Written by the worker's main thread.
        ("shut", ctypes.c_int64),  # 1: it lets nobody in any more
        ("retirement_request", ctypes.c_int64),  # PLEA_...: why it asks to be retired
        # Written by the worker under its watch's lock: which of its calls is the first whose time
        # will be over. See hangs.py.
        ("call_deadline", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds; 0: it has none
        ("call_function", ctypes.c_int64),  # that call's: see tally.py
        # Written by the worker under the gate's lock.
        ("admitted", ctypes.c_int64),  # requests let through to run
        # 1: there is room for a client that the thread at the door may be accepting. Taken under
        # the gate's lock, given back without.
        ("reserved", ctypes.c_int64),
        # Written by the thread at the worker's door; there is one at a time.
        ("opened", ctypes.c_int64),  # connections accepted
        ("accept_waits_for", ctypes.c_int64),  # WAITS_FOR_...; under the gate's lock
        ("full", ctypes.c_int64),  # times that it found all connections taken
        ("taken_over", ctypes.c_int64),  # of those opened, connections that came from other workers
        ("awaits_receipts", ctypes.c_int64),  # 1: ring it when clients of it were taken over
        # 1: a client was let in, and it will look for the next one before it sleeps. Cleared by any
        # thread that finds that nobody is at the door.
        ("looks_again", ctypes.c_int64),
        # Written by the one thread of the worker that looks for a request's room.
        ("request_waits_for", ctypes.c_int64),  # WAITS_FOR_...; under the gate's lock
        # Written by the worker under its own release lock, and by the master once it is dead.
        ("closed", ctypes.c_int64),  # connections closed
        ("queued", ctypes.c_int64),  # threads that have a request and wait for its room
        ("sessions", ctypes.c_int64),  # client processes that have state here
        ("succeeded", ctypes.c_int64),  # requests that have run and returned a result
        ("failed", ctypes.c_int64),  # requests that have run and did not
        ("refused", ctypes.c_int64),  # requests answered with an error without running
        ("rejected", ctypes.c_int64),  # of their clients, those that were not even let in
        # Requests that were told Overloaded, by the reason.
        ("overloaded_verdict", ctypes.c_int64),
        ("overloaded_connections", ctypes.c_int64),
        ("overloaded_concurrency", ctypes.c_int64),
        ("overloaded_rate", ctypes.c_int64),
        # Security events, by their kind.
        ("invalid_request", ctypes.c_int64),
        ("module_not_allowed", ctypes.c_int64),
        ("function_not_allowed", ctypes.c_int64),
        ("permission_denied", ctypes.c_int64),
        ("busy_ns", ctypes.c_int64),  # time that finished requests took, all together
    )

    @property
    def is_staying(self) -> bool:
        """Whether its worker serves, and was not told to leave, which it may not know yet."""
        return bool(self.serves and self.command == COMMAND_NONE)

    @property
    def connections(self) -> int:
        """Connections open now. Never too low for a reader that holds the gate's lock."""
        closed: int = self.closed
        opened: int = self.opened
        return opened - closed

    @property
    def running(self) -> int:
        """Requests running now. Never too low for a reader that holds the gate's lock."""
        finished = self.finished
        admitted: int = self.admitted
        return admitted - finished

    @property
    def finished(self) -> int:
        """Requests that have run, well or not."""
        return int(self.succeeded + self.failed)


class Statistics(NamedTuple):
    """What a slot's worker writes down of its work, for reports. Not cleared when it dies."""

    histogram: Histogram  # how long requests took
    function_stats: FunctionStats  # of each function
    connection_table: ConnectionTable  # of its connections
    errors: EventRing  # the last failed requests: nanoseconds, the function's number, the error
    events: EventRing  # the last security events: the client's pid and uid, the event


class LayoutError(Exception):
    """The memory was laid out by other code; it cannot be read."""


def slot_capacity(workers: int) -> int:
    """How many slots a daemon of so many workers has: room for two generations and more."""
    return max(64, 3 * workers)


class Shared:
    """The mapped memory: made once by `create`, in the master; workers inherit it by fork."""

    def __init__(self, fd: int, capacity: int, max_sessions: int) -> None:
        """Map memory that is laid out for so many. See `create` and `attach`."""
        self.fd = fd
        # From here to the end stands the first ring; later ones are mapped when they are used.
        self._rings_at = _rings_at(capacity, max_sessions)
        self._memory = mmap.mmap(fd, self._rings_at)
        self.header = Header.from_buffer(self._memory)
        self.lock = SharedLock(_lock_of(self.header))  # the gate's
        self.slots = [Slot.from_buffer(self._memory, _slot_at(n)) for n in range(capacity)]
        view = memoryview(self._memory)
        self.names = Names(self.header, view[_NAMES_AT : _NAMES_AT + function_stats.NAMES_SIZE])
        self.statistics = [_statistics(view, _claims_at(n) + _CLAIMS_SIZE) for n in range(capacity)]
        self.claims = [
            Claims(view[_claims_at(n) : _claims_at(n) + handoff_claims.SIZE].cast("q"))
            for n in range(capacity)
        ]
        at = _owners_at(capacity)
        end = at + owners.size_for(MODULE_OWNERS)
        self.module_owners = OwnerTable(view[at:end], MODULE_OWNERS)
        at, end = end, end + owners.size_for(max_sessions)
        self.sessions = OwnerTable(view[at:end], max_sessions)
        self._ring_number = -1
        self._window: Window

    @classmethod
    def create(cls, capacity: int, limits: Limits, used: int | None = None) -> "Shared":
        """Lay out new memory. `used` is the slots that have a worker from the start: all."""
        fd = os.memfd_create("cpanbridged", os.MFD_CLOEXEC)
        os.ftruncate(fd, _rings_at(capacity, limits.max_sessions))
        shared = cls(fd, capacity, limits.max_sessions)
        header = shared.header
        SharedLock.create(_lock_of(header))
        header.layout = LAYOUT
        header.capacity = capacity
        header.max_sessions = limits.max_sessions
        header.slots_used = capacity if used is None else used
        header.started_at = time.time_ns()
        header.started_monotonic = time.monotonic_ns()
        shared._add_ring(limits.max_requests_per_minute, 0)
        shared.apply_limits(limits)
        return shared

    @classmethod
    def attach(cls, fd: int) -> "Shared":
        """Map memory that another process has laid out. Raises LayoutError."""
        if os.fstat(fd).st_size < ctypes.sizeof(Header):
            raise LayoutError("too small to be cpanbridged's")
        with mmap.mmap(fd, ctypes.sizeof(Header)) as memory:
            header = Header.from_buffer_copy(memory)
        if header.layout != LAYOUT:
            raise LayoutError(f"its layout is {header.layout}, and this version's is {LAYOUT}")
        return cls(fd, header.capacity, header.max_sessions)

    def record_death(self) -> None:
        """A worker has ended without being told to. Called in the master."""
        header = self.header
        header.death_times[header.deaths % DEATHS_KEPT] = time.monotonic_ns()
        header.deaths += 1

    def deaths_within(self, seconds: float) -> int:
        """Workers that died in the last so many seconds; at most `DEATHS_KEPT`."""
        since = time.monotonic_ns() - int(seconds * 1e9)
        kept = min(self.header.deaths, DEATHS_KEPT)
        return sum(at > since for at in self.header.death_times[:kept])

    def use_slot(self, number: int) -> None:
        """From now on a worker may be in this slot. Called in the master."""
        self.header.slots_used = max(self.header.slots_used, number + 1)

    @property
    def used_slots(self) -> list[Slot]:
        """The slots that a worker may have, or has had."""
        return self.slots[: self.header.slots_used]

    @property
    def uptime(self) -> float:
        """Seconds since the daemon started."""
        started: int = self.header.started_monotonic
        return (time.monotonic_ns() - started) / 1e9

    def connections(self) -> int:
        """Client connections open in all workers."""
        return sum(slot.connections for slot in self.used_slots)

    def running(self) -> int:
        """Requests running in all workers."""
        return sum(slot.running for slot in self.used_slots)

    def peak_connections(self) -> int:
        """The most connections that there were at a time; for reports.

        The gate counts now and then only. So what it has missed is noted here, as long as it is
        there. Does not wait for the gate's lock, without which it would not count rightly.
        """
        if self.lock.take():
            try:
                self.record_peak(self.connections())
            finally:
                self.lock.give_back()
        peak: int = self.header.peak_connections
        return peak

    def record_peak(self, connections: int) -> None:
        """There are so many now. Called under the gate's lock."""
        header = self.header
        if connections > header.peak_connections:
            # While a client changes hands it may be counted twice, see `Gate.took_over`.
            most = min(connections, header.max_connections)
            header.peak_connections = max(header.peak_connections, most)

    def admitted_in_window(self) -> int:
        """Requests admitted in the last 60 seconds."""
        return self.window.count()

    def owner(self, slot: int) -> Owner:
        """The worker that has the slot now, as an owner of state."""
        return Owner(slot, self.slots[slot].incarnation)

    def is_there(self, owner: Owner) -> bool:
        """Whether the worker still lives, as far as the master has seen."""
        return bool(self.slots[owner.slot].incarnation == owner.incarnation)

    def clear(self, slot: Slot) -> None:
        """Give back what a dead worker held. Called in the master, once the process is gone.

        Its sockets are closed by then and its threads have ended, so the master is the only
        writer; readers under the gate's lock see room appear, as with any other release.
        """
        # Before it is taken out of the count: who takes a client of it over has counted it first.
        self.claims[self.slots.index(slot)].cancel_all()
        slot.pid = 0
        slot.serves = 0
        slot.incarnation += 1
        slot.command = COMMAND_NONE
        slot.exit_by = 0
        slot.shut = 0
        slot.retirement_request = RETIREMENT_NONE
        slot.call_deadline = 0
        slot.reserved = 0
        slot.closed = slot.opened
        slot.failed = slot.admitted - slot.succeeded  # what was running is lost
        slot.accept_waits_for = WAITS_FOR_NOTHING
        slot.awaits_receipts = 0
        slot.looks_again = 0
        slot.request_waits_for = WAITS_FOR_NOTHING
        slot.queued = 0
        slot.sessions = 0
        slot.memory = 0
        self.statistics[self.slots.index(slot)].connection_table.clear()

    # -- the limits, which a reload may change for all generations at once --

    @property
    def window(self) -> Window:
        """The admissions of the last minute; another one after `resize_window`."""
        number: int = self.header.ring_number
        if number != self._ring_number:
            self._window = self._map_ring(self.header.rings[number % 2])
            self._ring_number = number
        return self._window

    def apply_limits(self, limits: Limits) -> None:
        """Let these limits hold. Called in the master under the gate's lock.

        Raises OSError when there is no memory for the rate's window; nothing has changed then.
        """
        self.resize_window(limits.max_requests_per_minute)
        header = self.header
        header.passes = 0  # they were for other limits
        header.max_connections = limits.max_connections
        header.max_concurrent_requests = limits.max_concurrent_requests
        header.max_memory_mb = limits.max_memory_mb
        header.max_cpu = round(limits.max_cpu_percent * SCALE)

    def resize_window(self, limit: int) -> None:
        """Let another rate limit hold, with what is known of the last minute.

        Called in the master under the gate's lock. A master that is killed here leaves the old
        limit in force: the new ring counts from the one store that makes it the current one.
        """
        old = self.window
        if limit != old.limit:
            self._add_ring(limit, self._ring_number + 1, old)

    def _add_ring(self, limit: int, number: int, old: Window | None = None) -> None:
        at = os.fstat(self.fd).st_size
        keeps = max(limit, old.count() if old is not None else 0)
        os.ftruncate(self.fd, at + _in_pages(8 * entries_for(limit, keeps)))
        ring = self.header.rings[number % 2]
        if ring.at:
            self._give_back(ring)
            ring.at = 0
        ring.limit, ring.keeps, ring.at = limit, keeps, at  # in this order: `at` makes it valid
        if old is not None:
            self._map_ring(ring).inherit(old)
        self.header.ring_number = number

    def _give_back(self, ring: Ring) -> None:
        """Free the memory of a ring that was replaced twice. The file keeps its size, with a hole.

        Who reads there yet, without the lock, finds times of long ago.
        """
        with mmap.mmap(self.fd, self._size_of(ring), offset=ring.at) as memory:
            memory.madvise(mmap.MADV_REMOVE)

    @staticmethod
    def _size_of(ring: Ring) -> int:
        return 8 * entries_for(ring.limit, ring.keeps)

    def _map_ring(self, ring: Ring) -> Window:
        memory = mmap.mmap(self.fd, self._size_of(ring), offset=ring.at)
        return Window(self.header, memoryview(memory).cast("q"), ring.limit, ring.keeps)


def _lock_of(header: Header) -> int:
    return ctypes.addressof(header) + Header.lock.offset


def _padded(size: int) -> int:
    """Round up to whole cache lines, so that workers do not write into each other's."""
    return -(-size // _CACHE_LINE) * _CACHE_LINE


def _in_pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


_NAMES_AT = _padded(ctypes.sizeof(Header))
_STATISTICS = (
    histogram.SIZE,
    function_stats.SIZE,
    connection_table.SIZE,
    event_ring.SIZE,
    event_ring.SIZE,
)
_CLAIMS_SIZE = _padded(handoff_claims.SIZE)
_SLOT_SIZE = _padded(ctypes.sizeof(Slot)) + _CLAIMS_SIZE + sum(map(_padded, _STATISTICS))


def _slot_at(number: int) -> int:
    return _NAMES_AT + _padded(function_stats.NAMES_SIZE) + number * _SLOT_SIZE


def _claims_at(number: int) -> int:
    return _slot_at(number) + _padded(ctypes.sizeof(Slot))


def _statistics(memory: memoryview, at: int) -> Statistics:
    parts = []
    for size in _STATISTICS:
        parts.append(memory[at : at + size])
        at += _padded(size)
    times, calls, connections, errors, events = parts
    return Statistics(
        Histogram(times.cast("q")),
        FunctionStats(calls.cast("q")),
        ConnectionTable(connections.cast("q")),
        EventRing(errors),
        EventRing(events),
    )


def _owners_at(capacity: int) -> int:
    return _slot_at(capacity)


def _rings_at(capacity: int, max_sessions: int) -> int:
    tables = owners.size_for(MODULE_OWNERS) + owners.size_for(max_sessions)
    return _in_pages(_owners_at(capacity) + tables)
