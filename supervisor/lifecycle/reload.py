"""From one generation of workers to the next: all of a changed configuration, or nothing of it.

The configuration is read and checked, new sockets are bound, and a new generation is forked, which
imports its modules anew. While it boots, the old one serves on as if nothing were. When each of its
workers is ready, the limits change for both at once, the new generation accepts, and the old one
stops accepting and finishes what it runs. Whatever fails before that is undone: nothing has changed
then but the log, which says why.

A reload that is asked for while another is under way takes its place, so that what holds at last is
what was configured last, even when a module hangs while it is imported. Who asked for the first one
is told how the last one went. Called in the master.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from cpanbridge.supervisor.config import ConfigError, Load, Loaded, Settings
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.listener import ListenError
from cpanbridge.supervisor.listening.sockets import Change, Sockets
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system import logs, rlimit
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogError, LogSettings

LOGGER = logging.getLogger("cpanbridge.master")

_LOCK_PAUSE = 0.001
_DOOR_PAUSE = 0.002
_DOOR_SECONDS = 1.0

Tell = Callable[[str | None], None]


class ReloadError(Exception):
    """A changed configuration cannot take effect without a restart; one line that says why."""


class Outcome(NamedTuple):
    """How a reload went."""

    at: float  # Unix seconds
    generation: int  # the one in service since
    error: str | None


class _Attempt:
    """A reload that is under way."""

    def __init__(self, loaded: Loaded, change: Change, generation: Generation) -> None:
        self.loaded = loaded
        self.change = change
        self.generation = generation


class Reloader:
    """Makes the generations, and changes over from one to the next.

    `generation` is the one in service, or the first one while it boots; `loaded` its configuration.
    """

    def __init__(
        self,
        load: Load,
        loaded: Loaded,
        loop: Loop,
        shared: Shared,
        sockets: Sockets,
        pool: WorkerPool,
        number: int,
    ) -> None:
        self._load = load
        self._loop = loop
        self._shared = shared
        self._sockets = sockets
        self._pool = pool
        self._last_number = number
        self._attempt: _Attempt | None = None
        self._changing: Generation | None = None  # serves, but old workers may still accept
        self._waiting: list[Tell] = []
        self.last: Outcome | None = None
        self.changed: Callable[[], None] = lambda: None  # called when a generation has taken over
        self.loaded = loaded
        self.generation = Generation(
            number, loaded.settings, sockets.listeners, LogSettings.of(loaded)
        )

    @property
    def coming(self) -> Generation | None:
        """The generation that a reload is about, until it is over."""
        return self._attempt.generation if self._attempt is not None else self._changing

    def begin(self, tell: Tell) -> None:
        """Read the configuration and change over to it.

        `tell` is called once, in this call or later: with None when the new generation serves, or
        with the reason why nothing has changed.
        """
        self._waiting.append(tell)
        if self._attempt is not None:
            LOGGER.info("Another reload: generation %d is given up", self._last_number)
            self._undo()
        try:
            self._attempt = self._prepare()
        except (ConfigError, InstanceError, ListenError, LogError, ReloadError) as error:
            self._finish(str(error))
            return
        except OSError as error:  # no descriptor is left
            self._finish(error.strerror or str(error))
            return
        generation = self._attempt.generation
        LOGGER.info("Reloading from %s: generation %d boots", self.loaded.source, generation.number)
        self._pool.spawn(generation)

    def ready(self, generation: Generation) -> None:
        """All workers of a new generation have booted."""
        if self._attempt is not None and self._attempt.generation is generation:
            self._change_over(self._attempt)

    def failed(self, generation: Generation, reason: str) -> None:
        """A worker of a new generation cannot boot."""
        if self._attempt is not None and self._attempt.generation is generation:
            self._undo()
            self._finish(reason)

    def worker_gone(self) -> None:
        """There may be room for workers that found none."""
        if self._attempt is not None:
            self._pool.spawn(self._attempt.generation)

    def give_up(self, reason: str) -> None:
        """End a reload that is under way, because something has come that matters more."""
        if self._attempt is not None:
            self._undo()
            self._finish(reason)

    def refuse(self, tell: Tell, reason: str) -> None:
        """Begin no reload; nobody may look for a trace of it in vain."""
        LOGGER.error("Not reloaded, nothing has changed: %s", reason)
        self._tell([tell], reason)

    def _prepare(self) -> _Attempt:
        loaded = self._load()
        settings = loaded.settings
        self._check(settings)
        log = LogSettings.of(loaded)
        logs.check(log)
        change = self._sockets.change(settings)
        for event in loaded.events:
            LOGGER.warning("%s", event)
        rlimit.raise_limit(settings.limits, len(self._shared.slots))
        self._last_number += 1
        generation = Generation(self._last_number, settings, change.listeners + change.removed, log)
        return _Attempt(loaded, change, generation)

    def _check(self, settings: Settings) -> None:
        """See that nothing changes that only a restart can. Raises ReloadError."""
        most = len(self._shared.slots) // 2
        if settings.worker_count > most:
            raise ReloadError(
                f"workers = {settings.worker_count}: the running daemon has room for {most}; "
                "restart it to have more"
            )
        for name in ("user", "group"):
            now, then = getattr(settings, name), getattr(self.loaded.settings, name)
            if now != then:
                raise ReloadError(
                    f"{name} = {now!r}: the running daemon has {then!r} and cannot become another; "
                    "restart it"
                )
        sessions = self._shared.header.max_sessions
        if settings.limits.max_sessions != sessions:
            raise ReloadError(
                f"limits.max_sessions = {settings.limits.max_sessions}: the running daemon has "
                f"room for {sessions}; restart it to change that"
            )
        before = self.loaded.settings.log_file
        if settings.log_file == "stderr" != before:
            raise ReloadError(
                f'log_file = "stderr": the running daemon logs to {before} and has no other '
                "standard error; restart it"
            )

    def _change_over(self, attempt: _Attempt) -> None:
        if self._attempt is not attempt:
            return  # given up while it waited for the lock
        if not self._shared.lock.take():
            # Held for microseconds, unless its holder was stopped: the loop must not wait for that.
            self._loop.after(_LOCK_PAUSE, lambda: self._change_over(attempt))
            return
        try:
            self._shared.apply_limits(attempt.loaded.settings.limits)
        except OSError as error:
            self._undo()
            self._finish(f"no memory for the limits: {error.strerror}")
            return
        finally:
            self._shared.lock.give_back()
        old, new = self.generation, attempt.generation
        self._pool.put_in_service(new)
        attempt.change.complete()
        new.listeners = attempt.change.listeners
        self._pool.retire_generation(old)
        self._attempt = None
        self.generation, self.loaded = new, attempt.loaded
        self.changed()
        try:
            logs.configure(new.log)
        except LogError as error:
            LOGGER.error("The log stays where it is: %s", error)
        waiting, self._waiting = self._waiting, []
        self._changing = new
        self._wait_for_doors(old, waiting, time.monotonic() + _DOOR_SECONDS)

    def _wait_for_doors(self, old: Generation, waiting: list[Tell], until: float) -> None:
        """The reload is over when no old worker lets a client in any more.

        That takes some milliseconds, unless one was stopped: then it is not waited for.
        """
        if self._pool.accepts(old) and time.monotonic() < until:
            self._loop.after(_DOOR_PAUSE, lambda: self._wait_for_doors(old, waiting, until))
            return
        new, self._changing = self.generation, None
        LOGGER.info(
            "Reloaded: generation %d serves with %d workers, listening on %s",
            new.number,
            new.wanted,
            ", ".join(each.path for each in new.listeners),
        )
        self._tell(waiting, None)

    def _undo(self) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        self._pool.end_input(attempt.generation)
        attempt.change.undo()

    def _finish(self, reason: str) -> None:
        LOGGER.error("Not reloaded, nothing has changed: %s", reason)
        waiting, self._waiting = self._waiting, []
        self._tell(waiting, reason)

    def _tell(self, waiting: list[Tell], reason: str | None) -> None:
        self.last = Outcome(time.time(), self.generation.number, reason)
        for tell in waiting:
            tell(reason)
