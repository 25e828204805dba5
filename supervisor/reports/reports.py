"""The reports of `system.*`, from the shared memory: the same in whichever worker a call runs.

Each report is a plain dictionary with the field names that clients rely on. Times are Unix seconds
and durations seconds, unless a field's name says otherwise. Where a field means something else than
in the first daemon (docs/migration.md), another one stands beside it. Health and performance are in
`health.py`, connections in `connections.py`. Called in a worker's client thread, some also in the
master.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import psutil

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.event_ring import Event, EventRing
from cpanbridge.supervisor.memory.fields import (
    CONNECTIONS,
    GATE_OPEN,
    OVERLOAD,
    THREADS,
    WAITS_FOR_NOTHING,
)
from cpanbridge.supervisor.memory.layout import Shared, Statistics
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind, Level, at_level
from cpanbridge.supervisor.reports import surroundings, totals
from cpanbridge.supervisor.reports.connections import stale_connections
from cpanbridge.supervisor.reports.times import age, iso_time, wall_time
from cpanbridge.supervisor.reports.totals import Totals
from cpanbridge.supervisor.system.log_text import format_duration
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.wording import count_of

RECENT = 20  # errors or events, of all workers together


def metrics(shared: Shared, settings: Settings, modules: Sequence[str]) -> dict[str, Any]:
    """`system.metrics`: all numbers of the whole daemon."""
    status = {
        "loaded_modules": list(modules),
        "loaded_modules_count": len(modules),
        "available_modules": list(modules),
    }
    return {**numbers(shared, settings), "module_status": status}


def numbers(shared: Shared, settings: Settings) -> dict[str, Any]:
    """The part from the shared memory: all but the modules, which only a worker knows."""
    counts = totals.count(shared)
    uptime = shared.uptime
    now = time.time()
    return {
        "timestamp": now,
        "timestamp_iso": iso_time(now),
        "daemon_info": {
            "version": __version__,
            "uptime_seconds": uptime,
            "uptime_formatted": format_duration(uptime),
        },
        "resource_status": resource_status(shared, counts),
        "performance_metrics": performance_metrics(shared, counts),
        "security_summary": {
            "total_security_events": sum(counts.security_events.values()),
            "validation_failures": counts.security_events["invalid_request"],
            "requests_rejected": counts.refused,
        },
        "connection_summary": {
            "total_connections": counts.accepted,
            "current_connections": counts.connections,
            "active_connections": counts.connections,
            "stale_connections": len(stale_connections(shared, settings)),
            "peak_connections": shared.header.peak_connections,
        },
        "system_stats": {**_system_stats(shared), **_counted(shared, counts)},
        "workers": workers(shared),
        "gate": gate(shared, settings, counts),
    }


def resource_status(shared: Shared, counts: Totals) -> dict[str, Any]:
    """The load of the whole tree of processes, and which limits it is near or over."""
    header = shared.header
    readings = totals.readings(shared)
    return {
        "memory_mb": header.values[Kind.MEMORY] / SCALE,
        "memory_limit": totals.memory_limit(shared),
        "cpu_percent": header.values[Kind.CPU] / SCALE,
        "requests_per_minute": counts.admitted_last_minute,
        "concurrent_requests": counts.running,
        "violations": at_level(readings, Level.VIOLATION),
        "warnings": at_level(readings, Level.WARNING),
        "peak_memory": header.peak_memory / MEGABYTE,
        "peak_cpu": header.peak_cpu / SCALE,
        "alerts": {kind.name.lower(): header.alerts[kind] for kind in Kind},
    }


def performance_metrics(shared: Shared, counts: Totals) -> dict[str, Any]:
    """Totals, averages and rates since the start; percentiles over the last five minutes."""
    uptime = shared.uptime
    latencies = totals.latencies(shared)
    return {
        "total_requests": counts.finished,
        "successful_requests": counts.succeeded,
        "failed_requests": counts.failed,
        "avg_response_time": counts.average_seconds,
        "p50_response_time": latencies.percentile(50),
        "p95_response_time": latencies.percentile(95),
        "p99_response_time": latencies.percentile(99),
        "requests_per_second": counts.finished / uptime if uptime else 0.0,
        "error_rate": counts.error_rate,
        "requests_last_5_minutes": latencies.requests,
        "requests_per_second_last_minute": counts.admitted_last_minute / 60,
        "avg_response_time_last_5_minutes": latencies.average_seconds,
        "error_rate_last_5_minutes": latencies.error_rate,
        "uptime_seconds": uptime,
    }


def _system_stats(shared: Shared) -> dict[str, Any]:
    """The tree of processes, and the machine that it runs on."""
    memory = psutil.virtual_memory()
    return {
        "processes": shared.header.processes,
        "processes_measured_by_rss": shared.header.processes_by_rss,
        "cpu_count": len(os.sched_getaffinity(0)),
        "load_average": list(os.getloadavg()),
        "memory_total_mb": memory.total / MEGABYTE,
        "memory_available_mb": memory.available / MEGABYTE,
    }


def workers(shared: Shared) -> list[dict[str, Any]]:
    """The worker in each slot that has one, or has had one."""
    names, stats_of = shared.names.all(), shared.statistics
    return [
        {
            "worker": number,
            "pid": slot.pid,
            "generation": slot.generation,
            "uptime_seconds": age(slot.since) if slot.pid else 0.0,
            "memory_mb": slot.memory / MEGABYTE,
            "connections": slot.connections,
            "taken_over": slot.taken_over,
            "sessions": slot.sessions,
            "running": slot.running,
            "requests": slot.finished,
            "failed": slot.failed,
            "recent_functions": stats_of[number].function_stats.latest(names, slot.since, 5),
        }
        for number, slot in enumerate(shared.used_slots)
    ]


def gate(shared: Shared, settings: Settings, counts: Totals) -> dict[str, Any]:
    """What is accepted and admitted, what waits, and for what."""
    header = shared.header
    return {
        "verdict": "open" if header.overload_state == GATE_OPEN else "closed",
        "verdict_seconds": age(header.changed_at or header.started_monotonic),
        "verdict_closings": header.closings,
        "overload": settings.overload,
        "connections": counts.connections,
        "max_connections": header.max_connections,
        "running": counts.running,
        "max_concurrent_requests": header.max_concurrent_requests,
        "admitted_last_minute": counts.admitted_last_minute,
        "max_requests_per_minute": shared.window.limit,
        "waiting_clients": header.backlog,
        "waiting_doors": sum(s.accept_waits_for != WAITS_FOR_NOTHING for s in shared.used_slots),
        "waiting_requests": counts.queued,
        "waited": _waited(shared, counts),
        "pings": counts.pings,
        "overloaded": {
            _public(reason): count
            for reason, count in counts.overloaded.items()
            if reason != THREADS  # nobody is turned away for want of a thread
        },
        "worker_deaths": header.deaths,
        "workers_retired_for_memory": header.retired,
    }


def _public(reason: str) -> str:
    return "verdict" if reason == OVERLOAD else reason  # as it was called at first


def _waited(shared: Shared, counts: Totals) -> dict[str, dict[str, Any]]:
    """Requests that have waited, and how long: since the start, and in the last five minutes."""
    return {
        _public(reason): {
            "count": counts.waits[reason],
            "seconds": counts.waited_ns[reason] / 1e9,
            "p50": latencies.percentile(50),
            "p99": latencies.percentile(99),
        }
        for reason, latencies in totals.waits(shared).items()
        if reason != CONNECTIONS  # such a client has sent no request yet
    }


def info(shared: Shared, settings: Settings, modules: Sequence[str]) -> dict[str, Any]:
    """`system.info`: what runs here, where, and how it is configured."""
    limits = settings.limits
    by_rss = shared.header.processes_by_rss
    by_rss_of = count_of(by_rss, "process", "processes")
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
        "memory_limit": totals.memory_limit(shared),
        **surroundings.found(),
        "memory_measure": f"pss, and rss of {by_rss_of}" if by_rss else "pss",
        "configuration": {
            "workers": settings.worker_count,
            "threads": settings.thread_count,
            "overload": settings.overload,
            "connection_timeout": limits.idle_timeout,
            **msgspec.structs.asdict(limits),
        },
    }


def stats(shared: Shared, settings: Settings) -> dict[str, Any]:
    """`system.stats`: what was counted since the start."""
    counts = totals.count(shared)
    limits = settings.limits
    return {
        **_counted(shared, counts),
        "security_metrics": {
            "total_events": sum(counts.security_events.values()),
            "events_by_type": counts.security_events,
            "recent_events": recent_events(shared),
        },
        "performance_summary": performance_metrics(shared, counts),
        "resource_status": resource_status(shared, counts),
        "validation_config": {
            "strict_mode": True,  # an invalid request is refused, never altered
            "max_string_length": limits.max_string_length,
            "max_array_length": limits.max_array_length,
            "max_object_depth": limits.max_object_depth,
            "max_param_count": limits.max_param_count,
        },
    }


def counted(shared: Shared) -> dict[str, Any]:
    """The daemon's totals in `test.ping`."""
    return _counted(shared, totals.count(shared))


