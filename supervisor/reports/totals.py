"""The daemon's counts, added up over all its workers at one moment.

A report is made from one look, so that its numbers fit together: what has succeeded and what has
failed is what has finished, in every field that says so.
"""

from typing import NamedTuple

from cpanbridge.supervisor.memory import histogram
from cpanbridge.supervisor.memory.connection_table import Connection
from cpanbridge.supervisor.memory.histogram import Latencies
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import SCALE, Kind, Reading


class Totals(NamedTuple):
    """What all workers that there are and were have counted."""

    succeeded: int
    failed: int
    refused: int
    rejected: int
    busy_ns: int
    running: int
    queued: int
    opened: int
    connections: int
    invalid_requests: int
    security_events: dict[str, int]  # by their kind
    overloaded: dict[str, int]  # by the reason

    @property
    def finished(self) -> int:
        """Requests that have run."""
        return self.succeeded + self.failed

    @property
    def error_rate(self) -> float:
        """The share of them that failed."""
        return self.failed / self.finished if self.finished else 0.0

    @property
    def average_seconds(self) -> float:
        """How long one took."""
        return self.busy_ns / self.finished / 1e9 if self.finished else 0.0


def count(shared: Shared) -> Totals:
    """Look once at everything."""
    succeeded = failed = refused = rejected = busy_ns = 0
    admitted = queued = opened = taken_over = closed = 0
    events = dict.fromkeys(_EVENTS, 0)
    overloaded = dict.fromkeys(_REASONS, 0)
    for slot in shared.used_slots:
        # What is given back is read before what is taken, so that nothing is ever below zero.
        closed += slot.closed
        succeeded += slot.succeeded
        failed += slot.failed
        opened += slot.opened
        taken_over += slot.taken_over
        admitted += slot.admitted
        refused += slot.refused
        rejected += slot.rejected
        busy_ns += slot.busy_ns
        queued += slot.queued
        for name in _EVENTS:
            events[name] += getattr(slot, name)
        for name in _REASONS:
            overloaded[name] += getattr(slot, f"overloaded_{name}")
    return Totals(
        succeeded=succeeded,
        failed=failed,
        refused=refused,
        rejected=rejected,
        busy_ns=busy_ns,
        running=admitted - succeeded - failed,
        queued=queued,
        opened=opened - taken_over,
        connections=opened - closed,
        invalid_requests=events["invalid_request"],
        security_events=events,
        overloaded=overloaded,
    )


_EVENTS = ("invalid_request", "module_not_allowed", "function_not_allowed", "permission_denied")
_REASONS = ("verdict", "connections", "concurrency", "rate")


class Listed(NamedTuple):
    """A connection, and whose it is."""

    slot: int
    connection: Connection

    @property
    def id(self) -> str:
        """It names the connection for as long as the daemon runs."""
        return f"{self.slot}-{self.connection.number}"


def connections(shared: Shared) -> list[Listed]:
    """The connections that are open, as far as they are listed."""
    return [
        Listed(number, connection)
        for number, statistics in enumerate(shared.statistics[: shared.header.slots_used])
        for connection in statistics.connection_table.connections()
    ]


def latencies(shared: Shared) -> Latencies:
    """How long the requests of the last five minutes took."""
    return histogram.merged(
        each.histogram for each in shared.statistics[: shared.header.slots_used]
    )


def readings(shared: Shared) -> list[Reading]:
    """What the monitor has measured last, beside the limits."""
    header = shared.header
    limits = {
        Kind.MEMORY: header.max_memory_mb,
        Kind.CPU: header.max_cpu / SCALE,
        Kind.REQUESTS: shared.window.limit,
        Kind.CONCURRENT: header.max_concurrent_requests,
        Kind.CONNECTIONS: header.max_connections,
    }
    return [Reading(kind, header.values[kind] / SCALE, limits[kind]) for kind in Kind]
