"""The daemon's counts, added up over all its slots at one moment.

A report is made from one reading, so that its numbers agree: succeeded and failed requests add up
to the finished ones, in every field.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cpanbridge.supervisor.memory import function_stats, histogram
from cpanbridge.supervisor.memory.connection_table import Connection
from cpanbridge.supervisor.memory.fields import EVENT_KINDS, REASONS
from cpanbridge.supervisor.memory.histogram import Latencies
from cpanbridge.supervisor.memory.layout import Shared, Statistics
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind, Reading
from cpanbridge.supervisor.reports import surroundings


class Totals(NamedTuple):
    """What all workers have counted, those included that have ended."""

    # Fields of the slots, in the order in which they are read. What is given back comes before what
    # is taken, so that no difference is ever below zero.
    closed: int
    succeeded: int
    failed: int
    opened: int
    accepted: int
    admitted: int
    refused: int
    rejected: int
    pings: int
    busy_ns: int
    queued: int
    security_events: dict[str, int]  # by kind
    overloaded: dict[str, int]  # by reason
    waits: dict[str, int]  # by reason
    waited_ns: dict[str, int]  # by reason
    admitted_last_minute: int

    @property
    def connections(self) -> int:
        """Those that are open."""
        return self.opened - self.closed

    @property
    def finished(self) -> int:
        """Requests that have run."""
        return self.succeeded + self.failed

    @property
    def running(self) -> int:
        """Requests that run now."""
        return self.admitted - self.finished

    @property
    def error_rate(self) -> float:
        """The share of the finished requests that failed."""
        return self.failed / self.finished if self.finished else 0.0

    @property
    def average_seconds(self) -> float:
        """How long a request took."""
        return self.busy_ns / self.finished / 1e9 if self.finished else 0.0


_BY_NAME = {
    "security_events": EVENT_KINDS,
    "overloaded": REASONS,
    "waits": REASONS,
    "waited_ns": REASONS,
}
_SUMS = Totals._fields[: Totals._fields.index("security_events")]


def count(shared: Shared) -> Totals:
    """Read all counts once."""
    sums: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    by_name: dict[str, Any] = {field: dict.fromkeys(names, 0) for field, names in _BY_NAME.items()}
    for slot in shared.used_slots:
        for field in _SUMS:
            sums[field] += getattr(slot, field)
        for field, names in _BY_NAME.items():
            for name, value in zip(names, getattr(slot, field), strict=True):
                by_name[field][name] += value
    return Totals(**sums, **by_name, admitted_last_minute=shared.admitted_in_window())


class Listed(NamedTuple):
    """A connection, and the slot of its worker."""

    slot: int
    connection: Connection

    @property
    def id(self) -> str:
        """Unique for as long as the daemon runs."""
        return f"{self.slot}-{self.connection.number}"


def statistics(shared: Shared) -> Sequence[Statistics]:
    """The statistics of each slot that a worker has, or has had."""
    return shared.statistics[: shared.header.slots_used]


def connections(shared: Shared) -> list[Listed]:
    """The open connections, of each worker as many as its table holds."""
    return [
        Listed(number, connection)
        for number, each in enumerate(statistics(shared))
        for connection in each.connection_table.connections()
    ]


def latencies(shared: Shared) -> Latencies:
    """How long the requests of the last five minutes took."""
    return histogram.merged(each.histogram for each in statistics(shared))


def waits(shared: Shared) -> dict[str, Latencies]:
    """How long the requests waited that ceased to in the last five minutes, by the reason."""
    all_waits = [each.waits for each in statistics(shared)]
    columns = zip(*all_waits, strict=True)
    return dict(zip(REASONS, map(histogram.merged, columns), strict=True))


def functions(shared: Shared) -> list[function_stats.Count]:
    """How often each function was called, and how that went."""
    all_stats = [each.function_stats for each in statistics(shared)]
    return function_stats.counts(shared.names.all(), all_stats)


def memory_limit(shared: Shared) -> surroundings.Report:
    """What holds for the memory of the whole tree of processes, as the monitor found it last."""
    header = shared.header
    return surroundings.memory_limit(header.max_memory_mb, header.tightest_cgroup / MEGABYTE)


def readings(shared: Shared) -> list[Reading]:
    """The last values of the monitor, with the limits."""
    header = shared.header
    limits = {
        Kind.MEMORY: memory_limit(shared)["mb"],
        Kind.CPU: header.max_cpu / SCALE,
        Kind.REQUESTS: shared.window.limit,
        Kind.CONCURRENT: header.max_concurrent_requests,
        Kind.CONNECTIONS: header.max_connections,
        Kind.CGROUP_MEMORY: header.fullest_cgroup / MEGABYTE,
    }
    return [Reading(kind, header.values[kind] / SCALE, limits[kind]) for kind in Kind]