def _counted(shared: Shared, counts: Totals) -> dict[str, Any]:
    header = shared.header
    return {
        "requests_processed": counts.finished,
        "requests_succeeded": counts.succeeded,
        "requests_failed": counts.failed,
        "requests_rejected": counts.refused,
        "validation_failures": counts.security_events["invalid_request"],
        "security_events": sum(counts.security_events.values()),
        "connections_total": counts.accepted,
        "connections_rejected": counts.rejected,
        "peak_connections": header.peak_connections,
        "start_time": header.started_at / 1e9,
        "last_cleanup": wall_time(header.cleanup_at) if header.cleanup_at else None,
        "last_resource_check": wall_time(header.checked_at) if header.checked_at else None,
    }


def recent_events(shared: Shared) -> list[dict[str, Any]]:
    """The last security events, the newest first."""
    found = []
    for event in _newest(shared, lambda each: each.events):
        kind, _, message = event.text.partition("\n")
        pid, uid, at = event.first, event.second, event.at / 1e9
        found.append(
            {
                "timestamp": at,
                "timestamp_iso": iso_time(at),
                "event": kind,
                "event_type": kind,
                "message": message,
                "pid": pid,
                "uid": uid,
                "client_info": f"pid {pid}, uid {uid}",
            }
        )
    return found


def recent_errors(shared: Shared) -> list[dict[str, Any]]:
    """The last requests that failed, the newest first."""
    events = _newest(shared, lambda each: each.errors)
    return [
        {
            "timestamp": event.at / 1e9,
            "module_function": shared.names.of(event.second),
            "error": event.text,
            "duration_ms": event.first / 1e6,
        }
        for event in events
    ]


def _newest(shared: Shared, ring_of: Callable[[Statistics], EventRing]) -> list[Event]:
    events = [event for each in totals.statistics(shared) for event in ring_of(each).read()]
    return sorted(events, reverse=True)[:RECENT]
