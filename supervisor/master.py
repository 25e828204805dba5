"""The master process: fork the workers, watch them, replace them, stop them.

It is single-threaded, so that forking is safe, runs no module code and reads no client bytes. It
waits in one place, the loop; nothing is polled. A signal NAME is handled by the method
`handle_name`. Which workers there are is the workforce's business.
"""

import gc
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import setproctitle

from cpanbridge.supervisor.config import KILL_MARGIN, Load, Loaded
from cpanbridge.supervisor.control.server import ControlConnection, ControlServer
from cpanbridge.supervisor.gate import Wakeups, wake_main_threads
from cpanbridge.supervisor.lifecycle.reload import Reloader
from cpanbridge.supervisor.lifecycle.takeover import Takeover
from cpanbridge.supervisor.lifecycle.upgrade import Inherited
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.memory.layout import Shared, slot_capacity
from cpanbridge.supervisor.monitor.monitor import Monitor
from cpanbridge.supervisor.processes.context import Mains
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.watchdog import Watchdog
from cpanbridge.supervisor.reports import numbers, status
from cpanbridge.supervisor.system import logs
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.logs import LogError
from cpanbridge.supervisor.system.sd_notify import ServiceManager
from cpanbridge.supervisor.system.signals import Signals
from cpanbridge.supervisor.version import __version__

LOGGER = logging.getLogger("cpanbridge.master")


