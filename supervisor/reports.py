"""What the daemon says of itself, out of the shared memory: the same from whichever worker answers.

Each report is a plain dictionary with the field names that clients rely on. Times are Unix seconds
and durations seconds, unless a field's name says otherwise.
"""

import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.shared import VERDICT_OPEN, WAITS_FOR_NOTHING, Shared
from cpanbridge.supervisor.version import __version__


def metrics(shared: Shared, settings: Settings, modules: Sequence[str]) -> dict[str, Any]:
    """`system.metrics`: what is known of the whole daemon."""
    limits = settings.limits
    finished = sum(slot.finished for slot in shared.used_slots)
    failed = sum(slot.failed for slot in shared.used_slots)
    busy_ns = sum(slot.busy_ns for slot in shared.used_slots)
    uptime = shared.uptime
    running = shared.running()
    connections = shared.connections()
    return {
        "timestamp": time.time(),
        "daemon_info": {
            "version": __version__,
            "uptime_seconds": uptime,
            "uptime_formatted": format_duration(uptime),
        },
        "resource_status": {
            "requests_per_minute": shared.admitted_in_window(),
            "concurrent_requests": running,
        },
        "performance_metrics": {
            "total_requests": finished,
            "successful_requests": sum(slot.succeeded for slot in shared.used_slots),
            "failed_requests": failed,
            "avg_response_time": busy_ns / finished / 1e9 if finished else 0.0,
            "requests_per_second": finished / uptime if uptime else 0.0,
            "error_rate": failed / finished if finished else 0.0,
        },
        "security_summary": {
            "total_security_events": sum(slot.security_events for slot in shared.used_slots),
            "validation_failures": sum(slot.invalid for slot in shared.used_slots),
            "requests_rejected": sum(slot.refused for slot in shared.used_slots),
        },
        "connection_summary": {
            "total_connections": sum(slot.opened for slot in shared.used_slots),
            "active_connections": connections,
            "peak_connections": shared.header.peak_connections,
        },
        "module_status": {
            "loaded_modules": list(modules),
            "available_modules": list(modules),
        },
        "workers": [
            {
                "worker": number,
                "pid": slot.pid,
                "generation": slot.generation,
                "connections": slot.connections,
                "running": slot.running,
                "requests": slot.finished,
            }
            for number, slot in enumerate(shared.used_slots)
        ],
        "gate": {
            "verdict": "open" if shared.header.verdict == VERDICT_OPEN else "closed",
            "connections": connections,
            "max_connections": limits.max_connections,
            "running": running,
            "max_concurrent_requests": limits.max_concurrent_requests,
            "admitted_last_minute": shared.admitted_in_window(),
            "max_requests_per_minute": limits.max_requests_per_minute,
            "waiting_doors": sum(
                slot.door_waits_for != WAITS_FOR_NOTHING for slot in shared.used_slots
            ),
            "waiting_requests": sum(slot.queued for slot in shared.used_slots),
            "worker_deaths": shared.header.deaths,
        },
    }


def info(shared: Shared, settings: Settings, modules: Sequence[str]) -> dict[str, Any]:
    """`system.info`: what runs here, where, and how it is configured."""
    limits = settings.limits
    return {
        "daemon_version": __version__,
        "python_version": platform.python_version(),
        "python_executable": sys.executable,
        "platform": platform.platform(),
        "working_directory": os.getcwd(),
        "socket_path": settings.sockets[0],
        "socket_paths": settings.sockets,
        "uptime": shared.uptime,
        "loaded_modules": list(modules),
        "active_connections": shared.connections(),
        "configuration": {
            "workers": settings.worker_count,
            "threads": settings.thread_count,
            "max_connections": limits.max_connections,
            "max_concurrent_requests": limits.max_concurrent_requests,
            "max_requests_per_minute": limits.max_requests_per_minute,
            "max_request_size": limits.max_request_size,
            "max_object_depth": limits.max_object_depth,
            "connection_timeout": limits.idle_timeout,
            "read_timeout": limits.read_timeout,
            "cleanup_interval": limits.cleanup_interval,
        },
    }


def counts(shared: Shared) -> dict[str, Any]:
    """The daemon's totals, as `test.ping` tells them."""
    return {
        "requests_processed": sum(slot.finished for slot in shared.used_slots),
        "requests_failed": sum(slot.failed for slot in shared.used_slots),
        "requests_rejected": sum(slot.refused for slot in shared.used_slots),
        "connections_total": sum(slot.opened for slot in shared.used_slots),
        "peak_connections": shared.header.peak_connections,
        "start_time": shared.header.started_at / 1e9,
    }


def format_duration(seconds: float) -> str:
    """Whole hours, minutes and seconds, such as `24h 0m 0s`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}h {minute}m {second}s"
