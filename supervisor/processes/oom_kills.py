"""Which processes the kernel has killed for want of memory.

The kernel kills with SIGKILL, as anybody may, and counts. So a process that nobody of the daemon
has killed was killed by the kernel when the count has gone up not long before; each count speaks
for one process. Called in the master.
"""

import collections
import time

from cpanbridge.supervisor.cgroup import Cgroups
from cpanbridge.supervisor.memory.overload_state import MEGABYTE
from cpanbridge.supervisor.system.event_loop import Loop

# It is counted when the signal is sent; a process that holds much, on a machine that has run out of
# memory, takes its time to end.
RECENT_SECONDS = 10.0


class OomKills:
    """What the kernel has counted since this was created."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._cgroups = Cgroups()
        self._counted, self._file = self._cgroups.oom_kills()
        self._seen = collections.deque[float]()  # when; CLOCK_MONOTONIC seconds
        self._look_again()

    def explain(self) -> str | None:
        """Why the kernel has killed one process, and what to do about it; None: it has not."""
        self._look()
        if not self._seen:
            return None
        self._seen.popleft()
        groups = self._cgroups.memory()
        advice = "the machine needs more memory, or limits.max_memory_mb a lower value"
        if groups:
            tightest = min(groups, key=lambda each: each.limit)
            advice = (
                f"give {tightest.folder} more than {tightest.limit / MEGABYTE:.0f} MB, or lower "
                "limits.max_memory_mb, so that the gate closes earlier"
            )
        return f"by the kernel, for want of memory (counted in {self._file}): {advice}"

    def _look(self) -> None:
        count, file = self._cgroups.oom_kills()
        now = time.monotonic()
        if file == self._file:  # else the daemon was moved to another cgroup
            self._seen.extend([now] * (count - self._counted))
        self._counted, self._file = count, file
        while self._seen and self._seen[0] < now - RECENT_SECONDS:
            self._seen.popleft()

    def _look_again(self) -> None:
        self._look()
        self._loop.after(RECENT_SECONDS / 2, self._look_again)
