"""The worker pool: as many workers as there should be, and a replacement for each that ends.

A generation in service keeps its number of workers. A generation that boots fails as a whole when
one of its workers cannot boot.

A worker that died is replaced at once. If it died before it was ready, its replacement starts after
a pause that grows each time; if it died within a second of being ready, after half a second: a
broken module is never a hot loop. Called in the master.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from functools import partial

from cpanbridge.supervisor.memory.fields import COMMAND_STOP
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups, wake_main_threads
from cpanbridge.supervisor.processes.context import Mains, Report
from cpanbridge.supervisor.processes.generation import Generation, Owner, Stage
from cpanbridge.supervisor.processes.spawner import HeldPool, Spawner
from cpanbridge.supervisor.processes.templates import Templates
from cpanbridge.supervisor.processes.worker_process import WorkerProcess
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.wording import explain_start

LOGGER = logging.getLogger("cpanbridge.master")

# Seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 1.0  # a worker that was ready for so long did not die of its start
PAUSE_AFTER_READY = 0.5  # before a worker is started in place of one that died earlier


class WorkerPool:
    """All workers of a master: one for each slot of the shared memory; most slots are free."""

    def __init__(
        self, owner: Owner, loop: Loop, shared: Shared, wakeups: Sequence[Wakeups], mains: Mains
    ) -> None:
        self._owner = owner
        self.spawner = Spawner(loop, shared, wakeups, mains)
        self.templates = Templates(self.spawner, self.spawn, owner.generation_failed)
        self.workers = [
            WorkerProcess(self.spawner, number, self._reported, self._forked, self._inherited_left)
            for number in range(len(shared.slots))
        ]
        self._inherited: Generation | None = None  # of another master
        # Children that ended while it was not known yet what they were: pid, wait status.
        self._unknown: dict[int, int] = {}
        self._lacking: Generation | None = None  # found too few free slots
        self._stopping = False
        # In an upgrade a new master starts its workers in the slots that are free.
        self.confined = False  # to the slots in use
        self.standing_still = False  # the new master is about to take over: nothing may change

    @property
    def starts(self) -> bool:
        """Whether a worker that is retired now would get its replacement."""
        return not (self.standing_still or self._stopping)

    def is_gone(self) -> bool:
        """Whether there is no worker and no template."""
        return not self.templates.alive and not any(worker.pid for worker in self.workers)

    # -- slots --

    def of(self, generation: Generation) -> list[WorkerProcess]:
        """All workers of a generation."""
        return [worker for worker in self.workers if worker.generation is generation]

    def _counted(self, generation: Generation) -> list[WorkerProcess]:
        """The workers that count for what a generation should have.

        One that exits does not, unless its replacement follows in the same slot.
        """
        return [w for w in self.of(generation) if not w.exiting or w.replacement is w]

    def free_slot(self) -> WorkerProcess | None:
        """A slot for another worker, if there is any."""
        if self.confined:
            return None
        return next((worker for worker in self.workers if worker.generation is None), None)

    # -- generations --

    def spawn(self, generation: Generation) -> None:
        """Start the workers that a generation lacks, as far as there are free slots for them.

        Its template comes first, and calls this again.
        """
        if self._stopping or self.templates.must_be_awaited(generation):
            return
        for _ in range(generation.wanted - len(self._counted(generation))):
            worker = self.free_slot()
            if self._stopping or generation.stage is Stage.OVER:
                return
            if worker is None:
                self._lacking = generation
                return
            self.start(worker, generation)

    def put_in_service(self, generation: Generation) -> None:
        """From now on its workers accept, and those that die are replaced."""
        self.spawner.shared.header.generation = generation.number
        generation.stage = Stage.SERVES
        os.eventfd_write(generation.opening, 1)

    def end(self, generation: Generation) -> None:
        """Its workers finish what they run, within `drain_timeout`, and exit.

        Those of a generation that has never been in service run nothing: they are killed.
        """
        has_served, generation.stage = generation.in_service, Stage.OVER
        self.templates.end(generation)
        for worker in self.of(generation):
            if has_served:
                worker.drain("its generation is retired")
            else:
                worker.abandon("its generation is given up")
        self._close_if_empty(generation)

    def accepts(self, generation: Generation) -> bool:
        """Whether a worker of a retired generation may still accept a client."""
        return any(worker.ready and not worker.slot.shut for worker in self.of(generation))

    def add(self, generation: Generation) -> bool:
        """One worker more; False when there is no room for it beside another generation."""
        # Workers that exit take their time, and the slot that they leave would not be filled.
        no_room = generation.wanted >= len(self.workers) // 2 or self.free_slot() is None
        if self._stopping or no_room:
            return False
        generation.wanted += 1
        self.spawn(generation)
        return True

    def remove(self, generation: Generation) -> bool:
        """One worker fewer: it finishes what it runs. False for the last one."""
        staying = [worker for worker in self.of(generation) if not worker.exiting]
        if self._stopping or self.confined or generation.wanted == 1 or not staying:
            return False
        generation.wanted -= 1
        self._tell_replaced(staying[-1])  # which needs no replacement any more
        staying[-1].drain("one worker fewer")
        return True

    def stop(self, seconds: float | None, command: int = COMMAND_STOP) -> None:
        """End all workers: in so many seconds, or None: at once. None is replaced any more."""
        self._stopping = True
        for template in self.templates.alive:
            template.end()
        for worker in self.workers:
            worker.cancel_start()
            if seconds is None:
                worker.kill()
            elif worker.pid:
                worker.tell_to_exit(command, seconds)

    def resume(self, generation: Generation) -> None:
        """The daemon goes on after `stop`: start a generation's workers anew."""
        self._stopping = False
        for worker in self.workers:
            worker.replacement = None
            if worker.pid:
                worker.exiting = worker.exiting or "the daemon was about to end"
            elif worker.generation is not None:
                self._after_exit(worker)
        self.spawn(generation)

    def reopen_logs(self) -> None:
        """Have all processes continue in the files that the master has opened."""
        self.spawner.log_process.restart()
        for process in (*self.templates.alive, *self.workers):
            process.signal(signal.SIGUSR1)

    def _close_if_empty(self, generation: Generation) -> None:
        if self.of(generation):
            return
        os.close(generation.opening)
        if generation is self._inherited:
            self._inherited = None
            while self.spawner.inherited_life:
                os.close(self.spawner.inherited_life.pop())

    # -- starting a worker --

    def start(self, worker: WorkerProcess, generation: Generation) -> None:
        """Start a worker of a generation in a slot that has no process."""
        if self.standing_still:
            worker.after(FIRST_PAUSE, partial(self.start, worker, generation))
            return
        template = self.templates.of(generation)
        if template is not None and template.forks:
            try:
                worker.request_fork(template)
                return
            except OSError as error:
                why = explain_start(error)
                LOGGER.warning("Worker %d is not forked by its template: %s", worker.number, why)
        try:
            worker.fork(generation)
        except OSError as error:
            worker.generation, worker.failure = generation, f"cannot fork: {explain_start(error)}"
            LOGGER.error("Worker %d: %s", worker.number, worker.failure)
            if generation.in_service:
                self._restart(worker, generation, None)
            else:
                self._owner.generation_failed(generation, worker.failure)

    def _forked(self, worker: WorkerProcess, pid: int) -> None:
        """A template has forked a worker, or 0: it has not, and is of no use any more."""
        generation = worker.generation
        assert generation is not None
        if self.standing_still or not pid:
            worker.cancel_start()
            template = self.templates.of(generation)
            if template is not None and not self.standing_still:
                LOGGER.error("Worker %d was not forked by its template", worker.number)
                template.end()
            self.start(worker, generation)
        else:
            worker.let_boot(pid)
        status = self._unknown.pop(pid, None)
        if not any(each.fork_requested for each in self.workers):
            self._unknown.clear()
        if status is not None and worker.pid == pid:
            self._worker_ended(worker, status)

    def _restart(self, worker: WorkerProcess, generation: Generation, ready: float | None) -> None:
        """Replace a worker that has died, or could not be forked, in the same slot.

        It was ready at `ready`, in CLOCK_MONOTONIC seconds; None: never.
        """
        pause = 0.0
        if ready is None:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(worker.failures, 16))
            worker.failures += 1
            LOGGER.warning("Worker %d: next start in %.1f s", worker.number, pause)
        elif time.monotonic() - ready < SETTLED_SECONDS:
            pause = PAUSE_AFTER_READY
        worker.after(pause, partial(self.start, worker, generation))

    def _reported(self, worker: WorkerProcess, report: Report) -> None:
        """A worker is ready, or cannot boot."""
        generation = worker.generation
        boots = generation is not None and generation.stage is Stage.BOOTS
        if report.error is not None:
            LOGGER.error("Worker %d cannot start: %s", worker.number, report.error)
            worker.failure = report.error
            if generation is not None and boots:
                self._owner.generation_failed(generation, report.error)
            return
        worker.failures = 0
        LOGGER.info("Worker %d ready (pid %d)", worker.number, worker.pid)
        self._tell_replaced(worker)
        if generation is not None and boots:
            workers = self._counted(generation)
            if len(workers) >= generation.wanted and all(each.ready for each in workers):
                self._owner.generation_ready(generation)

    def _tell_replaced(self, worker: WorkerProcess) -> None:
        """Tell the worker that this one replaces to exit, if it was not told before."""
        for each in self.workers:
            if each.replacement is worker and not each.told:
                each.tell_to_retire()

    # -- a worker's end --

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was neither worker nor template."""
        if self.templates.ended(pid, status):
            return
        worker = next((each for each in self.workers if each.pid == pid), None)
        if worker is not None:
            self._worker_ended(worker, status)
        elif any(each.fork_requested for each in self.workers):
            self._unknown[pid] = status  # a template may tell its pid later

    def _worker_ended(self, worker: WorkerProcess, status: int) -> None:
        report = worker.take_report(ended=True)  # its last report may not have been read yet
        how = worker.describe_end(status)
        pid, ready_at, exiting = worker.pid, worker.ready_at, worker.exiting
        importing = worker.importing
        ran = worker.describe_running()
        worker.clear()  # first: its pid may be another process's from now on
        if not self._stopping:
            if report is not None and report.error is not None:
                self._reported(worker, report)
            if exiting:
                LOGGER.info("Worker %d (pid %d) has left: %s%s", worker.number, pid, how, ran)
                self._after_exit(worker)
            elif worker.generation is not None and worker.generation.in_service:
                self.spawner.shared.record_death()
                text = "Worker %d (pid %d) died: %s; replacing it%s"
                LOGGER.error(text, worker.number, pid, how, ran)
                worker.failure = worker.failure or how
                self._restart(worker, worker.generation, ready_at)
            elif worker.generation is not None:
                LOGGER.error("Worker %d (pid %d) died at boot: %s", worker.number, pid, how)
                reason = how if importing else f"worker {worker.number} died at boot: {how}"
                self._owner.generation_failed(worker.generation, reason)
        self._tell_gone()

    def _after_exit(self, worker: WorkerProcess) -> None:
        generation = worker.generation
        if worker.replacement is worker and generation is not None:
            worker.replacement = None
            self.start(worker, generation)
        else:
            worker.free()
            if generation is not None and generation.stage is Stage.OVER:
                self._close_if_empty(generation)

    def _tell_gone(self) -> None:
        # Clients may wait for what the worker held, and a generation for its slot.
        wake_main_threads(self.spawner.shared, self.spawner.wakeups)
        lacking, self._lacking = self._lacking, None
        if lacking is not None:
            self.spawn(lacking)

    # -- from one master to the next --

    def held(self) -> HeldPool:
        """What a master that takes over needs."""
        return self.spawner.held([each.number for each in self.workers if each.generation])

    def will_inherit(self, generation: Generation, held: HeldPool) -> None:
        """Another master's workers are in its slots: leave them to it until `inherit`."""
        self._inherited = generation
        self.put_in_service(generation)
        self.spawner.inherit(held)
        for slot in held.occupied:
            self.workers[slot].generation = generation

    def inherit(self, generation: Generation) -> None:
        """The other master is leaving: its workers are this one's."""
        for worker in self.of(generation):
            if not worker.inherit():
                worker.free()

    def _inherited_left(self, worker: WorkerProcess) -> None:
        ran = worker.describe_running()
        LOGGER.info("Worker %d (pid %d) has left%s", worker.number, worker.pid, ran)
        worker.clear()
        if not self._stopping:
            self._after_exit(worker)
        self._tell_gone()
