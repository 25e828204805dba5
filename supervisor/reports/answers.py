"""What the master answers on the control socket: its state, its numbers, what it waits for.

All of it is read from the master's objects and from the shared memory, and quickly, because the
master's loop waits meanwhile: the numbers take a millisecond with a few workers, and 27 with 64
slots used and a thousand functions called in each; a step may take 50. The command formats them.
Called in the master.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.control.server import (
    STOP,
    Command,
    ControlConnection,
    ControlServer,
    Request,
)
from cpanbridge.supervisor.lifecycle.handover import Handover, NextMaster
from cpanbridge.supervisor.lifecycle.reload import OnDone, Reloader
from cpanbridge.supervisor.listening.repair import Repair
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.worker_process import WorkerProcess
from cpanbridge.supervisor.reports import reports, surroundings, totals
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.wording import count_of


class Daemon(Protocol):
    """What answers need from the master."""

    @property
    def state(self) -> str:
        """Its state in a word, as `cpanbridged status` shows it."""

    handover: Handover

    def reload(self, on_done: OnDone) -> None:
        """Reload; `on_done` is called once with the outcome."""

    def hand_over(self, new: NextMaster, on_done: OnDone) -> None:
        """Upgrade or restart; `on_done` is called once with the outcome."""

    def stop(self) -> None:
        """Stop gracefully, whatever it is at."""

    def handle_usr1(self) -> str | None:
        """Continue in new log files; returns why that cannot be, or None."""


@dataclass(frozen=True)
class Answers:
    """One daemon's: its state, its numbers, its progress, and the outcome of commands."""

    daemon: Daemon
    reloader: Reloader
    pool: WorkerPool
    shared: Shared
    repair: Repair

    def server(self, loop: Loop) -> ControlServer:
        """A control server that gives these answers; it does not listen yet."""
        # Not one of the commands: a stop is never refused because too many wait for an outcome.
        inquiries = {"status": self._status, "metrics": self._metrics, STOP: self._stop}
        commands = {
            "reload": _outcome(self._reload, self._reloaded),
            "upgrade": _outcome(self._upgrade, self._handed_over),
            "restart": _outcome(self._restart, self._handed_over),
            "reopen": _outcome(lambda _, on_done: on_done(self.daemon.handle_usr1()), dict),
        }
        return ControlServer(loop, inquiries, commands, self._progress)

    def _status(self) -> dict[str, Any]:
        shared, reloader, pool = self.shared, self.reloader, self.pool
        loaded, generation, last = reloader.loaded, reloader.generation, reloader.last
        counts = totals.count(shared)
        return {
            "state": self.daemon.state,
            "pid": os.getpid(),
            "version": __version__,
            "uptime_seconds": shared.uptime,
            "configuration": loaded.source,
            "log_file": loaded.settings.log_file,
            "graceful_timeout": loaded.settings.limits.graceful_timeout,
            "sockets": [each.path for each in generation.listeners],
            "unreachable": self.repair.unreachable(),
            "lost": [msgspec.to_builtins(each) for each in self.repair.losses.values()],
            "generation": generation.number,
            "workers_wanted": generation.wanted,
            "workers": [_worker(each, shared) for each in pool.workers if each.generation],
            "templates": [
                {"pid": each.pid, "generation": each.generation.number, "state": each.state}
                for each in pool.templates.alive
            ],
            "worker_deaths": shared.header.deaths,
            "resource_status": reports.resource_status(shared, counts),
            **surroundings.found(),
            "gate": reports.gate(shared, loaded.settings, counts),
            "last_reload": last._asdict() if last is not None else None,
        }

    def _metrics(self) -> dict[str, Any]:
        return numbers(self._status(), self.reloader.loaded.settings, self.shared)

    def _stop(self) -> dict[str, Any]:
        self.daemon.stop()
        return {"state": self.daemon.state}

    def _reloaded(self) -> dict[str, Any]:
        generation = self.reloader.generation
        return {"generation": generation.number, "workers": generation.wanted}

    def _reload(self, _: Request, on_done: OnDone) -> None:
        self.daemon.reload(on_done)

    def _upgrade(self, _: Request, on_done: OnDone) -> None:
        self.daemon.hand_over(NextMaster(), on_done)

    def _restart(self, request: Request, on_done: OnDone) -> None:
        new = NextMaster(afresh=True, arguments=request.arguments, folder=request.folder)
        self.daemon.hand_over(new, on_done)

    def _handed_over(self) -> dict[str, Any]:
        return {"pid": self.daemon.handover.successor, "sockets": self.daemon.handover.sockets}

    def _progress(self) -> str | None:
        state = self.daemon.state
        if state == "stopping":
            return self._stop_progress()
        if state == "restarting" and not any(each.serves for each in self.pool.workers):
            return self._stop_progress()
        if self.daemon.handover.successor:
            return f"the new master (pid {self.daemon.handover.successor}) boots"
        coming = self.reloader.generation if state == "starting" else self.reloader.coming
        return self._boot_progress(coming) if coming is not None else None

    def _boot_progress(self, generation: Generation) -> str:
        """What the boot of a generation waits for: its template, or some of its workers."""
        template = self.pool.templates.of(generation)
        if template is not None and template.imports:
            at = f", now {template.importing}" if template.importing else ""
            return f"the template (pid {template.pid}) imports the modules{at}"
        workers = (each for each in self.pool.workers if each.generation is generation)
        own = [worker for worker in workers if not worker.exiting]
        missing = [worker for worker in own if not worker.ready]
        text = f"{len(own) - len(missing)} of {count_of(generation.wanted, 'worker')} ready"
        if missing:
            names = ", ".join(f"{worker.number} (pid {worker.pid})" for worker in missing)
            text += f", waiting for worker {names}"
        return text

    def _stop_progress(self) -> str:
        """Which workers have not exited yet, and how many requests they run."""
        slots = self.shared.slots
        left = [
            f"worker {each.number} (pid {each.pid}, {slots[each.number].running} running)"
            for each in self.pool.workers
            if each.pid
        ]
        return "waiting for " + (", ".join(left) or "the master")


