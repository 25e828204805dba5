"""The daemon's numbers in Prometheus' text format: the output of `cpanbridged metrics`.

In base units (seconds, bytes, cores); totals are counters since the daemon's start. They stay when
workers are replaced, on a reload and on an upgrade. How long requests take is a summary: its sum
and count are since the start, its quantiles of the last five minutes, as the shared histogram has
them. Called in the command, with the master's numbers; the daemon never imports this.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PREFIX = "cpanbridged_"
_MEGABYTE = 1 << 20
_PER_CENT = 0.01  # of a core


def text(numbers: dict[str, Any]) -> str:
    """The object of `numbers.numbers` in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Numbers(numbers))
    return generate_latest(registry).decode()


class _Numbers(Collector):
    def __init__(self, numbers: dict[str, Any]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        numbers = self._numbers
        yield from _daemon(numbers)
        yield from _gate(numbers)
        yield from _load(numbers)
        yield from _requests(numbers)
        yield from _workers(numbers["metrics"]["workers"])
        yield from _functions(numbers["functions"])


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, help_text, value=value)


def _counters(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, help_text, labels=[label])
    for each, value in values.items():
        family.add_metric([each], value)
    return family


def _limit(value: float) -> float:
    """No limit is +Inf, so that a share of it is 0."""
    return value or math.inf


def _daemon(numbers: dict[str, Any]) -> Iterator[Metric]:
    status, gate = numbers["status"], numbers["metrics"]["gate"]
    info = GaugeMetricFamily(_PREFIX + "info", "1; the label says what runs.", labels=["version"])
    info.add_metric([status["version"]], 1)
    yield info
    yield _gauge("start_time_seconds", "When it started, Unix time.", numbers["start_time"])
    yield _gauge("generation", "Reloads since the start, and one.", status["generation"])
    there = sum(each["pid"] != 0 for each in numbers["metrics"]["workers"])
    yield _gauge("workers", "Workers, including those that exit.", there)
    yield _gauge("workers_wanted", "Workers of the current generation.", status["workers_wanted"])
    yield _counter("worker_deaths", "Workers that ended by themselves.", gate["worker_deaths"])
    yield _counter(
        "workers_retired_for_memory",
        "Workers replaced to give memory back.",
        gate["workers_retired_for_memory"],
    )


def _gate(numbers: dict[str, Any]) -> Iterator[Metric]:
    gate, connections = numbers["metrics"]["gate"], numbers["metrics"]["connection_summary"]
    yield _gauge(
        "gate_open",
        "1; 0 while no request begins, because of memory or CPU.",
        gate["verdict"] == "open",
    )
    yield _counter("gate_closings", "Times that the gate has closed.", gate["verdict_closings"])
    yield _gauge("waiting_clients", "In the listen queue.", gate["waiting_clients"])
    yield _gauge("waiting_requests", "Received, and waiting for room.", gate["waiting_requests"])
    yield _gauge("connections_open", "Client connections.", gate["connections"])
    yield _gauge("connections_limit", "limits.max_connections.", gate["max_connections"])
    yield _gauge("connections_peak", "The highest value.", connections["peak_connections"])
    yield _counter(
        "connections_opened",
        "Client connections; one that is handed over to another worker counts there again.",
        numbers["opened"],
    )
    yield _counter("connections_handed_over", "Those that count again.", numbers["taken_over"])
    yield _counter(
        "connections_turned_away",
        "Rejected with Overloaded.",
        numbers["rejected"],
    )
    yield _counters(
        "overloaded", "Rejections with Overloaded, by what was full.", "reason", gate["overloaded"]
    )


