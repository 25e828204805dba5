"""Retiring workers that the daemon is better off without, and what else workers ask for.

A retired worker accepts no client any more, finishes what it runs, and exits: no request is lost.
Its replacement boots meanwhile in another slot where there is room for both. Called in the master.
"""

import logging
import os
import time
from collections.abc import Callable

from cpanbridge.supervisor.memory.fields import RETIREMENT_HANGS, RETIREMENT_WORN
from cpanbridge.supervisor.processes.pool import WorkerPool

LOGGER = logging.getLogger("cpanbridge.master")


class Retirement:
    """Retires the workers of one master, when it sees fit or when they ask for it.

    `stop` is called when a client has had a worker ask for the daemon's end.
    """

    def __init__(self, pool: WorkerPool, stop: Callable[[], None]) -> None:
        self._pool = pool
        self._stop = stop
        pool.spawner.loop.watch(pool.spawner.wakeup, self._requested)

    def retire(self, slot: int, reason: str, *, replace_first: bool, hurry: bool = True) -> bool:
        """Have the worker in a slot exit: it finishes what it runs, within `graceful_timeout`.

        Without `hurry` it has `drain_timeout`, as after a reload: nothing is wrong with it. With
        `replace_first` its replacement boots in another slot before it is told to exit. Otherwise,
        and when no slot is free, its replacement starts when it has ended. False when there is no
        worker to retire: it boots, exits already, or is not in service.
        """
        worker = self._pool.workers[slot]
        generation = worker.generation
        if not worker.ready or worker.exiting or not self._pool.starts:
            return False
        if generation is None or not generation.in_service:
            return False
        LOGGER.warning("Worker %d (pid %d) is retired: %s", slot, worker.pid, reason)
        worker.exiting, worker.hurry = reason, hurry
        worker.replacement = (self._pool.free_slot() if replace_first else None) or worker
        if worker.replacement is worker:
            worker.tell_to_retire()
        else:
            self._pool.start(worker.replacement, generation)
        return True

    def retire_soon(self, slot: int, reason: str, *, replace_first: bool) -> bool:
        """As `retire`, but a worker that exits already has `graceful_timeout` from now on.

        False when it has no more time than that anyway.
        """
        worker = self._pool.workers[slot]
        if not worker.exiting:
            return self.retire(slot, reason, replace_first=replace_first)
        if worker.generation is None or not self._pool.starts:
            return False
        seconds = worker.generation.settings.limits.graceful_timeout
        latest = time.monotonic_ns() + int(seconds * 1e9)
        if 0 < worker.slot.exit_by <= latest if worker.told else worker.hurry:
            return False
        worker.hurry = True
        if worker.told:
            text = "Worker %d (pid %d) has %g s left to leave: %s"
            LOGGER.warning(text, slot, worker.pid, seconds, reason)
            worker.tell_to_retire()
        return True

    def handle_requests(self) -> None:
        """Retire the workers that ask for it, but for those that exit already; or stop.

        A master that stands still does not stop: the next one finds the same request.
        """
        if self._pool.spawner.shared.header.stop_requested and self._pool.starts:
            self._stop()
        for number, slot in enumerate(self._pool.spawner.shared.used_slots):
            if slot.retirement_request == RETIREMENT_HANGS:
                self.retire_soon(number, "a call hangs", replace_first=True)
            elif slot.retirement_request == RETIREMENT_WORN:
                reason = "it has run max_requests"
                self.retire(number, reason, replace_first=True, hurry=False)

    def _requested(self) -> None:
        os.eventfd_read(self._pool.spawner.wakeup)
        self.handle_requests()
