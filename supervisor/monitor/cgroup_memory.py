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

LOGGED_CHANGE = 0.1  # of the limit: some hosts adjust memory.high all the time


class CgroupMemory:
    """Writes what it finds into the shared memory, and logs when a cgroup's limit comes to hold."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._cgroups = Cgroups()
        # The limit as it was logged, or as it is where nobody has to be told.
        self._known = surroundings.memory_limit(shared.header.max_memory_mb, 0)

    def measure(self) -> None:
        """Called for each sample, because limits may change while the daemon runs."""
        header, groups = self._shared.header, self._cgroups.memory()
        tightest = min((each.share for each in groups), default=0)
        fullest = max(groups, key=lambda each: each.used / (each.limit or 1), default=None)
        header.tightest_cgroup = tightest
        header.fullest_cgroup = fullest.share if fullest is not None else 0
        used = fullest.used if fullest is not None else 0
        header.values[Kind.CGROUP_MEMORY] = round(used / MEGABYTE * SCALE)
        self._log(totals.memory_limit(self._shared))

    def _log(self, limit: surroundings.Report) -> None:
        origins = limit["from"], self._known["from"]
        changed = abs(limit["mb"] - self._known["mb"]) > LOGGED_CHANGE * self._known["mb"]
        if origins == ("configuration", "configuration"):
            self._known = limit
        elif changed or origins != ("cgroup", "cgroup"):
            self._known = limit
            text = surroundings.memory_in_words(limit, surroundings.found())
            LOGGER.info("The memory limit is %s", text)
