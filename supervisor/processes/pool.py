"""Which workers there are: as many as there should be, and a successor for each that goes.

A worker that dies is replaced at once. One that dies before it is ready is replaced after a pause
that grows each time, and one that dies within a second of being ready after half a second: a broken
module is never a hot loop. That holds for a generation in service; one that is not there yet fails
as a whole when a worker of it cannot boot.

A worker is retired when the daemon is better off without it. It lets nobody in any more, finishes
what runs, and leaves; what it was doing harms nobody. Called in the master.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Protocol

from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.layout import (
    COMMAND_RETIRE,
    COMMAND_STOP,
    RETIREMENT_HANGS,
    RETIREMENT_WORN,
    Shared,
)
from cpanbridge.supervisor.processes.context import Mains, Report
from cpanbridge.supervisor.processes.generation import Generation, Spawner, Stage
from cpanbridge.supervisor.processes.templates import Template, Templates
from cpanbridge.supervisor.processes.worker_process import WorkerProcess
from cpanbridge.supervisor.system.event_loop import Loop

LOGGER = logging.getLogger("cpanbridge.master")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 1.0  # one that was ready for so long did not die of its start
PAUSE_AFTER_READY = 0.5  # for one that was not


class Owner(Protocol):
    """Who is told how the workers fare; called in the loop."""

    def generation_ready(self, generation: Generation) -> None:
        """All workers of a generation that is not in service have booted."""

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker of a generation that is not in service cannot boot."""

    def worker_gone(self) -> None:
        """A worker has ended, and nothing of it is left."""


