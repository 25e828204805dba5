"""The daemon's numbers in Prometheus' text format: the output of `cpanbridged metrics`.

In base units (seconds, bytes, cores); totals are counters since the daemon's start. They stay when
workers are replaced, on a reload and on an upgrade. How long requests take is a summary: its sum
and count are since the start, its quantiles of the last five minutes, as the shared histogram has
them. Called in the command, with the master's numbers; the daemon never imports this.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import SummaryMetricFamily as Summary
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PREFIX = "cpanbridged_"
_MEGABYTE = 1 << 20
_PER_CENT = 0.01  # of a core

# Each family: its name, where its value is in `_values`, what it is.
_GAUGES = (
    ("start_time_seconds", "start_time", "When it started, Unix time."),
    ("generation", "status.generation", "Reloads since the start, and one."),
    ("workers", "workers_there", "Workers, including those that exit."),
    ("workers_wanted", "status.workers_wanted", "Workers of the current generation."),
    ("gate_open", "gate_open", "1; 0 while no request begins, because of memory or CPU."),
    ("waiting_clients", "gate.waiting_clients", "In the listen queue."),
    ("waiting_requests", "gate.waiting_requests", "Received, and waiting for room."),
    ("connections_open", "gate.connections", "Client connections."),
    ("connections_limit", "gate.max_connections", "limits.max_connections."),
    ("connections_peak", "connection_summary.peak_connections", "The highest value."),
    ("memory_bytes", "memory.now", "Of all processes; shared pages count once."),
    ("memory_limit_bytes", "memory.limit", "limits.max_memory_mb, or the cgroup's."),
    ("memory_peak_bytes", "memory.peak", "The highest value."),
    ("cpu_cores", "cpu.now", "Cores in use, by all processes."),
    ("cpu_limit_cores", "cpu.limit", "limits.max_cpu_percent."),
    ("cpu_peak_cores", "cpu.peak", "The highest value."),
    ("requests_running", "gate.running", "Requests that run now."),
    ("requests_running_limit", "gate.max_concurrent_requests", "limits.max_concurrent_requests."),
    ("requests_last_minute", "gate.admitted_last_minute", "Admitted within the last 60 s."),
    ("requests_last_minute_limit", "rate", "limits.max_requests_per_minute; +Inf without one."),
)
_OPENED = "Client connections; one that is handed over to another worker counts there again."
_RETIRED = "Workers replaced to give memory back."
_COUNTERS = (
    ("worker_deaths", "gate.worker_deaths", "Workers that ended by themselves."),
    ("workers_retired_for_memory", "gate.workers_retired_for_memory", _RETIRED),
    ("gate_closings", "gate.verdict_closings", "Times that the gate has closed."),
    ("connections_opened", "opened", _OPENED),
    ("connections_handed_over", "taken_over", "Those that count again."),
    ("connections_turned_away", "rejected", "Rejected with Overloaded."),
    ("requests_refused", "security_summary.requests_rejected", "Answered with an error, not run."),
    ("pings", "gate.pings", "Calls of test.ping, which are no requests."),
)
# With a label: its name stands last, and the value is a dictionary.
_COUNTERS_BY = (
    ("overloaded", "gate.overloaded", "Rejections with Overloaded, by what was full.", "reason"),
    ("alerts", "resource_status.alerts", "Violations that have begun, by limit.", "limit"),
    ("requests", "outcomes", "Requests that have run, by how they ended.", "outcome"),
    ("requests_waited", "waits", "Requests that had to wait, by what for.", "reason"),
    ("waited_seconds", "waited_seconds", "For how long, all together.", "reason"),
    ("security_events", "security_events", "Refused requests, by kind.", "event"),
)
# Of each worker: the field's unit stands last. Of each function.
_WORKER_GAUGES = (
    ("memory_bytes", "memory_mb", "With all that the worker has started.", _MEGABYTE),
    ("requests_running", "running", "Requests that run in it.", 1),
    ("connections_open", "connections", "Client connections that it has.", 1),
    ("sessions", "sessions", "Client processes that have state in it.", 1),
    ("generation", "generation", "The generation of the worker.", 1),
    ("uptime_seconds", "uptime_seconds", "Its age.", 1),
)
_WORKER_COUNTERS = (
    ("requests", "requests", "Requests that have run in this slot."),
    ("failures", "failed", "Of these, those that failed."),
)
_FUNCTION_COUNTERS = (
    ("calls", "calls", "Calls that have ended."),
    ("failures", "failed", "Of these, those that failed."),
    ("busy_seconds", "busy_seconds", "How long they took in total."),
)


def text(numbers: dict[str, Any]) -> str:
    """The numbers that the master sends, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Numbers(numbers))
    return generate_latest(registry).decode()


