"""What the master answers on the control socket. Called in the master."""

from typing import Any, Protocol

from cpanbridge.supervisor.control.server import ControlConnection, ControlServer
from cpanbridge.supervisor.lifecycle.reload import OnDone, Reloader
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.reports import numbers, status
from cpanbridge.supervisor.system.event_loop import Loop


class Daemon(Protocol):
    """What answers need from the master."""

    @property
    def state(self) -> str:
        """Its state in a word, as `cpanbridged status` shows it."""

    @property
    def successor(self) -> int:
        """The pid of the new master of an upgrade; 0: there is none."""

    def reload(self, on_done: OnDone) -> None:
        """Reload; `on_done` is called once with the outcome."""

    def upgrade(self, on_done: OnDone) -> None:
        """Upgrade; `on_done` is called once with the outcome."""


class Answers:
    """One daemon's: its state, its numbers, its progress, and the outcome of commands."""

    def __init__(
        self, daemon: Daemon, reloader: Reloader, pool: WorkerPool, shared: Shared
    ) -> None:
        self._daemon = daemon
        self._reloader = reloader
        self._pool = pool
        self._shared = shared

    def server(self, loop: Loop) -> ControlServer:
        """A control server that gives these answers; it does not listen yet."""
        return ControlServer(
            loop,
            {"status": self._status, "metrics": self._metrics},
            {"reload": self._reload, "upgrade": self._upgrade},
            self._progress,
        )

    def _status(self) -> dict[str, Any]:
        return status.status(self._daemon.state, self._reloader, self._pool, self._shared)

    def _metrics(self) -> dict[str, Any]:
        return numbers.numbers(self._status(), self._reloader.loaded.settings, self._shared)

    def _progress(self) -> str | None:
        state = self._daemon.state
        if state == "stopping":
            return status.stop_progress(self._pool.workers, self._shared)
        if self._daemon.successor:
            return f"the new master (pid {self._daemon.successor}) boots"
        coming = self._reloader.generation if state == "starting" else self._reloader.coming
        return status.boot_progress(coming, self._pool) if coming is not None else None

    def _reload(self, connection: ControlConnection) -> None:
        def on_done(reason: str | None) -> None:
            if reason is not None:
                connection.fail(reason)
                return
            generation = self._reloader.generation
            connection.finish({"generation": generation.number, "workers": generation.wanted})

        self._daemon.reload(on_done)

    def _upgrade(self, connection: ControlConnection) -> None:
        def on_done(reason: str | None) -> None:
            if reason is not None:
                connection.fail(reason)
            else:
                connection.finish({"pid": self._daemon.successor})

        self._daemon.upgrade(on_done)
