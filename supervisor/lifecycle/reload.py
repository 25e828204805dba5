"""From one generation of workers to the next: all of a changed configuration, or nothing of it.

The configuration is read and checked, new sockets are bound, and a new generation is forked, which
imports its modules anew. While it boots, the old one serves as before. When each of its workers is
ready, the limits change for both generations at once, the new one accepts, and the old one stops
accepting and finishes what it runs. Whatever fails before that is undone: then nothing has changed,
and the log says why.

A reload that is requested during another one replaces it, so that the configuration that was
written last takes effect, even when a module hangs while it is imported. The requester of the
first one receives the outcome of the last one. Called in the master.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from cpanbridge.supervisor.config import ConfigError, Load, Loaded, Settings
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.listener import ListenError
from cpanbridge.supervisor.listening.sockets import Change, Sockets
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.system import logs, rlimit
from cpanbridge.supervisor.system.logs import LogError, LogSettings
from cpanbridge.supervisor.wording import count_of, explain_with_path

LOGGER = logging.getLogger("cpanbridge.master")

# Seconds.
_LOCK_PAUSE = 0.001
_ACCEPT_PAUSE = 0.002
_ACCEPT_SECONDS = 1.0

# Receives the outcome: None, or the reason why nothing has changed.
OnDone = Callable[[str | None], None]


class ReloadError(Exception):
    """A changed configuration cannot take effect without a restart; one line that says why."""


class Outcome(NamedTuple):
    """How a reload went."""

    at: float  # Unix seconds
    generation: int  # the one in service since
    error: str | None


class _Attempt(NamedTuple):
    """A reload that is under way."""

    loaded: Loaded
    change: Change
    generation: Generation


class Reloader:
    """Makes the generations, and changes over from one to the next.

    `generation` is the one in service, or the first one while it boots, and `loaded` its
    configuration. `load` reads it again. `on_change` is called when another generation serves.
    """

    def __init__(
        self,
        load: Load,
        loaded: Loaded,
        sockets: Sockets,
        pool: WorkerPool,
        number: int,
        on_change: Callable[[], None],
    ) -> None:
        self._load = load
        self._sockets = sockets
        self._pool = pool
        self._loop = pool.spawner.loop
        self._shared = pool.spawner.shared
        self._on_change = on_change
        self._last_number = number
        self._attempt: _Attempt | None = None
        self._changing: Generation | None = None  # serves, but old workers may still accept
        self._waiting: list[OnDone] = []
        self.loaded = loaded
        self.last: Outcome | None = None
        log = LogSettings.of(loaded)
        self.generation = Generation(number, loaded.settings, sockets.listeners, log)

    @property
    def coming(self) -> Generation | None:
        """The generation of the reload that is under way, until that is over."""
        return self._attempt.generation if self._attempt is not None else self._changing

    def begin(self, on_done: OnDone) -> None:
        """Read the configuration and change over to it.

        `on_done` is called once, now or later: with None when the new generation serves, or with
        the reason why nothing has changed.
        """
        self._waiting.append(on_done)
        if self._attempt is not None:
            LOGGER.info("Another reload: generation %d is given up", self._last_number)
            self._undo()
        try:
            self._attempt = self._prepare()
        except (ConfigError, InstanceError, ListenError, LogError, ReloadError) as error:
            self._fail(str(error))
            return
        except OSError as error:  # no descriptor is left
            self._fail(explain_with_path(error))
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
            self._fail(reason)

    def give_up(self, reason: str) -> None:
        """End a reload that is under way, because of something that matters more."""
        if self._attempt is not None:
            self._fail(reason)

    def refuse(self, on_done: OnDone, reason: str) -> None:
        """Begin no reload; the log and `last` say why."""
        self._conclude([on_done], reason)

    def _prepare(self) -> _Attempt:
        loaded = self._load()
        settings = loaded.settings
        _check(self.loaded.settings, settings, self._shared)
        log = LogSettings.of(loaded)
        logs.check(log)
        change = self._sockets.change(settings)
        for warning in loaded.warnings:
            LOGGER.warning("%s", warning)
        rlimit.raise_limit(settings.limits, len(self._shared.slots))
        listeners = change.listeners + change.removed
        try:
            generation = Generation(self._last_number + 1, settings, listeners, log)
        except OSError:
            change.undo()
            raise
        self._last_number += 1
        return _Attempt(loaded, change, generation)

    def _change_over(self, attempt: _Attempt) -> None:
        if self._attempt is not attempt:
            return  # given up while it waited for the lock
        if not self._shared.apply_limits(attempt.loaded.settings.limits):
            # The gate's lock is held for microseconds, unless its holder was stopped: the loop must
            # not wait for that.
            self._loop.after(_LOCK_PAUSE, partial(self._change_over, attempt))
            return
        old, new = self.generation, attempt.generation
        self._pool.put_in_service(new)
        attempt.change.complete()
        new.listeners = attempt.change.listeners
        self._pool.end(old)
        self._attempt = None
        self.generation, self.loaded = new, attempt.loaded
        self._on_change()
        try:
            logs.configure(new.log)
        except LogError as error:
            LOGGER.error("The log stays where it is: %s", error)
        waiting, self._waiting = self._waiting, []
        self._changing = new
        self._wait_for_acceptors(old, waiting, time.monotonic() + _ACCEPT_SECONDS)

    def _wait_for_acceptors(self, old: Generation, waiting: list[OnDone], until: float) -> None:
        """The reload is over when no old worker accepts clients any more.

        That takes some milliseconds, unless one was stopped: then it is not waited for.
        """
        if self._pool.accepts(old) and time.monotonic() < until:
            self._loop.after(_ACCEPT_PAUSE, partial(self._wait_for_acceptors, old, waiting, until))
            return
        new, self._changing = self.generation, None
        LOGGER.info(
            "Reloaded: generation %d serves with %s, listening on %s",
            new.number,
            count_of(new.wanted, "worker"),
            ", ".join(each.path for each in new.listeners),
        )
        self._conclude(waiting, None)

    def _undo(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._pool.end(attempt.generation)
            attempt.change.undo()

    def _fail(self, reason: str) -> None:
        self._undo()
        waiting, self._waiting = self._waiting, []
        self._conclude(waiting, reason)

    def _conclude(self, waiting: list[OnDone], reason: str | None) -> None:
        if reason is not None:
            LOGGER.error("Not reloaded, nothing has changed: %s", reason)
        self.last = Outcome(time.time(), self.generation.number, reason)
        self._pool.spawner.log_process.follow()
        for on_done in waiting:
            on_done(reason)


def _check(before: Settings, settings: Settings, shared: Shared) -> None:
    """Raises ReloadError for a setting that this daemon cannot change."""
    most, sessions = len(shared.slots) // 2, shared.header.max_sessions
    if settings.worker_count > most:
        raise ReloadError(
            f"workers = {settings.worker_count}: the running daemon has room for {most}; "
            "restart it to have more"
        )
    for name in ("user", "group"):
        now, then = getattr(settings, name), getattr(before, name)
        if now != then:
            raise ReloadError(
                f"{name} = {now!r}: the running daemon has {then!r} and cannot become another; "
                "restart it"
            )
    if settings.limits.max_sessions != sessions:
        raise ReloadError(
            f"limits.max_sessions = {settings.limits.max_sessions}: the running daemon has "
            f"room for {sessions}; restart it to change that"
        )
    if settings.log_file == "stderr" != before.log_file:
        raise ReloadError(
            f'log_file = "stderr": the running daemon logs to {before.log_file} and has no other '
            "standard error; restart it"
        )