class Master:
    """The master of one daemon, from its first fork to its last wait.

    `on_ready` is called once: with None when all workers are ready, or with the reason why the
    daemon does not start.
    """

    def __init__(
        self,
        load: Load,
        loaded: Loaded,
        sockets: Sockets,
        mains: Mains,
        on_ready: Callable[[str | None], None],
        inherited: Inherited | None = None,
    ) -> None:
        settings = loaded.settings
        self._sockets = sockets
        self._on_ready = on_ready
        if inherited is None:
            capacity = slot_capacity(settings.worker_count)
            shared = Shared.create(capacity, settings.limits, used=settings.worker_count)
            wakeups = [Wakeups.hang() for _ in shared.slots]
            number = 1
        else:
            shared, wakeups, number = (
                inherited.shared,
                inherited.wakeups,
                inherited.estate.generation,
            )
        self._loop = Loop()
        self._notifier = ServiceManager(self._loop, silent=inherited is not None)
        self._pool = WorkerPool(self, self._loop, shared, wakeups, mains)
        self._reloader = Reloader(load, loaded, self._loop, shared, sockets, self._pool, number)
        self._reloader.changed = self._configuration_changed
        self._monitor = Monitor(
            self._loop,
            shared,
            wakeups,
            settings.limits,
            [each.socket for each in sockets.listeners],
            self._pool.retire_for_memory,
        )
        self._hangs = Watchdog(self._loop, shared, self._pool)
        self._shared, self._wakeups = shared, wakeups
        self._control = ControlServer(
            self._loop,
            {"status": self._status, "metrics": self._metrics},
            {"reload": self._reload_for, "upgrade": self._upgrade_for},
            self._progress,
        )
        self._takeover = Takeover(
            self._loop,
            shared,
            wakeups,
            sockets,
            self._pool,
            self._reloader,
            self._control,
            self._notifier,
        )
        self._signals = Signals(self._loop, self._handle)
        self._started = inherited is not None
        self._taking_over = inherited is not None  # until its own workers serve
        self._reload_when_started = False
        self._stopping = False
        self._exit_status = 0
        if inherited is not None:
            self._takeover.will_inherit(inherited, self._start_watching)

    def run(self) -> int:
        """Be the master until the daemon has stopped. Returns the exit status, 0 or 1."""
        self._show_title()
        self._signals.catch()
        self._notifier.watch_dog()
        gc.freeze()  # what exists now is shared with the workers; keep the collector off it
        if self._takeover.expected:
            self._reloader.begin(self._taken_over)
        else:
            self._takeover.watch_control()
            self._pool.spawn(self._reloader.generation)
        while not (self._takeover.left or (self._stopping and self._pool.is_gone())):
            self._loop.turn()
        self._signals.ignore()
        if not self._takeover.left:
            LOGGER.info("Stopped")
        return self._exit_status

    # -- signals --

    def _handle(self, number: int) -> None:
        if not self._takeover.puts_off(number):
            name = signal.Signals(number).name.removeprefix("SIG").lower()
            getattr(self, f"handle_{name}")()

    def handle_term(self) -> None:
        """Stop gracefully: no new client, running requests finish."""
        if not self._stopping:
            seconds = self._graceful_timeout
            LOGGER.info("Stopping: running requests may take %g s", seconds)
            self._stop(seconds)

    def handle_int(self) -> None:
        """Ctrl-C on `cpanbridged run`: the same."""
        self.handle_term()

    def handle_quit(self) -> None:
        """Stop at once."""
        LOGGER.info("Stopping at once")
        self._stop(None)

    def handle_chld(self) -> None:
        """Some children have ended; signals of the same kind merge, so ask until there is none.

        Not only workers: as process 1 of a container the master inherits what they leave behind.
        """
        while True:
            try:
                pid, status = os.waitpid(self._takeover.whom_to_wait_for, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._takeover.ended(pid, status)
            self._pool.ended(pid, status)

    def handle_hup(self) -> None:
        """Reload: a new generation with the configuration and the modules as they are now."""
        self.reload(lambda _: None)

    def handle_usr1(self) -> None:
        """Go on in new log files of the same names: the old ones were renamed."""
        try:
            logs.reopen()
        except LogError as error:
            LOGGER.error("The log stays where it is: %s", error)
            return
        LOGGER.info("Logs reopened")
        self._pool.signal(signal.SIGUSR1)

    def handle_usr2(self) -> None:
        """Upgrade: hand over to a new master, of the code that is on disk now."""
        self.upgrade(lambda _: None)

    def handle_ttin(self) -> None:
        """One worker more, until the next reload."""
        if self._pool.add(self._reloader.generation):
            LOGGER.info("1 worker more: %d", self._reloader.generation.wanted)
        else:
            LOGGER.warning("No worker more: there is no room for it")

    def handle_ttou(self) -> None:
        """One worker fewer, until the next reload."""
        if self._pool.remove(self._reloader.generation):
            LOGGER.info("1 worker fewer: %d", self._reloader.generation.wanted)
        else:
            LOGGER.warning("No worker fewer: the last worker stays")

    # -- what the workforce tells --

    def generation_ready(self, generation: Generation) -> None:
        """All workers have booted: the daemon is ready, or a reload can be completed."""
        if self._stopping:
            return
        if self._takeover.expected:
            self._takeover.ready()
            return
        if self._started:
            self._reloader.ready(generation)
            return
        self._pool.put_in_service(generation)
        self._started = True
        self._start_watching()
        LOGGER.info(
            "cpanbridged %s ready: pid %d, %d workers, listening on %s",
            __version__,
            os.getpid(),
            generation.wanted,
            ", ".join(listener.path for listener in generation.listeners),
        )
        self._on_ready(None)
        self._notifier.ready(self._summary())
        if self._reload_when_started:
            self.handle_hup()

    def _start_watching(self) -> None:
        """The daemon is this master's from now on, and clients are served."""
        self._monitor.start()
        self._hangs.start()

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker does not boot: before the daemon was ready there is no daemon then."""
        if self._started:
            self._reloader.failed(generation, reason)
        elif not self._stopping:
            self._exit_status = 1
            self._stop(None, reason)

    def worker_gone(self) -> None:
        """A worker has gone; a reload may have waited for its slot, or a client for the worker."""
        wake_main_threads(self._shared, self._wakeups)
        self._reloader.worker_gone()

    # -- reloading, stopping --

    def reload(self, tell: Callable[[str | None], None]) -> None:
        """Change over to the configuration as it is now; `tell` is called once, see Reloader."""
        if self._stopping:
            self._reloader.refuse(tell, "the daemon is stopping")
        elif self._takeover.successor or self._takeover.expected:
            self._notifier.reloading()  # whoever has sent the signal waits for this
            self._reloader.refuse(partial(self._reloaded, tell), "an upgrade is under way")
        elif not self._started:
            self._reload_when_started = True
            tell("the daemon is still starting; it reloads when it has started")
        else:
            self._notifier.reloading()
            self._reloader.begin(partial(self._reloaded, tell))

    def _reloaded(self, tell: Callable[[str | None], None], reason: str | None) -> None:
        self._tell_ready(self._summary() if reason is None else f"Not reloaded: {reason}")
        tell(reason)

    def _tell_ready(self, status: str) -> None:
        if not self._stopping:  # then the service manager is told nothing more but that
            self._notifier.ready(status)

    def _summary(self) -> str:
        generation = self._reloader.generation
        return f"Serving with {generation.wanted} workers, generation {generation.number}"

    def _configuration_changed(self) -> None:
        """Another generation has taken over."""
        settings = self._reloader.loaded.settings
        self._monitor.limits = settings.limits
        self._monitor.listeners = [each.socket for each in self._sockets.listeners]
        self._show_title()

    def _stop(self, seconds: float | None, reason: str = "told to stop") -> None:
        if not self._started and not self._stopping:
            self._on_ready(reason)
        if not self._stopping:
            self._stopping = True
            self._notifier.stopping((seconds or 0.0) + KILL_MARGIN)
            self._reloader.give_up("the daemon is stopping")
            self._takeover.give_up("the daemon is stopping")
            self._sockets.close()
        self._pool.stop(seconds)

    def upgrade(self, tell: Callable[[str | None], None]) -> None:
        """Hand over to a new master; `tell` is called once: with None when it has taken over."""
        reason = self._cannot_upgrade()
        if reason is None:
            self._takeover.begin(partial(self._upgraded, tell))
            return
        LOGGER.error("Not upgraded, nothing has changed: %s", reason)
        if not self._stopping:
            self._notifier.status(f"Not upgraded: {reason}")
        tell(reason)

    def _upgraded(self, tell: Callable[[str | None], None], reason: str | None) -> None:
        if reason is not None:
            self._tell_ready(f"Not upgraded: {reason}")
        tell(reason)

    def _cannot_upgrade(self) -> str | None:
        if self._stopping:
            return "the daemon is stopping"
        if self._takeover.successor:
            return "an upgrade is under way"
        if not self._started or self._reloader.coming is not None:
            return f"the daemon is {self._state()}"
        if os.getpid() == 1:
            return "process 1 of a container cannot be replaced; restart the container"
        return None

    def _taken_over(self, reason: str | None) -> None:
        """The reload by which a new master takes over is over."""
        self._taking_over = False
        if reason is None:
            self._tell_ready(self._summary())
        elif self._takeover.expected:
            self._takeover.refuse(reason)
            self._exit_status = 1
            self._stop(None)
        elif not self._stopping:
            seconds = self._graceful_timeout
            LOGGER.error(
                "Stopping, because the old master is dead and this one cannot take its place; "
                "running requests may take %g s: %s",
                seconds,
                reason,
            )
            self._exit_status = 1
            self._stop(seconds)

    @property
    def _graceful_timeout(self) -> float:
        return self._reloader.loaded.settings.limits.graceful_timeout

    # -- the control socket --

    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        if not self._started:
            return "starting"
        if self._takeover.successor or self._taking_over:
            return "upgrading"
        return "reloading" if self._reloader.coming is not None else "running"

    def _progress(self) -> str | None:
        workers = self._pool.workers
        if self._stopping:
            return status.stop_progress(workers, self._shared)
        if self._takeover.successor:
            return f"the new master (pid {self._takeover.successor}) boots"
        coming = self._reloader.coming if self._started else self._reloader.generation
        return status.boot_progress(coming, self._pool) if coming is not None else None

    def _status(self) -> dict[str, Any]:
        return status.status(self._state(), self._reloader, self._pool, self._shared)

    def _metrics(self) -> dict[str, Any]:
        return numbers.numbers(self._status(), self._reloader.loaded.settings, self._shared)

    def _reload_for(self, connection: ControlConnection) -> None:
        def tell(reason: str | None) -> None:
            if reason is not None:
                connection.fail(reason)
                return
            generation = self._reloader.generation
            connection.finish({"generation": generation.number, "workers": generation.wanted})

        self.reload(tell)

    def _upgrade_for(self, connection: ControlConnection) -> None:
        def tell(reason: str | None) -> None:
            if reason is not None:
                connection.fail(reason)
            else:
                connection.finish({"pid": self._takeover.successor})

        self.upgrade(tell)

    def _show_title(self) -> None:
        setproctitle.setproctitle(f"cpanbridged: master [{self._reloader.loaded.source}]")
