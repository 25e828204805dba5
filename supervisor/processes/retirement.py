"""Retiring workers that the daemon is better off without.

A retired worker accepts no client any more, finishes what it runs, and exits: no request is lost.
Its replacement boots meanwhile in another slot where there is room for both. Called in the master.
"""

import logging

from cpanbridge.supervisor.memory.fields import (
    COMMAND_RETIRE,
    RETIREMENT_HANGS,
    RETIREMENT_WORN,
)
from cpanbridge.supervisor.processes.slots import Slots
from cpanbridge.supervisor.processes.starter import Starter
from cpanbridge.supervisor.processes.worker_process import WorkerProcess

LOGGER = logging.getLogger("cpanbridge.master")


class Retirement:
    """Retires the workers of one master."""

    def __init__(self, slots: Slots, starter: Starter) -> None:
        self._slots = slots
        self._starter = starter

    def retire(self, slot: int, reason: str, *, replace_first: bool, hurry: bool = True) -> bool:
        """Have the worker in a slot exit: it finishes what it runs, within `graceful_timeout`.

        Without `hurry` it has `drain_timeout`, as after a reload: nothing is wrong with it. With
        `replace_first` its replacement boots in another slot before it is told to exit. Otherwise,
        and when no slot is free, its replacement starts when it has ended. False when there is no
        worker to retire: it boots, exits already, or is not in service.
        """
        worker = self._slots.workers[slot]
        generation = worker.generation
        if not worker.ready or worker.exiting or not self._starter.starts:
            return False
        if generation is None or not generation.in_service:
            return False
        LOGGER.warning("Worker %d (pid %d) is retired: %s", slot, worker.pid, reason)
        worker.exiting, worker.hurry = reason, hurry
        successor = self._slots.free() if replace_first else None
        if successor is None:
            worker.replace_in_place = True
            self._tell(worker)
        else:
            successor.replaces = worker
            self._starter.start(successor, generation)
        return True

    def retire_for_memory(self, slot: int, reason: str) -> bool:
        """As `retire`, but its replacement starts when it has ended: there is no memory for two.

        A worker that exits in its own time already has `graceful_timeout` from now on.
        """
        worker = self._slots.workers[slot]
        if not worker.exiting:
            return self.retire(slot, reason, replace_first=False)
        if worker.hurry or worker.generation is None or not self._starter.starts:
            return False
        worker.hurry = True
        if worker.told:
            seconds = worker.generation.settings.limits.graceful_timeout
            text = "Worker %d (pid %d) has %g s left to leave: %s"
            LOGGER.warning(text, slot, worker.pid, seconds, reason)
            self._tell(worker)
        return True

    def retire_hung(self, slot: int) -> None:
        """As `retire`, for a worker with a call that does not end; it may be exiting already.

        It must not drain for as long as it hangs, so it has `graceful_timeout` from now on. Without
        effect when it was told so before.
        """
        worker = self._slots.workers[slot]
        if not worker.exiting:
            self.retire(slot, "a call hangs", replace_first=True)
        elif worker.generation is not None and self._starter.starts:
            worker.hurry = True
            seconds = worker.generation.settings.limits.graceful_timeout
            if worker.told and not worker.exits_within(seconds):
                self._tell(worker)

    def handle_requests(self) -> None:
        """Retire the workers that ask for it, but for those that exit already."""
        for worker in self._slots.workers:
            if worker.retirement_request == RETIREMENT_HANGS:
                self.retire_hung(worker.number)
            elif worker.retirement_request == RETIREMENT_WORN:
                reason = "it has run max_requests"
                self.retire(worker.number, reason, replace_first=True, hurry=False)

    def drain(self, worker: WorkerProcess, reason: str) -> None:
        """Have a worker exit within `drain_timeout`, without a replacement."""
        worker.replace_in_place = False
        if not worker.ready:
            worker.abandon(reason)
        elif not worker.told:
            worker.exiting, worker.hurry = reason, False
            self._tell(worker)

    def tell_replaced(self, worker: WorkerProcess) -> None:
        """Tell the worker that this one replaces to exit, if it was not told before."""
        replaced, worker.replaces = worker.replaces, None
        if replaced is not None and not replaced.told:
            self._tell(replaced)

    def forget(self, worker: WorkerProcess) -> None:
        """A retired worker has ended: its replacement has no worker to replace any more."""
        for other in self._slots.workers:
            if other.replaces is worker:
                other.replaces = None

    def _tell(self, worker: WorkerProcess) -> None:
        assert worker.generation is not None
        limits = worker.generation.settings.limits
        seconds = limits.graceful_timeout if worker.hurry else limits.drain_timeout or None
        worker.tell_to_exit(COMMAND_RETIRE, seconds)
