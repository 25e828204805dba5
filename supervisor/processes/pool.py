"""The worker pool: as many workers as there should be, and a replacement for each that ends.

A generation in service keeps its number of workers. A generation that boots fails as a whole when
one of its workers cannot boot. Called in the master.
"""

import logging
import os
import signal
from collections.abc import Sequence
from typing import Protocol

import msgspec

from cpanbridge.supervisor.gate import Wakeups, wake_main_threads
from cpanbridge.supervisor.memory.fields import COMMAND_STOP
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.context import Mains, Report
from cpanbridge.supervisor.processes.generation import Generation, Stage
from cpanbridge.supervisor.processes.retirement import Retirement
from cpanbridge.supervisor.processes.slots import Slots
from cpanbridge.supervisor.processes.spawner import Spawner
from cpanbridge.supervisor.processes.starter import Starter
from cpanbridge.supervisor.processes.templates import Templates
from cpanbridge.supervisor.processes.worker_process import WorkerProcess
from cpanbridge.supervisor.system.event_loop import Loop

LOGGER = logging.getLogger("cpanbridge.master")


class Owner(Protocol):
    """Receives how the workers fare; called in the loop."""

    def generation_ready(self, generation: Generation) -> None:
        """All workers of a generation that is not in service have booted."""

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker of a generation that is not in service cannot boot."""

    def worker_gone(self) -> None:
        """A worker has ended, and what it held was given back."""


class HeldPool(msgspec.Struct):
    """What a pool consists of, as descriptors and numbers that another process can use."""

    shared: int  # the shared memory
    wakeups: list[list[int]]  # of each slot
    life: list[int]  # the write ends of the workers' lifelines
    occupied: list[int]  # slots in use

    def descriptors(self) -> list[int]:
        """The descriptors that the other process must inherit."""
        return [self.shared, *self.life, *(each for slot in self.wakeups for each in slot)]


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
        self._spawner = Spawner(loop, shared, wakeups, mains)
        self._slots = Slots(self._spawner)
        self.templates = Templates(self._spawner, self.spawn, owner.generation_failed)
        self._starter = Starter(self._spawner, self._slots, self.templates, self)
        self.retirement = Retirement(self._slots, self._starter)
        self._inherited: Generation | None = None  # of another master
        loop.watch(self._spawner.retirement_request, self._retirement_requested)

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        """One for each slot, in their order."""
        return self._slots.workers

    def is_gone(self) -> bool:
        """Whether there is no worker at all, and no template."""
        return not self.templates.alive and not any(worker.pid for worker in self.workers)

    # -- generations --

    def spawn(self, generation: Generation) -> None:
        """Start the workers that a generation lacks, as far as there are free slots for them.

        Its template comes first, and calls this again.
        """
        if self._starter.stopping or self.templates.must_be_awaited(generation):
            return
        for _ in range(generation.wanted - len(self._slots.counted(generation))):
            worker = self._slots.free()
            if worker is None or self._starter.stopping or generation.stage is Stage.OVER:
                return
            self._starter.start(worker, generation)

    def put_in_service(self, generation: Generation) -> None:
        """From now on its workers accept, and those that die are replaced."""
        self._spawner.shared.header.generation = generation.number
        generation.put_in_service()

    def abandon(self, generation: Generation) -> None:
        """End a generation that has never been in service."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for worker in self._slots.of(generation):
            worker.abandon("its generation is given up")
        self._close_if_empty(generation)

    def retire_generation(self, generation: Generation) -> None:
        """Another one is in service: its workers finish what they run, within `drain_timeout`."""
        generation.stage = Stage.OVER
        self.templates.end(generation)
        for worker in self._slots.of(generation):
            self.retirement.drain(worker, "its generation is retired")
        self._close_if_empty(generation)

    def accepts(self, generation: Generation) -> bool:
        """Whether a worker of a retired generation may still accept a client."""
        return any(worker.accepts for worker in self._slots.of(generation))

    def add(self, generation: Generation) -> bool:
        """One worker more; False when there is no room for it beside another generation."""
        if self._starter.stopping or generation.wanted >= len(self.workers) // 2:
            return False
        # Workers that exit take their time, and the slot that they leave would not be filled.
        if self._slots.free() is None:
            return False
        generation.wanted += 1
        self.spawn(generation)
        return True

    def remove(self, generation: Generation) -> bool:
        """One worker fewer: it finishes what it runs. False for the last one."""
        staying = [worker for worker in self._slots.of(generation) if not worker.exiting]
        if self._starter.stopping or self._slots.confined or generation.wanted == 1 or not staying:
            return False
        generation.wanted -= 1
        worker = staying[-1]
        self.retirement.tell_replaced(worker)  # which needs no replacement any more
        self.retirement.drain(worker, "one worker fewer")
        return True

    def stop(self, seconds: float | None) -> None:
        """End all workers: in so many seconds, or None: at once. None is replaced any more."""
        self._starter.stop()
        self.templates.end_all()
        for worker in self.workers:
            if worker.pid and seconds is None:
                worker.kill()
            elif worker.pid:
                worker.tell_to_exit(COMMAND_STOP, seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker and template."""
        self.templates.signal(number)
        for worker in self.workers:
            worker.signal(number)

    def _close_if_empty(self, generation: Generation) -> None:
        if self._slots.of(generation):
            return
        generation.close()
        if generation is self._inherited:
            self._inherited = None
            self._spawner.close_inherited_life()

    # -- from one master to the next --

    def confine(self) -> None:
        """Use no slot that is not in use: a new master starts its workers in the others."""
        self._slots.confined = True

    def stand_still(self) -> None:
        """Start no process and retire no worker: the new master is about to take over."""
        self._starter.standing_still = True

    def go_on(self) -> None:
        """There is no new master any more."""
        self._slots.confined = self._starter.standing_still = False

    def held(self) -> HeldPool:
        """What a master that takes over needs."""
        spawner = self._spawner
        return HeldPool(
            spawner.shared.fd,
            [list(each) for each in spawner.wakeups],
            [spawner.life, *spawner.inherited_life],
            self._slots.occupied,
        )

    def will_inherit(self, generation: Generation, held: HeldPool) -> None:
        """Another master's workers are in its slots: leave them to it until `inherit`."""
        self._inherited = generation
        self._spawner.inherited_life = list(held.life)
        for slot in held.occupied:
            self.workers[slot].generation = generation

    def inherit(self, generation: Generation) -> None:
        """The other master is leaving: its workers are this one's."""
        for worker in self._slots.of(generation):
            if not worker.inherit(self._inherited_ended):
                worker.free()

    def end_workers_of_new_master(self, last: Generation) -> None:
        """End the workers of a new master that has died; they have never been in service.

        No slot of theirs is free until they have ended. `last` is the generation before theirs.
        """
        slots = self._spawner.shared.slots
        workers = [w for w in self.workers if w.generation is None and slots[w.number].pid]
        if workers:
            theirs = Generation(last.number + 1, last.settings, (), last.log)
            for worker in workers:
                worker.generation = theirs
            self.inherit(theirs)
            self.abandon(theirs)

    def _inherited_ended(self, worker: WorkerProcess) -> None:
        LOGGER.info("Worker %d (pid %d) has left", worker.number, worker.pid)
        worker.clear()
        self._after_exit(worker)
        self._tell_gone()

    # -- a worker's life --

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """Called by the starter."""
        self._owner.generation_failed(generation, reason)

    def worker_reported(self, worker: WorkerProcess, report: Report) -> None:
        """Called when a worker is ready, or cannot boot."""
        if report.error is not None:
            self._cannot_boot(worker, report.error)
            return
        worker.failures = 0
        LOGGER.info("Worker %d ready (pid %d)", worker.number, worker.pid)
        self.retirement.tell_replaced(worker)
        generation = worker.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            workers = self._slots.counted(generation)
            if len(workers) >= generation.wanted and all(each.ready for each in workers):
                self._owner.generation_ready(generation)

    def _cannot_boot(self, worker: WorkerProcess, error: str) -> None:
        LOGGER.error("Worker %d cannot start: %s", worker.number, error)
        generation = worker.generation
        if generation is not None and generation.stage is Stage.BOOTS:
            self._owner.generation_failed(generation, error)

    def _retirement_requested(self) -> None:
        os.eventfd_read(self._spawner.retirement_request)
        self.retirement.handle_requests()

    def ended(self, pid: int, status: int) -> None:
        """A child has ended; ignored when it was neither worker nor template."""
        if self.templates.ended(pid, status):
            return
        for worker in self.workers:
            if worker.pid == pid:
                self.worker_ended(worker, status)
                return
        self._starter.unknown_child_ended(pid, status)

    def worker_ended(self, worker: WorkerProcess, status: int) -> None:
        """Called when a worker has ended and was waited for."""
        how = worker.describe_end(status)
        report = worker.take_report()  # its last report may not have been read yet
        pid, ready_at, exiting = worker.pid, worker.ready_at, worker.exiting
        worker.clear()  # first: its pid may be another process's from now on
        if not self._starter.stopping:
            if report is not None and report.error is not None:
                self._cannot_boot(worker, report.error)
            if exiting:
                LOGGER.info("Worker %d (pid %d) has left: %s", worker.number, pid, how)
                self._after_exit(worker)
            elif worker.generation is not None:
                self._after_death(worker, pid, ready_at, how)
        self._tell_gone()

    def _tell_gone(self) -> None:
        # Clients may wait for what the worker held.
        wake_main_threads(self._spawner.shared, self._spawner.wakeups)
        self._owner.worker_gone()

    def _after_exit(self, worker: WorkerProcess) -> None:
        generation = worker.generation
        self.retirement.forget(worker)
        if worker.replace_in_place and generation is not None:
            worker.replace_in_place = False
            self._starter.start(worker, generation)
        else:
            worker.free()
            if generation is not None and generation.stage is Stage.OVER:
                self._close_if_empty(generation)

    def _after_death(
        self, worker: WorkerProcess, pid: int, ready_at: float | None, how: str
    ) -> None:
        generation = worker.generation
        assert generation is not None
        if generation.in_service:
            self._spawner.shared.record_death()
            LOGGER.error("Worker %d (pid %d) died: %s; replacing it", worker.number, pid, how)
            self._starter.restart(worker, generation, ready_at)
        else:
            LOGGER.error("Worker %d (pid %d) died at boot: %s", worker.number, pid, how)
            reason = f"worker {worker.number} died at boot: {how}"
            self._owner.generation_failed(generation, reason)
