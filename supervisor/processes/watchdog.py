"""Workers that do not see to a call whose time is over, because nothing in them gets to run.

For a call that takes too long, its worker's main thread does what there is to do: it answers the
client, says in the log where the call hangs, and asks to be retired (workers/watch.py). It cannot
while the call never gives up the interpreter lock, as a regular expression that backtracks for
ever does not, or an extension's loop; nor while the process is stopped. So each worker says in its
slot when the next of its calls must have returned, and takes that away when it has, or was seen to.
What is still there a while after that time, the master sees to:

- It has the worker write to the log what its threads are at. faulthandler does that in the signal's
  handler, in C, without the interpreter lock.
- It retires the worker. A replacement takes over at once; the worker is killed when
  `graceful_timeout` is over. A call that returns before that is answered as usual.

The client cannot be told: its socket is the worker's, which alone knows what was said on it. Its
connection ends with the worker.

A worker that hangs with the gate's lock keeps all others out of it. So one that hangs is killed at
once when the lock does not come free.

The master looks when the time of some call is over, and twice a second, for there may be an earlier
one by then. Only what it has found overdue itself, a while ago, counts: after a suspension, or on a
machine that is overloaded, workers need a moment as well. Called in the master's loop.
"""

import logging
import os
import signal
import time

from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system.event_loop import Loop

LOGGER = logging.getLogger("cpanbridge.master")

LOOK_NS = 500_000_000
LEAST_NS = 50_000_000  # between two looks; workers look as often
OVERDUE_NS = 200_000_000
TRIES = 100


class Overdue:
    """A call whose time is over, and what the master has done about it."""

    def __init__(self, slot: int, deadline: int, now: int) -> None:
        self.slot = slot
        self.deadline = deadline
        self.found_at = now  # CLOCK_MONOTONIC nanoseconds, as all times here
        self.told = False
        self.gate_was_free = True  # at the last look


class Watchdog:
    """One daemon's. It begins with `start`, once the daemon is ready."""

    def __init__(self, loop: Loop, shared: Shared, pool: WorkerPool) -> None:
        self._loop = loop
        self._shared = shared
        self._pool = pool
        self._overdue: dict[int, Overdue] = {}  # by slot

    def start(self) -> None:
        """Look, now and from now on."""
        self._look()

    def _look(self) -> None:
        if any(slot.retirement_request for slot in self._shared.used_slots):
            self._pool.handle_retirement_requests()  # it may have been put to another master
        now = time.monotonic_ns()
        next_look = now + LOOK_NS
        known, self._overdue = self._overdue, {}
        for number, slot in enumerate(self._shared.used_slots):
            deadline = int(slot.call_deadline)
            if not deadline or not self._pool.workers[number].pid:
                continue
            if deadline > now:
                next_look = min(next_look, deadline)
                continue
            overdue = known.get(number)
            if overdue is None or overdue.deadline != deadline:
                overdue = Overdue(number, deadline, now)
            self._overdue[number] = overdue
            if now < overdue.found_at + OVERDUE_NS:
                next_look = min(next_look, overdue.found_at + OVERDUE_NS)
            else:
                self._see_to(overdue)
        self._loop.after(max(LEAST_NS, next_look - now) / 1e9, self._look)

    def _see_to(self, overdue: Overdue) -> None:
        worker, slot = self._pool.workers[overdue.slot], self._shared.slots[overdue.slot]
        was_free, overdue.gate_was_free = overdue.gate_was_free, self._gate_is_free()
        told, overdue.told = overdue.told, True
        if not told:
            LOGGER.error(
                "Worker %d (pid %d): the time of %s is over, and nothing in the worker gets to run "
                "that could see to it: a call holds the interpreter lock, or the process is "
                "stopped. What its threads are at follows",
                worker.number,
                worker.pid,
                self._shared.names.all()[slot.call_function],
            )
        elif not (was_free or overdue.gate_was_free):
            LOGGER.error(
                "Worker %d (pid %d) is killed: it hangs, and the gate's lock does not come free, "
                "which all others wait for",
                worker.number,
                worker.pid,
            )
            worker.kill()
        slot.serves = 0  # if it goes on after all, it is to leave, and does not set this again
        self._pool.retire_hung(overdue.slot)
        if not told:  # at last, for these lines are written in pieces
            worker.signal(signal.SIGUSR2)  # see workers/boot.py

    def _gate_is_free(self) -> bool:
        """Whether the gate's lock can be had. It is held for microseconds."""
        lock = self._shared.lock
        for _ in range(TRIES):
            if lock.take():
                lock.give_back()
                return True
            os.sched_yield()
        return False
