"""The daemon's health: a status for monitoring systems, and the reasons for it.

Each check passes, warns or fails; a warning makes the daemon degraded, a failure unhealthy. Called
in a worker's client thread.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.fields import GATE_OPEN
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import CLOSING, Kind, Level, Reading
from cpanbridge.supervisor.reports import reports, totals
from cpanbridge.supervisor.reports.times import iso_time
from cpanbridge.supervisor.wording import count_of

PASS, WARN, FAIL = "pass", "warn", "fail"
MOST_FUNCTIONS = 10
DEATHS_SECONDS = 300.0
DEATHS_WARNING = 3  # fewer may be accidents
ERROR_RATE_WARNING = 0.1  # of the last five minutes' requests; some errors are normal
FEWEST_FOR_A_RATE = 20
SAMPLES_MISSED = 5  # so many in a row: something holds the master up

_NAMES = {
    Kind.MEMORY: "memory",
    Kind.CPU: "cpu",
    Kind.REQUESTS: "request_rate",
    Kind.CONCURRENT: "concurrency",
    Kind.CONNECTIONS: "connections",
    Kind.CGROUP_MEMORY: "cgroup_memory",
}
_ADVICE = {
    "memory": "See which worker holds it (system.metrics, workers), or raise limits.max_memory_mb",
    "cgroup_memory": "Give the cgroup more memory (system.info), or end what else is in it",
    "cpu": "See which functions take long (module_performance), or raise limits.max_cpu_percent",
    "request_rate": "Raise limits.max_requests_per_minute, or let clients send less",
    "concurrency": "Raise limits.max_concurrent_requests, or make slow functions faster",
    "connections": "Raise limits.max_connections, or let clients close what they do not use",
    "gate": "It opens by itself; see the memory and cpu checks",
    "workers": "See the log for why workers end",
    "errors": "See recent_errors",
    "monitor": "The master is stopped, or the machine is overloaded",
}


class Check(NamedTuple):
    """The result of one check."""

    status: str  # PASS, WARN or FAIL
    message: str
    details: dict[str, Any]


def health(shared: Shared, settings: Settings) -> dict[str, Any]:
    """`system.health`."""
    checks = _checks(shared, settings)
    now = time.time()
    return {
        "timestamp": now,
        "timestamp_iso": iso_time(now),
        "overall_status": _overall(checks),
        "checks": {name: check._asdict() for name, check in checks.items()},
        "warnings": [check.message for check in checks.values() if check.status == WARN],
        "errors": [check.message for check in checks.values() if check.status == FAIL],
    }


def performance(shared: Shared, settings: Settings) -> dict[str, Any]:
    """`system.performance`: which functions take the time, and what goes wrong."""
    checks = _checks(shared, settings)
    concerns = {name: check for name, check in checks.items() if check.status != PASS}
    functions = sorted(totals.functions(shared), key=lambda each: each.calls, reverse=True)
    return {
        "performance_metrics": reports.performance_metrics(shared, totals.count(shared)),
        "module_performance": {
            "top_modules": [
                {
                    "module_function": function.name,
                    "requests": function.calls,
                    "avg_time_ms": function.busy_ns / function.calls / 1e6,
                    "error_rate": function.failed / function.calls,
                    "error_percent": 100 * function.failed / function.calls,
                }
                for function in functions[:MOST_FUNCTIONS]
            ],
            "total_modules": len({function.name.partition(".")[0] for function in functions}),
        },
        "recent_errors": reports.recent_errors(shared),
        "health_indicators": {
            "overall_health": _overall(checks),
            "concerns": [check.message for check in concerns.values()],
            "recommendations": [_ADVICE[name] for name in concerns],
        },
    }


def _overall(checks: Mapping[str, Check]) -> str:
    statuses = {check.status for check in checks.values()}
    return "unhealthy" if FAIL in statuses else "degraded" if WARN in statuses else "healthy"


def _checks(shared: Shared, settings: Settings) -> dict[str, Check]:
    readings = {_NAMES[reading.kind]: reading for reading in totals.readings(shared)}
    return {
        **{name: _of_reading(name, reading) for name, reading in readings.items()},
        "gate": _of_gate(shared),
        "workers": _of_workers(shared, settings),
        "errors": _of_errors(shared),
        "monitor": _of_monitor(shared, settings),
    }


def _of_reading(name: str, reading: Reading) -> Check:
    details = {"value": reading.value, "limit": reading.limit}
    if reading.level is Level.NORMAL:
        return Check(PASS, f"{name}: fine", details)
    over = reading.level is Level.VIOLATION and reading.kind in CLOSING
    return Check(FAIL if over else WARN, str(reading), details)


def _of_gate(shared: Shared) -> Check:
    header = shared.header
    details = {"closings": header.closings, "waiting_clients": header.backlog}
    if header.overload_state == GATE_OPEN:
        return Check(PASS, "gate: open", details)
    return Check(FAIL, "The gate is closed, clients wait", details)


def _of_workers(shared: Shared, settings: Settings) -> Check:
    running = sum(slot.pid != 0 for slot in shared.used_slots)
    wanted = settings.worker_count
    recent = shared.deaths_within(DEATHS_SECONDS)
    details = {
        "workers": running,
        "wanted": wanted,
        "deaths": shared.header.deaths,
        "deaths_last_5_minutes": recent,
    }
    if running < wanted:
        text = f"Only {running} of {count_of(wanted, 'worker')} {'is' if wanted == 1 else 'are'}"
        return Check(WARN, f"{text} running", details)
    if recent >= DEATHS_WARNING:
        text = f"{count_of(recent, 'worker')} died in the last five minutes; the log says of what"
        return Check(WARN, text, details)
    return Check(PASS, "workers: all running", details)


def _of_errors(shared: Shared) -> Check:
    latencies = totals.latencies(shared)
    rate = latencies.error_rate
    details = {"requests": latencies.requests, "failed": latencies.failed, "error_rate": rate}
    if rate > ERROR_RATE_WARNING and latencies.requests >= FEWEST_FOR_A_RATE:
        return Check(WARN, f"{rate:.0%} of the last five minutes' requests failed", details)
    return Check(PASS, "errors: few", details)


def _of_monitor(shared: Shared, settings: Settings) -> Check:
    header = shared.header
    now = time.monotonic_ns()
    age = (now - (header.sampled_at or header.started_monotonic)) / 1e9
    late = (now - (header.sample_due or header.started_monotonic)) / 1e9
    details = {"seconds_since_sample": age, "seconds_late": max(0.0, late)}
    if late > SAMPLES_MISSED * max(1.0, settings.limits.sample_interval):
        return Check(FAIL, f"Memory and CPU were last measured {age:.0f} s ago", details)
    return Check(PASS, "monitor: samples regularly", details)
