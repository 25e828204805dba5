"""What the master says of its daemon's state: for `cpanbridged status`, and while one waits.

All of it is read from what the master knows and from the shared memory. Called in the master.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

from cpanbridge.supervisor.reload import Reloader
from cpanbridge.supervisor.seats import Generation, Seat
from cpanbridge.supervisor.shared import VERDICT_OPEN, Shared
from cpanbridge.supervisor.version import __version__


def status(state: str, reloader: Reloader, seats: Sequence[Seat], shared: Shared) -> dict[str, Any]:
    """The daemon as one object."""
    last = reloader.last
    header = shared.header
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
        "workers": [_worker(seat, shared) for seat in seats if seat.generation is not None],
        "worker_deaths": header.deaths,
        "gate": {
            "verdict": "open" if header.verdict == VERDICT_OPEN else "closed",
            "connections": shared.connections(),
            "max_connections": header.max_connections,
            "running": shared.running(),
            "max_concurrent_requests": header.max_concurrent_requests,
            "admitted_last_minute": shared.admitted_in_window(),
            "max_requests_per_minute": shared.window.limit,
        },
        "last_reload": last._asdict() if last is not None else None,
    }


def _worker(seat: Seat, shared: Shared) -> dict[str, Any]:
    slot = shared.slots[seat.number]
    assert seat.generation is not None
    return {
        "worker": seat.number,
        "pid": seat.pid,
        "generation": seat.generation.number,
        "state": _state(seat),
        "why": seat.leaving or None,
        "connections": slot.connections,
        "running": slot.running,
        "requests": slot.finished,
    }


def _state(seat: Seat) -> str:
    if not seat.pid:
        return "waits for its next start"
    if seat.told:
        return "leaves"
    return "serves" if seat.ready else "boots"


def boot_progress(generation: Generation, seats: Sequence[Seat]) -> str:
    """Which workers of a generation are waited for."""
    staff = [seat for seat in seats if seat.generation is generation and not seat.leaving]
    missing = [seat for seat in staff if not seat.ready]
    text = f"{len(staff) - len(missing)} of {generation.wanted} workers ready"
    if missing:
        names = ", ".join(f"{seat.number} (pid {seat.pid})" for seat in missing)
        text += f", waiting for worker {names}"
    return text


def stop_progress(seats: Sequence[Seat], shared: Shared) -> str:
    """Which workers have not left yet, and what keeps them."""
    left = [
        f"worker {seat.number} (pid {seat.pid}, {shared.slots[seat.number].running} running)"
        for seat in seats
        if seat.pid
    ]
    return "waiting for " + (", ".join(left) or "the master")


def when(unix_seconds: float) -> str:
    """A time as the log writes it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))
