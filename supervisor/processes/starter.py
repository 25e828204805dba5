"""Starting worker processes: by a fork of the template or of the master, now or after a pause.

A worker that died is replaced at once. If it died before it was ready, its replacement starts after
a pause that grows each time; if it died within a second of being ready, after half a second: a
broken module is never a hot loop. Called in the master.
"""

import logging
import time
from typing import Protocol

from cpanbridge.supervisor.processes.context import Report
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.slots import Slots
from cpanbridge.supervisor.processes.spawner import Spawner
from cpanbridge.supervisor.processes.templates import Template, Templates
from cpanbridge.supervisor.processes.worker_process import WorkerProcess

LOGGER = logging.getLogger("cpanbridge.master")

# Seconds.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 1.0  # a worker that was ready for so long did not die of its start
PAUSE_AFTER_READY = 0.5  # before a worker is started in place of one that died earlier
_MOST_FAILURES = 16  # that are counted: the pause is the longest before


class Observer(Protocol):
    """Receives what becomes of a start; called in the loop."""

    def worker_reported(self, worker: WorkerProcess, report: Report) -> None:
        """A worker is ready, or cannot boot."""

    def worker_ended(self, worker: WorkerProcess, status: int) -> None:
        """A worker's process has ended and was waited for: its wait status."""

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker of a generation that is not in service cannot be forked."""


class Starter:
    """Starts the worker processes of one master."""

    def __init__(
        self, spawner: Spawner, slots: Slots, templates: Templates, observer: Observer
    ) -> None:
        self._loop = spawner.loop
        self._slots = slots
        self._templates = templates
        self._observer = observer
        # Children that ended while it was not known yet what they were: pid, wait status.
        self._unknown: dict[int, int] = {}
        self.standing_still = False  # another master is about to take over: nothing may change
        self.stopping = False

    @property
    def starts(self) -> bool:
        """Whether a worker that is retired now would get its replacement."""
        return not (self.standing_still or self.stopping)

    def start(self, worker: WorkerProcess, generation: Generation) -> None:
        """Start a worker of a generation in a slot that has no process."""
        worker.next_start = None
        if self.standing_still:
            self._start_in(worker, generation, FIRST_PAUSE)
            return
        template = self._templates.of(generation)
        if template is not None and template.forks and self._request_fork(worker, template):
            return
        try:
            worker.fork(generation, self._observer.worker_reported)
        except OSError as error:
            LOGGER.error("Worker %d: cannot fork: %s", worker.number, error.strerror)
            worker.generation = generation
            if generation.in_service:
                self._start_later(worker, generation)
            else:
                reason = f"cannot fork a worker: {error.strerror}"
                self._observer.generation_failed(generation, reason)

    def restart(
        self, worker: WorkerProcess, generation: Generation, ready_at: float | None
    ) -> None:
        """Start a worker in the slot of one that has died.

        `ready_at` is when that one was ready, in CLOCK_MONOTONIC seconds; None: never.
        """
        if ready_at is None:
            self._start_later(worker, generation)
        elif time.monotonic() - ready_at < SETTLED_SECONDS:
            self._start_in(worker, generation, PAUSE_AFTER_READY)
        else:
            self.start(worker, generation)

    def unknown_child_ended(self, pid: int, status: int) -> None:
        """A child has ended that is no worker yet: a template may tell its pid later."""
        if self._forks_requested:
            self._unknown[pid] = status

    def stop(self) -> None:
        """Start no worker any more."""
        self.stopping = True
        for worker in self._slots.workers:
            worker.cancel_start()

    def _request_fork(self, worker: WorkerProcess, template: Template) -> bool:
        """Have a template fork a worker; whether it could be told."""
        try:
            worker.request_fork(template.generation, template.command, self._forked)
        except OSError as error:
            LOGGER.warning("Worker %d is not forked by its template: %s", worker.number, error)
            return False
        return True

    def _forked(self, worker: WorkerProcess, pid: int) -> None:
        """A template has forked a worker, or 0: it has not, and is of no use any more."""
        generation = worker.generation
        assert generation is not None
        if self.standing_still or not pid:
            worker.cancel_start()
            template = self._templates.of(generation)
            if template is not None and not self.standing_still:
                LOGGER.error("Worker %d was not forked by its template", worker.number)
                template.end()
            self.start(worker, generation)
        else:
            worker.let_boot(pid, self._observer.worker_reported)
        status = self._unknown.pop(pid, None)
        if not self._forks_requested:
            self._unknown.clear()
        if status is not None and worker.pid == pid:
            self._observer.worker_ended(worker, status)

    @property
    def _forks_requested(self) -> bool:
        return any(worker.fork_requested for worker in self._slots.workers)

    def _start_later(self, worker: WorkerProcess, generation: Generation) -> None:
        """Start after a pause that grows with each start in a row that failed."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**worker.failures)
        worker.failures = min(worker.failures + 1, _MOST_FAILURES)
        LOGGER.warning("Worker %d: next start in %.1f s", worker.number, pause)
        self._start_in(worker, generation, pause)

    def _start_in(self, worker: WorkerProcess, generation: Generation, seconds: float) -> None:
        worker.next_start = self._loop.after(seconds, lambda: self.start(worker, generation))
