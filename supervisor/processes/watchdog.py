"""Workers in which a call has run past its time and no Python code can handle that.

As a rule the worker's own main thread handles a call that takes too long: it answers the client,
logs where the call hangs, and asks to be retired (workers/requests/timeouts.py). It cannot while
the call never gives up the interpreter lock, as a regular expression that backtracks for ever, or
an extension's loop; nor while the process is stopped. So each worker publishes in its slot when the
next of its calls must have returned, and removes that when the call has, or was handled. The master
handles what is still there a while after that time:

- It has the worker write to the log what its threads are at. faulthandler does that in the signal's
  handler, in C, without the interpreter lock.
- It retires the worker. A replacement takes over at once; the worker is killed when
  `graceful_timeout` is over. A call that returns before that is answered as usual.

The client gets no answer from the master: its socket is the worker's, and only the worker knows
what was sent on it. Its connection ends with the worker.

A worker that hangs while it holds the gate's lock keeps all others from admitting, whether or not
it runs a call whose time is over. So the worker that holds the lock is killed when the lock does
not come free. Which one that is stands in the lock.

The master checks when the time of some call is over, and twice a second, for there may be an
earlier one by then. Only what it has found overdue itself, a while ago, counts: after a suspension,
or on an overloaded machine, workers need a moment as well. Called in the master's loop.
"""

import logging
import os
import signal
import time
from dataclasses import dataclass

from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.retirement import Retirement

LOGGER = logging.getLogger("cpanbridge.master")

CHECK_NS = 500_000_000
LEAST_NS = 50_000_000  # between two checks; workers check as often
OVERDUE_NS = 200_000_000
TRIES = 100
# The gate's lock is held for microseconds. So many checks in a row, and for so long, it was found
# with one thread, which may have had to wait for a processor.
LOCK_CHECKS = 4
LOCK_NS = 1_000_000_000


@dataclass
class Overdue:
    """A call whose time is over, and what the master has done about it."""

    deadline: int
    found_at: int  # CLOCK_MONOTONIC nanoseconds, as all times here
    handled: bool = False


class Watchdog:
    """One daemon's. It begins with the first `check`, once the daemon is ready."""

    def __init__(self, pool: WorkerPool, retirement: Retirement) -> None:
        self._pool = pool
        self._retirement = retirement
        self._shared = pool.spawner.shared
        self._overdue: dict[int, Overdue] = {}  # by slot
        self._lock_watch = LockWatch(pool)

    def check(self) -> None:
        """Check, now and from now on."""
        self._retirement.handle_requests()  # some may have been made to another master
        now = time.monotonic_ns()
        self._lock_watch.check(now)
        next_check = now + CHECK_NS
        known, self._overdue = self._overdue, {}
        for number, slot in enumerate(self._shared.used_slots):
            deadline = int(slot.call_deadline)
            if not deadline or not self._pool.workers[number].pid:
                continue
            if deadline > now:
                next_check = min(next_check, deadline)
                continue
            overdue = known.get(number)
            if overdue is None or overdue.deadline != deadline:
                overdue = Overdue(deadline, now)
            self._overdue[number] = overdue
            if now < overdue.found_at + OVERDUE_NS:
                next_check = min(next_check, overdue.found_at + OVERDUE_NS)
            else:
                self._handle(number, overdue)
        self._pool.spawner.loop.after(max(LEAST_NS, next_check - now) / 1e9, self.check)

    def _handle(self, number: int, overdue: Overdue) -> None:
        worker = self._pool.workers[number]
        handled, overdue.handled = overdue.handled, True
        if not handled:
            LOGGER.error(
                "Worker %d (pid %d): the time of %s is over, and nothing in the worker gets to run "
                "that could see to it: a call holds the interpreter lock, or the process is "
                "stopped. What its threads are at follows",
                number,
                worker.pid,
                self._shared.names.of(worker.slot.call_function),
            )
        worker.slot.serves = 0  # if it runs again after all, it exits, and does not set this again
        # It would drain for as long as it hangs.
        self._retirement.retire_soon(number, "a call hangs", replace_first=True)
        if not handled:  # last, because the worker writes these lines in pieces
            worker.signal(signal.SIGUSR2)  # see workers/boot.py


class LockWatch:
    """Finds who hangs with the gate's lock, and ends that worker. One daemon's."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._lock = pool.spawner.shared.lock
        self._holder = 0  # a thread; 0: the lock was free at the last check
        self._since = 0  # CLOCK_MONOTONIC nanoseconds
        self._checks = 0  # that found it with that thread

    def check(self, now: int) -> None:
        """Check once; `now` is CLOCK_MONOTONIC nanoseconds."""
        holder = self._find_holder()
        if holder != self._holder:
            self._holder, self._since, self._checks = holder, now, 0
        self._checks += 1
        if holder and self._checks >= LOCK_CHECKS and now >= self._since + LOCK_NS:
            self._end(holder)
            self._holder = 0

    def _find_holder(self) -> int:
        for _ in range(TRIES):
            if self._lock.acquire(block=False):
                self._lock.release()
                return 0
            os.sched_yield()
        return self._lock.holder()

    def _end(self, holder: int) -> None:
        for worker in self._pool.workers:
            if worker.pid and os.path.exists(f"/proc/{worker.pid}/task/{holder}"):
                LOGGER.error(
                    "Worker %d (pid %d) is killed: it hangs, and the gate's lock does not come "
                    "free, which all others wait for",
                    worker.number,
                    worker.pid,
                )
                worker.kill()
                return
        LOGGER.error("Thread %d has the gate's lock and is no worker's of this master", holder)