def _outcome(
    begin: Callable[[Request, OnDone], None], result: Callable[[], dict[str, Any]]
) -> Command:
    """A command that ends with the reason why it has failed, or else with `result`."""

    def command(connection: ControlConnection) -> None:
        def on_done(reason: str | None) -> None:
            if reason is not None:
                connection.fail(reason)
            else:
                connection.finish(result())

        begin(connection.request, on_done)

    return command


def numbers(status: dict[str, Any], settings: Settings, shared: Shared) -> dict[str, Any]:
    """All numbers as one object, for `cpanbridged metrics` and `cpanbridged top`."""
    counts = totals.count(shared)
    return {
        "status": status,
        "metrics": reports.numbers(shared, settings),
        "start_time": shared.header.started_at / 1e9,
        "limits": {each.kind.name.lower(): each.limit for each in totals.readings(shared)},
        "busy_seconds": counts.busy_ns / 1e9,
        # Not subtracted: the difference of two counters that are read one after the other may fall.
        "opened": sum(slot.accepted + slot.taken_over for slot in shared.used_slots),
        "taken_over": sum(slot.taken_over for slot in shared.used_slots),
        "rejected": counts.rejected,
        "security_events": counts.security_events,
        "functions": [
            {
                "name": each.name,
                "calls": each.calls,
                "failed": each.failed,
                "busy_seconds": each.busy_ns / 1e9,
            }
            for each in totals.functions(shared)
        ],
        "recent_errors": reports.recent_errors(shared),
    }


def _worker(worker: WorkerProcess, shared: Shared) -> dict[str, Any]:
    slot = shared.slots[worker.number]
    assert worker.generation is not None
    return {
        "worker": worker.number,
        "pid": worker.pid,
        "generation": worker.generation.number,
        "state": _state(worker),
        "title": _title(worker, slot.running),
        "why": worker.exiting or None,
        "connections": slot.connections,
        "running": slot.running,
        "requests": slot.finished,
    }


def _state(worker: WorkerProcess) -> str:
    if not worker.pid:
        return "waits for its next start"
    if worker.told:
        return "leaves"
    return "serves" if worker.ready else "boots"


def _title(worker: WorkerProcess, running: int) -> str:
    """What the worker is at, in a line; as its process title, which is renewed once a second."""
    assert worker.generation is not None
    name = f"worker {worker.number} gen {worker.generation.number}"
    if not worker.pid:
        return f"{name} {_state(worker)}: {worker.failure}"
    if not worker.ready:
        return f"{name} boots"
    return f"{name} busy {running}/{worker.generation.settings.thread_count}"