class WorkerPool:
    """All workers of a master."""

    def __init__(
        self,
        owner: Owner,
        loop: Loop,
        shared: Shared,
        wakeups: Sequence[Wakeups],
        mains: Mains,
    ) -> None:
        self._owner = owner
        self._shared = shared
        self._spawner = spawner = Spawner(loop, shared, wakeups, mains)
        self._loop = loop
        self.workers = [WorkerProcess(spawner, number) for number in range(len(shared.slots))]
        self.templates = Templates(spawner, self.spawn, owner.generation_failed)
        # Children that have ended while it was not known yet what they were: pid, wait status.
        self._early: dict[int, int] = {}
        self._stopping = False
        self._inherited: Generation | None = None  # of another master
        loop.watch(spawner.retirement_request, self._rung)
        self.standing_still = False  # another master is about to take over: nobody is forked
        self.confined = False  # to the seats it has: another master uses the others

    def is_gone(self) -> bool:
        """Whether there is no worker at all, and no template."""
        return not self.templates.alive and not any(worker.pid for worker in self.workers)

    # -- generations --

    def spawn(self, generation: Generation) -> None:
        """Fork the workers that a generation lacks, as far as there are free seats for them.

        Its template comes first, and calls this again.
        """
        if self._stopping or self.templates.must_be_awaited(generation):
            return
        for _ in range(generation.wanted - len(self._staff(generation))):
            worker = self._free_slot()
            if worker is None or self._stopping or generation.stage is Stage.OVER:
                return
            self._fork(worker, generation)

    @property
    def life(self) -> list[int]:
        """The write ends of all lifelines, for a master that takes over."""
        return [self._spawner.life, *self._spawner.inherited_life]

    @property
    def occupied(self) -> list[int]:
        """The slots that are in use, or will be again."""
        return [worker.number for worker in self.workers if worker.generation is not None]

    def will_inherit(
        self, generation: Generation, slots: Sequence[int], life: Sequence[int]
    ) -> None:
        """Another master's workers are in these slots: leave them to it, until `adopt`."""
        self._inherited = generation
        self._spawner.inherited_life = list(life)
        for slot in slots:
            self.workers[slot].generation = generation

    def inherit(self, generation: Generation) -> None:
        """The other master is leaving: its workers are ours."""
        for worker in self._of(generation):
            if not worker.inherit(self._inherited_ended):
                worker.free()

    def end_orphans(self, last: Generation) -> None:
        """End the workers of a dead master that was to follow this one.

        They have never been in service. Nobody takes their slots until they have ended. `last` is
        the generation before theirs.
        """
        workers = [
            s for s in self.workers if s.generation is None and self._shared.slots[s.number].pid
        ]
        if workers:
            orphans = Generation(last.number + 1, last.settings, (), last.log)
            for worker in workers:
                worker.generation = orphans
            self.inherit(orphans)
            self.end_input(orphans)

    def _inherited_ended(self, worker: WorkerProcess) -> None:
        LOGGER.info("Worker %d (pid %d) has left", worker.number, worker.pid)
        worker.vacate()
        self._after_exit(worker)
        self._owner.worker_gone()

    def put_in_service(self, generation: Generation) -> None:
        """From now on its workers accept, and those that die are replaced."""
        self._shared.header.generation = generation.number
        generation.put_in_service()

    def end_input(self, generation: Generation) -> None:
        """End a generation that has never been in service."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for worker in self._of(generation):
            self._give_up(worker, "its generation is given up")
        self._close_if_empty(generation)

    def retire_generation(self, generation: Generation) -> None:
        """Another one has taken over: its workers finish what they run, within `drain_timeout`."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for worker in self._of(generation):
            worker.refill_after = False
            if not worker.ready:
                self._give_up(worker, "its generation is retired")
            elif not worker.told:
                worker.exiting, worker.hurry = "its generation is retired", False
                self._tell_to_retire(worker)
        self._close_if_empty(generation)

    def accepts(self, generation: Generation) -> bool:
        """Whether a worker of a retired generation may still accept a client."""
        return any(worker.accepts for worker in self._of(generation))

    def _give_up(self, worker: WorkerProcess, reason: str) -> None:
        """End a worker that has never accepted, or its next start."""
        if worker.pid:
            worker.exiting = reason
            worker.kill()
        else:
            worker.free()

    def _close_if_empty(self, generation: Generation) -> None:
        if any(self._of(generation)):
            return
        generation.close()
        if (
            generation is self._inherited
        ):  # nobody is left whom the lifeline of another master tells
            self._inherited = None
            while self._spawner.inherited_life:
                os.close(self._spawner.inherited_life.pop())

    def stop(self, seconds: float | None) -> None:
        """End all workers: in so many seconds, or None: at once. Nobody is replaced any more."""
        self._stopping = True
        self.templates.end_all()
        for worker in self.workers:
            worker.cancel_start()
            if worker.pid and seconds is None:
                worker.kill()
            elif worker.pid and seconds is not None:
                worker.tell_to_exit(COMMAND_STOP, seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker and template."""
        self.templates.signal(number)
        for worker in self.workers:
            worker.signal(number)

    # -- retiring --

    def retire(self, slot: int, reason: str, *, replace_first: bool, hurry: bool = True) -> bool:
        """Have the worker in a slot leave: it finishes what runs, within `graceful_timeout`.

        Without `hurry` it has `drain_timeout`, as after a reload: nothing is wrong with it.
        With `replace_first` its replacement takes another slot and boots meanwhile, and only then
        it is told. Otherwise, and when no slot is free, its replacement follows when it has gone.
        False when there is nobody to retire: it boots, leaves already, or is not in service.
        """
        worker = self.workers[slot]
        generation = worker.generation
        if not worker.ready or worker.exiting or self._stopping or self.standing_still:
            return False
        if generation is None or not generation.in_service:
            return False
        LOGGER.warning("Worker %d (pid %d) is retired: %s", slot, worker.pid, reason)
        worker.exiting, worker.hurry = reason, hurry
        successor = self._free_slot() if replace_first else None
        if successor is None:
            worker.refill_after = True
            self._tell_to_retire(worker)
        else:
            successor.replaces = worker
            self._fork(successor, generation)
        return True

    def retire_for_memory(self, slot: int, reason: str) -> bool:
        """As `retire`, with no replacement before it has gone, for there is no room for two.

        One that leaves in its own time, after a reload, is given `graceful_timeout` from now.
        """
        worker = self.workers[slot]
        if not worker.exiting:
            return self.retire(slot, reason, replace_first=False)
        if worker.hurry or self._stopping or worker.generation is None:
            return False
        worker.hurry = True
        if worker.told:
            seconds = worker.generation.settings.limits.graceful_timeout
            LOGGER.warning(
                "Worker %d (pid %d) has %g s left to leave: %s",
                slot,
                worker.pid,
                seconds,
                reason,
            )
            self._tell_to_retire(worker)
        return True

    def add(self, generation: Generation) -> bool:
        """One worker more; False when there is no room for it beside another generation."""
        if self._stopping or self.confined or generation.wanted >= len(self.workers) // 2:
            return False
        if self._free_slot() is None:
            return False  # those that leave take their time, and nobody would hire it after them
        generation.wanted += 1
        self.spawn(generation)
        return True

    def remove(self, generation: Generation) -> bool:
        """One worker fewer: it finishes what it runs. False for the last one."""
        staff = [worker for worker in self._of(generation) if not worker.exiting]
        if self._stopping or self.confined or generation.wanted == 1 or not staff:
            return False
        generation.wanted -= 1
        worker = staff[-1]
        replaced, worker.replaces = worker.replaces, None
        if replaced is not None and not replaced.told:
            self._tell_to_retire(replaced)  # whose replacement is not needed any more
        if worker.ready:
            worker.exiting = "one worker fewer"
            worker.tell_to_exit(COMMAND_RETIRE, generation.settings.limits.drain_timeout or None)
        else:
            self._give_up(worker, "one worker fewer")
        return True

    def _rung(self) -> None:
        os.eventfd_read(self._spawner.retirement_request)
        self.handle_retirement_requests()

    def handle_retirement_requests(self) -> None:
        """Retire the workers that ask for it; those that are told already are not told again."""
        for worker in self.workers:
            if worker.retirement_request == RETIREMENT_HANGS:
                self.retire_hung(worker.number)
            elif worker.retirement_request == RETIREMENT_WORN:
                self.retire(
                    worker.number, "it has run max_requests", replace_first=True, hurry=False
                )

    def retire_hung(self, slot: int) -> None:
        """As `retire`, for a worker with a call that does not end, which may be leaving already.

        It must not take as long to drain as it hangs: it has `graceful_timeout` from now. Without
        effect when it was told so before.
        """
        worker = self.workers[slot]
        if not worker.exiting:
            self.retire(slot, "a call hangs", replace_first=True)
        elif worker.generation is not None and not self._stopping and not self.standing_still:
            worker.hurry = True
            seconds = worker.generation.settings.limits.graceful_timeout
            if worker.told and not worker.exits_within(seconds):
                self._tell_to_retire(worker)

    def _tell_to_retire(self, worker: WorkerProcess) -> None:
        assert worker.generation is not None
        limits = worker.generation.settings.limits
        seconds = limits.graceful_timeout if worker.hurry else limits.drain_timeout or None
        worker.tell_to_exit(COMMAND_RETIRE, seconds)

    # -- a worker's life --

    def _fork(self, worker: WorkerProcess, generation: Generation) -> None:
        worker.refill = None
        if self.standing_still:
            self._refill_in(worker, generation, FIRST_PAUSE)
            return
        template = self.templates.of(generation)
        if template is not None and template.forks and self._have_forked(worker, template):
            return
        try:
            worker.fork(generation, self._reported)
        except OSError as error:
            LOGGER.error("Worker %d: cannot fork: %s", worker.number, error.strerror)
            worker.generation = generation
            if generation.in_service:
                self._refill_later(worker)
            else:
                reason = f"cannot fork a worker: {error.strerror}"
                self._owner.generation_failed(generation, reason)

    def _have_forked(self, worker: WorkerProcess, template: Template) -> bool:
        """Have a template fork a worker; whether it could be told."""
        try:
            worker.have_forked(template.generation, template.command, self._born)
        except OSError as error:
            LOGGER.warning("Worker %d is not forked by its template: %s", worker.number, error)
            return False
        return True

    def _born(self, worker: WorkerProcess, pid: int) -> None:
        """A template has forked a worker, or 0: it has not, and is of no use then."""
        generation = worker.generation
        assert generation is not None
        if self.standing_still or not pid:
            worker.cancel_start()
            template = self.templates.of(generation)
            if template is not None and not self.standing_still:
                LOGGER.error("Worker %d was not forked by its template", worker.number)
                template.end()
            self._fork(worker, generation)
        else:
            worker.let_begin(pid, self._reported)
        status = self._early.pop(pid, None)
        if not any(each.unborn for each in self.workers):
            self._early.clear()
        if status is not None and worker.pid == pid:
            self._ended(worker, status)

    def _reported(self, worker: WorkerProcess, report: Report) -> None:
        if report.error is not None:
            self._cannot_boot(worker, report.error)
            return
        worker.failures = 0
        LOGGER.info("Worker %d ready (pid %d)", worker.number, worker.pid)
        replaced, worker.replaces = worker.replaces, None
        if replaced is not None and not replaced.told:
            self._tell_to_retire(replaced)
        generation = worker.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            staff = self._staff(generation)
            if len(staff) >= generation.wanted and all(each.ready for each in staff):
                self._owner.generation_ready(generation)

    def _cannot_boot(self, worker: WorkerProcess, error: str) -> None:
        LOGGER.error("Worker %d cannot start: %s", worker.number, error)
        generation = worker.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            self._owner.generation_failed(generation, error)

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was neither worker nor template."""
        if self.templates.ended(pid, status):
            return
        for worker in self.workers:
            if worker.pid == pid:
                self._ended(worker, status)
                return
        if any(worker.unborn for worker in self.workers):
            self._early[pid] = status

    def _ended(self, worker: WorkerProcess, status: int) -> None:
        how = worker.describe_end(status)
        report = worker.take_report()  # what it said last may not have been read yet
        pid, ready_at, exiting = worker.pid, worker.ready_at, worker.exiting
        worker.vacate()  # first of all: its pid may be another process's from now on
        if not self._stopping:
            if report is not None and report.error is not None:
                self._cannot_boot(worker, report.error)
            if exiting:
                LOGGER.info("Worker %d (pid %d) has left: %s", worker.number, pid, how)
                self._after_exit(worker)
            elif worker.generation is not None:
                self._after_death(worker, worker.generation, pid, ready_at, how)
        self._owner.worker_gone()

    def _after_exit(self, worker: WorkerProcess) -> None:
        generation = worker.generation
        for other in self.workers:
            if other.replaces is worker:
                other.replaces = None
        if worker.refill_after and generation is not None:
            worker.refill_after = False
            self._fork(worker, generation)
        else:
            worker.free()
            if generation is not None and generation.stage is Stage.OVER:
                self._close_if_empty(generation)

    def _after_death(
        self,
        worker: WorkerProcess,
        generation: Generation,
        pid: int,
        ready_at: float | None,
        how: str,
    ) -> None:
        if not generation.in_service:
            LOGGER.error("Worker %d (pid %d) died at boot: %s", worker.number, pid, how)
            reason = f"worker {worker.number} died at boot: {how}"
            self._owner.generation_failed(generation, reason)
            return
        self._shared.record_death()
        LOGGER.error("Worker %d (pid %d) died: %s; replacing it", worker.number, pid, how)
        if ready_at is None:
            self._refill_later(worker)
        elif time.monotonic() - ready_at < SETTLED_SECONDS:
            self._refill_in(worker, generation, PAUSE_AFTER_READY)
        else:
            self._fork(worker, generation)

    def _refill_later(self, worker: WorkerProcess) -> None:
        """Start it again after a pause that grows with each start that has failed in a row."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**worker.failures)
        worker.failures = min(worker.failures + 1, 16)
        LOGGER.warning("Worker %d: next start in %.1f s", worker.number, pause)
        assert worker.generation is not None
        self._refill_in(worker, worker.generation, pause)

    def _refill_in(self, worker: WorkerProcess, generation: Generation, seconds: float) -> None:
        worker.refill = self._loop.after(seconds, lambda: self._fork(worker, generation))

    # -- who sits where --

    def _of(self, generation: Generation) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.generation is generation]

    def _staff(self, generation: Generation) -> list[WorkerProcess]:
        """The seats that count for what a generation should have."""
        return [s for s in self._of(generation) if not s.exiting or s.refill_after]

    def _free_slot(self) -> WorkerProcess | None:
        if self.confined:
            return None
        return next((worker for worker in self.workers if worker.generation is None), None)