def _load(numbers: dict[str, Any]) -> Iterator[Metric]:
    load, limits = numbers["metrics"]["resource_status"], numbers["limits"]
    yield _gauge(
        "memory_bytes", "Of all processes; shared pages count once.", load["memory_mb"] * _MEGABYTE
    )
    yield _gauge("memory_limit_bytes", "limits.max_memory_mb.", limits["memory"] * _MEGABYTE)
    yield _gauge("memory_peak_bytes", "The highest value.", load["peak_memory"] * _MEGABYTE)
    yield _gauge("cpu_cores", "Cores in use, by all processes.", load["cpu_percent"] * _PER_CENT)
    yield _gauge("cpu_limit_cores", "limits.max_cpu_percent.", limits["cpu"] * _PER_CENT)
    yield _gauge("cpu_peak_cores", "The highest value.", load["peak_cpu"] * _PER_CENT)
    yield _counters("alerts", "Violations that have begun, by limit.", "limit", load["alerts"])


def _requests(numbers: dict[str, Any]) -> Iterator[Metric]:
    gate, security = numbers["metrics"]["gate"], numbers["metrics"]["security_summary"]
    counts = numbers["metrics"]["performance_metrics"]
    yield _counters(
        "requests",
        "Requests that have run, by how they ended.",
        "outcome",
        {"succeeded": counts["successful_requests"], "failed": counts["failed_requests"]},
    )
    yield _counter(
        "requests_refused", "Answered with an error, not run.", security["requests_rejected"]
    )
    yield _gauge("requests_running", "Requests that run now.", gate["running"])
    yield _gauge(
        "requests_running_limit",
        "limits.max_concurrent_requests.",
        gate["max_concurrent_requests"],
    )
    yield _gauge(
        "requests_last_minute", "Admitted within the last 60 s.", gate["admitted_last_minute"]
    )
    yield _gauge(
        "requests_last_minute_limit",
        "limits.max_requests_per_minute; +Inf without one.",
        _limit(gate["max_requests_per_minute"]),
    )
    yield _durations(counts, numbers["busy_seconds"])
    yield _counters(
        "security_events",
        "Refused requests, by kind.",
        "event",
        numbers["security_events"],
    )


def _durations(counts: dict[str, Any], busy_seconds: float) -> Metric:
    name = _PREFIX + "request_duration_seconds"
    family = SummaryMetricFamily(
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


def _workers(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    """Of each slot. One without a worker keeps its totals, so that no counter disappears."""
    gauges = {
        "memory_mb": ("memory_bytes", "With all that the worker has started.", _MEGABYTE),
        "running": ("requests_running", "Requests that run in it.", 1),
        "connections": ("connections_open", "Client connections that it has.", 1),
        "sessions": ("sessions", "Client processes that have state in it.", 1),
        "generation": ("generation", "The generation of the worker.", 1),
        "uptime_seconds": ("uptime_seconds", "Its age.", 1),
    }
    for field, (name, help_text, unit) in gauges.items():
        family = GaugeMetricFamily(f"{_PREFIX}worker_{name}", help_text, labels=["worker"])
        for each in workers:
            if each["pid"]:
                family.add_metric([str(each["worker"])], each[field] * unit)
        yield family
    totals = {
        "requests": ("requests", "Requests that have run in this slot."),
        "failed": ("failures", "Of these, those that failed."),
    }
    for field, (name, help_text) in totals.items():
        counter = CounterMetricFamily(f"{_PREFIX}worker_{name}", help_text, labels=["worker"])
        for each in workers:
            counter.add_metric([str(each["worker"])], each[field])
        yield counter


def _functions(functions: list[dict[str, Any]]) -> Iterator[Metric]:
    counters = {
        "calls": ("calls", "Calls that have ended."),
        "failed": ("failures", "Of these, those that failed."),
        "busy_seconds": ("busy_seconds", "How long they took in total."),
    }
    for field, (name, help_text) in counters.items():
        family = CounterMetricFamily(
            f"{_PREFIX}function_{name}", help_text, labels=["module", "function"]
        )
        for each in functions:
            module, _, function = each["name"].partition(".")
            family.add_metric([module, function], each[field])
        yield family
