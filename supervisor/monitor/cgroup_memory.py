"""The memory of the cgroups that the daemon is in: their limits, and how near to them they are.

The kernel kills a process when a cgroup is full, and says nothing before. So the gate closes at
nine tenths of a cgroup's limit: when the daemon's own tree has reached that of the lowest limit, or
all that is in a cgroup together has reached that of its limit. The last tenth is for what is
allocated between two samples. Called in the master's loop.
"""

import logging

from cpanbridge.supervisor.cgroup import Cgroups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind
from cpanbridge.supervisor.reports import surroundings, totals

LOGGER = logging.getLogger("cpanbridge.master")


class CgroupMemory:
    """Writes what it finds into the shared memory, and logs when a cgroup's limit comes to hold."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._cgroups = Cgroups()
        self._held: surroundings.Report | None = None  # the limit at the last sample

    def measure(self) -> None:
        """Called for each sample, because limits may change while the daemon runs."""
        header, groups = self._shared.header, self._cgroups.memory()
        tightest = min((each.share for each in groups), default=0)
        fullest = max(groups, key=lambda each: each.used / (each.limit or 1), default=None)
        header.tightest_cgroup = tightest
        header.fullest_cgroup = fullest.share if fullest is not None else 0
        used = fullest.used if fullest is not None else 0
        header.values[Kind.CGROUP_MEMORY] = round(used / MEGABYTE * SCALE)
        before, self._held = self._held, totals.memory_limit(self._shared)
        if self._held != before and "cgroup" in (self._held["from"], (before or {}).get("from")):
            text = surroundings.memory_in_words(self._held, surroundings.found())
            LOGGER.info("The memory limit is %s", text)
