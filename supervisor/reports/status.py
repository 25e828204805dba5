"""The daemon's state for `cpanbridged status`, and the progress of what a command waits for.

It is read from the master's objects and from the shared memory. Called in the master; `load_lines`
and `when` in the command.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

from cpanbridge.supervisor.lifecycle.reload import Reloader
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.generation import Generation
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.templates import Template
from cpanbridge.supervisor.processes.worker_process import WorkerProcess
from cpanbridge.supervisor.reports import reports, totals
from cpanbridge.supervisor.version import __version__


def status(state: str, reloader: Reloader, pool: WorkerPool, shared: Shared) -> dict[str, Any]:
    """The daemon as one object."""
    last, workers = reloader.last, pool.workers
    counts, per_minute = totals.count(shared), shared.admitted_in_window()
    return {
        "state": state,
        "pid": os.getpid(),
        "version": __version__,
        "uptime_seconds": shared.uptime,
        "configuration": reloader.loaded.source,
        "log_file": reloader.loaded.settings.log_file,
        "sockets": [each.path for each in reloader.generation.listeners],
        "generation": reloader.generation.number,
        "workers_wanted": reloader.generation.wanted,
        "workers": [_worker(worker, shared) for worker in workers if worker.generation is not None],
        "templates": [_template(each) for each in pool.templates.alive],
        "worker_deaths": shared.header.deaths,
        "resource_status": reports.resource_status(shared, counts, per_minute),
        "gate": reports.gate(shared, reloader.loaded.settings, counts, per_minute),
        "last_reload": last._asdict() if last is not None else None,
    }


def load_lines(gate: dict[str, Any], load: dict[str, Any]) -> list[str]:
    """The load in a few lines, from the parts `gate` and `resource_status` of the status."""
    minute = gate["max_requests_per_minute"]
    lines = [
        f"gate {gate['verdict']} for {gate['verdict_seconds']:.0f} s: "
        f"{gate['connections']} of {gate['max_connections']} connections, "
        f"{gate['running']} of {gate['max_concurrent_requests']} requests running, "
        f"{gate['admitted_last_minute']}{f' of {minute}' if minute else ''} in the last minute",
        f"memory {load['memory_mb']:.1f}MB, CPU {load['cpu_percent']:.1f}% "
        f"(peaks {load['peak_memory']:.1f}MB, {load['peak_cpu']:.1f}%)",
    ]
    waiting = gate["waiting_clients"] + gate["waiting_requests"]
    if waiting:
        lines.append(f"{waiting} clients wait for room")
    return [*lines, *load["violations"], *load["warnings"]]


def _worker(worker: WorkerProcess, shared: Shared) -> dict[str, Any]:
    slot = shared.slots[worker.number]
    assert worker.generation is not None
    return {
        "worker": worker.number,
        "pid": worker.pid,
        "generation": worker.generation.number,
        "state": _state(worker),
        "why": worker.exiting or None,
        "connections": slot.connections,
        "running": slot.running,
        "requests": slot.finished,
    }


def _template(template: Template) -> dict[str, Any]:
    return {
        "pid": template.pid,
        "generation": template.generation.number,
        "state": template.state,
    }


def _state(worker: WorkerProcess) -> str:
    if not worker.pid:
        return "waits for its next start"
    if worker.told:
        return "leaves"
    return "serves" if worker.ready else "boots"


def boot_progress(generation: Generation, pool: WorkerPool) -> str:
    """What the boot of a generation waits for: its template, or some of its workers."""
    template, workers = pool.templates.of(generation), pool.workers
    if template is not None and template.imports:
        return f"the template (pid {template.pid}) imports the modules"
    own = [worker for worker in workers if worker.generation is generation and not worker.exiting]
    missing = [worker for worker in own if not worker.ready]
    text = f"{len(own) - len(missing)} of {generation.wanted} workers ready"
    if missing:
        names = ", ".join(f"{worker.number} (pid {worker.pid})" for worker in missing)
        text += f", waiting for worker {names}"
    return text


def stop_progress(workers: Sequence[WorkerProcess], shared: Shared) -> str:
    """Which workers have not exited yet, and how many requests they run."""
    left = [
        f"worker {worker.number} (pid {worker.pid}, {shared.slots[worker.number].running} running)"
        for worker in workers
        if worker.pid
    ]
    return "waiting for " + (", ".join(left) or "the master")


def when(unix_seconds: float) -> str:
    """A time in the log's format."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
