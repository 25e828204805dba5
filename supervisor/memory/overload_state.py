"""The daemon's load beside its limits: which ones it is near, and which it is over.

Over 80 % of a limit is a warning, over 100 % a violation. Memory and CPU are what the whole tree of
processes uses; the memory of a cgroup is what all processes in it use. The gate never admits more
requests or connections than allowed, so what counts here is the demand: those that are admitted,
and those that wait because there is no room for them.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

WARNING_SHARE = 0.8
SCALE = 1000  # values are kept in thousandths of their unit


class Kind(IntEnum):
    """What is limited."""

    MEMORY = 0  # megabytes (2**20 bytes)
    CPU = 1  # percent of a core
    REQUESTS = 2  # in a minute
    CONCURRENT = 3  # requests
    CONNECTIONS = 4
    CGROUP_MEMORY = 5  # megabytes, of the cgroup that is nearest to its limit


KINDS = len(Kind)
# A violation of these closes the gate; the others are kept by the gate itself.
MEMORY_KINDS = (Kind.MEMORY, Kind.CGROUP_MEMORY)
CLOSING = (*MEMORY_KINDS, Kind.CPU)

MEGABYTE = 1 << 20


class Level(IntEnum):
    """How near to its limit something is."""

    NORMAL = 0
    WARNING = 1
    VIOLATION = 2


class Reading(NamedTuple):
    """What was measured of one kind, and its limit, both in the kind's unit; 0: no limit."""

    kind: Kind
    value: float
    limit: float

    @property
    def level(self) -> Level:
        """How near to the limit it is."""
        if not self.limit or self.value <= WARNING_SHARE * self.limit:
            return Level.NORMAL
        return Level.VIOLATION if self.value > self.limit else Level.WARNING

    def __str__(self) -> str:
        relation = _RELATIONS[self.level]
        return _TEXTS[self.kind].format(value=self.value, relation=relation, limit=self.limit)


_RELATIONS = {Level.NORMAL: "within", Level.WARNING: "approaching", Level.VIOLATION: "exceeds"}
_TEXTS = {
    Kind.MEMORY: "Memory usage {value:.1f}MB {relation} limit {limit:.0f}MB",
    Kind.CPU: "CPU usage {value:.1f}% {relation} limit {limit:g}%",
    Kind.REQUESTS: "Request rate {value:.0f}/min {relation} limit {limit:.0f}/min",
    Kind.CONCURRENT: "Concurrent requests {value:.0f} {relation} limit {limit:.0f}",
    Kind.CONNECTIONS: "Connections {value:.0f} {relation} limit {limit:.0f}",
    Kind.CGROUP_MEMORY: "Memory of the cgroup {value:.1f}MB {relation} limit {limit:.0f}MB",
}


def at_level(readings: Sequence[Reading], level: Level) -> list[str]:
    """Those of a level, in words."""
    return [str(reading) for reading in readings if reading.level is level]