class _Numbers(Collector):
    def __init__(self, numbers: dict[str, Any]) -> None:
        self._values = _values(numbers)

    def collect(self) -> Iterator[Metric]:
        values = self._values
        version = [([values["status"]["version"]], 1)]
        yield _family(Gauge, "info", "1; the label says what runs.", ["version"], version)
        for kind, table in ((Gauge, _GAUGES), (Counter, _COUNTERS)):
            for name, path, help_text in table:
                yield kind(_PREFIX + name, help_text, value=_at(values, path))
        for name, path, help_text, label in _COUNTERS_BY:
            samples = [([each], value) for each, value in _at(values, path).items()]
            yield _family(Counter, name, help_text, [label], samples)
        yield _durations(values["performance_metrics"], values["busy_seconds"])
        # A slot without a worker keeps its totals, so that no counter disappears.
        slots = values["workers"]
        for name, field, help_text, unit in _WORKER_GAUGES:
            samples = [([str(s["worker"])], s[field] * unit) for s in slots if s["pid"]]
            yield _family(Gauge, f"worker_{name}", help_text, ["worker"], samples)
        for name, field, help_text in _WORKER_COUNTERS:
            samples = [([str(each["worker"])], each[field]) for each in slots]
            yield _family(Counter, f"worker_{name}", help_text, ["worker"], samples)
        for name, field, help_text in _FUNCTION_COUNTERS:
            samples = [(f["name"].partition(".")[::2], f[field]) for f in values["functions"]]
            yield _family(Counter, f"function_{name}", help_text, ["module", "function"], samples)


def _values(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers and, at the same level, the metrics among them; some in other units."""
    metrics, limits = numbers["metrics"], numbers["limits"]
    load, gate = metrics["resource_status"], metrics["gate"]
    counts = metrics["performance_metrics"]
    memory = {"now": load["memory_mb"], "limit": limits["memory"], "peak": load["peak_memory"]}
    cpu = {"now": load["cpu_percent"], "limit": limits["cpu"], "peak": load["peak_cpu"]}
    return {
        **metrics,
        **numbers,
        "workers_there": sum(each["pid"] != 0 for each in metrics["workers"]),
        "gate_open": gate["verdict"] == "open",
        "rate": gate["max_requests_per_minute"] or math.inf,  # so that a share of it is 0
        "outcomes": {
            "succeeded": counts["successful_requests"],
            "failed": counts["failed_requests"],
        },
        "waits": {reason: each["count"] for reason, each in gate["waited"].items()},
        "waited_seconds": {reason: each["seconds"] for reason, each in gate["waited"].items()},
        "memory": {name: value * _MEGABYTE for name, value in memory.items()},
        "cpu": {name: value * _PER_CENT for name, value in cpu.items()},
    }


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values


def _family(
    kind: type[Gauge] | type[Counter],
    name: str,
    help_text: str,
    labels: Sequence[str],
    samples: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    """`samples` are the labels' values, and a number for these."""
    family = kind(_PREFIX + name, help_text, labels=labels)
    for label_values, number in samples:
        family.add_metric(label_values, number)
    return family


def _durations(counts: dict[str, Any], busy_seconds: float) -> Metric:
    name = _PREFIX + "request_duration_seconds"
    family = Summary(
        name,
        "How long requests ran: quantiles of the last five minutes, NaN without any.",
        count_value=counts["total_requests"],
        sum_value=busy_seconds,
    )
    for percent in (50, 95, 99):
        seconds = counts[f"p{percent}_response_time"]
        value = seconds if counts["requests_last_5_minutes"] else math.nan
        family.add_sample(name, {"quantile": str(percent / 100)}, value)
    return family
