"""The daemon's counts, added up over all its slots at one moment.

A report is made from one reading, so that its numbers agree: succeeded and failed requests add up
to the finished ones, in every field.
"""

from typing import NamedTuple

from cpanbridge.supervisor.memory import histogram
from cpanbridge.supervisor.memory.connection_table import Connection
from cpanbridge.supervisor.memory.fields import EVENT_KINDS, REASONS
from cpanbridge.supervisor.memory.histogram import Latencies
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import SCALE, Kind, Reading


class Totals(NamedTuple):
    """What all workers have counted, those included that have ended."""

    succeeded: int
    failed: int
    refused: int
    rejected: int
    busy_ns: int
    running: int
    queued: int
    accepted: int
    connections: int
    invalid_requests: int
    security_events: dict[str, int]  # by kind
    overloaded: dict[str, int]  # by reason

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
        """How long a request took."""
        return self.busy_ns / self.finished / 1e9 if self.finished else 0.0


def count(shared: Shared) -> Totals:
    """Read all counts once."""
    succeeded = failed = refused = rejected = busy_ns = 0
    admitted = queued = accepted = opened = closed = 0
    events = dict.fromkeys(EVENT_KINDS, 0)
    overloaded = dict.fromkeys(REASONS, 0)
    for slot in shared.used_slots:
        # What is given back is read before what is taken, so that nothing is ever below zero.
        closed += slot.closed
        succeeded += slot.succeeded
        failed += slot.failed
        opened += slot.opened
        accepted += slot.accepted
        admitted += slot.admitted
        refused += slot.refused
        rejected += slot.rejected
        busy_ns += slot.busy_ns
        queued += slot.queued
        for number, name in enumerate(EVENT_KINDS):
            events[name] += slot.security_events[number]
        for number, name in enumerate(REASONS):
            overloaded[name] += slot.overloaded[number]
    return Totals(
        succeeded=succeeded,
        failed=failed,
        refused=refused,
        rejected=rejected,
        busy_ns=busy_ns,
        running=admitted - succeeded - failed,
        queued=queued,
        accepted=accepted,
        connections=opened - closed,
        invalid_requests=events["invalid_request"],
        security_events=events,
        overloaded=overloaded,
    )


class Listed(NamedTuple):
    """A connection, and the slot of its worker."""

    slot: int
    connection: Connection

    @property
    def id(self) -> str:
        """Unique for as long as the daemon runs."""
        return f"{self.slot}-{self.connection.number}"


def connections(shared: Shared) -> list[Listed]:
    """The open connections, of each worker as many as its table holds."""
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
    """The last values of the monitor, with the limits."""
    header = shared.header
    limits = {
        Kind.MEMORY: header.max_memory_mb,
        Kind.CPU: header.max_cpu / SCALE,
        Kind.REQUESTS: shared.window.limit,
        Kind.CONCURRENT: header.max_concurrent_requests,
        Kind.CONNECTIONS: header.max_connections,
    }
    return [Reading(kind, header.values[kind] / SCALE, limits[kind]) for kind in Kind]
