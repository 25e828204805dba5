"""The master process: fork the workers, watch them, replace them, stop them.

It is single-threaded, so that forking is safe, runs no module code and reads no client bytes. It
waits in one place, the loop; nothing is polled. A signal NAME is handled by the method
`handle_name`. Which workers there are is the workforce's business.
"""

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence

import setproctitle

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.listener import Listener
from cpanbridge.supervisor.loop import Loop
from cpanbridge.supervisor.monitor import Monitor
from cpanbridge.supervisor.place import WorkerMain
from cpanbridge.supervisor.seats import Generation
from cpanbridge.supervisor.shared import Shared, slot_capacity
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.workforce import Workforce

LOGGER = logging.getLogger("cpanbridge.master")

_SIGNALS = ("TERM", "INT", "QUIT", "HUP", "CHLD", "USR1", "USR2", "TTIN", "TTOU")


class Master:
    """The master of one daemon, from its first fork to its last wait.

    `on_ready` is called once: with None when all workers are ready, or with the reason why the
    daemon does not start.
    """

    def __init__(
        self,
        settings: Settings,
        source: str,
        listeners: Sequence[Listener],
        worker_main: WorkerMain,
        on_ready: Callable[[str | None], None],
    ) -> None:
        self._settings = settings
        self._source = source
        self._listeners = listeners
        self._on_ready = on_ready
        self._shared = Shared.create(
            slot_capacity(settings.worker_count), settings.limits, used=settings.worker_count
        )
        bells = [Bells.hang() for _ in self._shared.slots]
        self._loop = Loop()
        self._workforce = Workforce(self, self._loop, self._shared, bells, worker_main)
        self._generation = Generation(1, settings, listeners, settings.worker_count)
        self._monitor = Monitor(
            self._loop,
            self._shared,
            bells,
            settings.limits,
            [listener.socket for listener in listeners],
            lambda slot, reason: self._workforce.retire(slot, reason, replace_first=False),
        )
        self._signals, self._wakeup = socket.socketpair()
        self._started = False
        self._stopping = False
        self._exit_status = 0

    def run(self) -> int:
        """Be the master until the daemon has stopped. Returns the exit status, 0 or 1."""
        setproctitle.setproctitle(f"cpanbridged: master [{self._source}]")
        self._catch_signals()
        gc.freeze()  # what exists now is shared with the workers; keep the collector off it
        self._workforce.hire(self._generation)
        while not (self._stopping and self._workforce.is_gone()):
            self._loop.turn()
        for name in _SIGNALS:  # Python would put the defaults back while it ends
            if name != "CHLD":
                signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
        LOGGER.info("Stopped")
        return self._exit_status

    # -- signals --

    def _catch_signals(self) -> None:
        for end in (self._signals, self._wakeup):
            end.setblocking(False)
        self._loop.watch(self._signals.fileno(), self._handle_signals)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for name in _SIGNALS:
            signal.signal(signal.Signals[f"SIG{name}"], lambda *_: None)

    def _handle_signals(self) -> None:
        numbers = dict.fromkeys(self._signals.recv(4096))
        numbers[signal.SIGCHLD] = None  # of many at once, some may not have been written
        for number in numbers:
            name = signal.Signals(number).name.removeprefix("SIG").lower()
            getattr(self, f"handle_{name}")()

    def handle_term(self) -> None:
        """Stop gracefully: no new client, running requests finish."""
        if not self._stopping:
            seconds = self._settings.limits.graceful_timeout
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
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._workforce.ended(pid, status)

    def handle_hup(self) -> None:
        """A terminal that closes, or a request for what this version does not have."""
        LOGGER.warning("SIGHUP: this version cannot reload; restart to apply a changed setting")

    def handle_usr1(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGUSR1: this version cannot reopen its logs; restart it instead")

    def handle_usr2(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGUSR2: this version cannot upgrade in place; restart it instead")

    def handle_ttin(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGTTIN: this version cannot add a worker; set workers and restart")

    def handle_ttou(self) -> None:
        """See handle_hup."""
        LOGGER.warning("SIGTTOU: this version cannot remove a worker; set workers and restart")

    # -- what the workforce tells --

    def generation_ready(self, generation: Generation) -> None:
        """All workers have booted: the daemon is ready."""
        if self._stopping:
            return
        self._workforce.put_in_service(generation)
        self._started = True
        self._monitor.start()
        LOGGER.info(
            "cpanbridged %s ready: pid %d, %d workers, listening on %s",
            __version__,
            os.getpid(),
            generation.wanted,
            ", ".join(listener.path for listener in self._listeners),
        )
        self._on_ready(None)

    def generation_failed(self, generation: Generation, reason: str) -> None:
        """A worker does not boot before the daemon was ready: there is no daemon."""
        if not self._stopping:
            self._exit_status = 1
            self._stop(None, reason)

    def seat_emptied(self) -> None:
        """Nothing waits for that here."""

    # -- stopping --

    def _stop(self, seconds: float | None, reason: str = "told to stop") -> None:
        if not self._started and not self._stopping:
            self._on_ready(reason)
        self._stopping = True
        for listener in self._listeners:
            try:
                listener.unlink()
            except OSError as error:
                LOGGER.warning("%s: cannot be removed: %s", listener.path, error.strerror)
            listener.socket.close()
        self._workforce.stop(seconds)
