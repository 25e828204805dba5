"""Giving memory back when it stays over its limit: one worker retired, or one orphan ended, a time.

Memory does not fall by waiting, because an interpreter hardly ever gives it back. So when it has
been over its limit for `memory_grace`, the worker that holds most is retired; and the next one only
when that one has gone and it was not enough. What a worker has started counts with it. A process
that it has left behind (an orphan) is ended if that holds most.

Times are CLOCK_MONOTONIC seconds. Called in the master's loop.
"""

import logging
import math
import signal
from collections.abc import Callable

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import MEGABYTE
from cpanbridge.supervisor.reports import totals
from cpanbridge.supervisor.system.process_tree import Tree, Usage

LOGGER = logging.getLogger("cpanbridge.master")

ORPHAN_SECONDS = 5.0  # for an orphan to end after SIGTERM; then it gets SIGKILL
RECENT_FUNCTIONS = 5

Retire = Callable[[int, str], bool]


class MemoryRelief:
    """Frees memory for one daemon.

    `retire` retires the worker in a slot, or shortens its time if it exits already, with the
    reason; it returns whether there was such a worker.
    """

    def __init__(self, shared: Shared, tree: Tree, retire: Retire) -> None:
        self._shared = shared
        self._tree = tree
        self._retire = retire
        self._over_since = math.inf
        self._last = 0  # the pid of the worker or orphan chosen last, until it has ended
        self._kill_at = math.inf  # when that is an orphan that does not end
        self._next_advice = -math.inf

    def check(self, usage: Usage, over: bool, gap: bool, limits: Limits, now: float) -> None:
        """Called after each sample: `over` says that memory is over its limit.

        With `gap` there was no sample for a long time, and the grace begins anew.
        """
        if not over:
            self._over_since = math.inf
        elif gap or self._over_since == math.inf:
            self._over_since = now
        if now - self._over_since >= limits.memory_grace:
            self._relieve(usage, limits, now)

    def _relieve(self, usage: Usage, limits: Limits, now: float) -> None:
        if self._last in usage.by_root:
            return  # the last one has not ended yet
        if self._last in usage.orphans:
            if now >= self._kill_at:
                self._kill_at = math.inf
                self._tree.end(self._last, signal.SIGKILL)
            return
        # A worker that has not run anything has nothing to give back.
        workers = [
            (int(slot.memory), number)
            for number, slot in enumerate(self._shared.used_slots)
            if slot.pid and slot.admitted > slot.admitted_before
        ]
        orphans = [(memory, pid) for pid, memory in usage.orphans.items()]
        memory, number = max(workers, default=(0, 0))
        orphan_memory, orphan = max(orphans, default=(0, 0))
        if orphan_memory > memory:
            self._end_orphan(orphan, orphan_memory, limits, now)
        elif workers:
            self._retire_worker(number, limits)
        elif now >= self._next_advice:
            self._next_advice = now + limits.resource_check_interval
            LOGGER.warning(
                "Memory stays over its limit, but no worker has run anything since it was "
                "started, so the idle daemon takes as much (%.0fMB): raise limits.max_memory_mb, "
                "or what the cgroup allows, have fewer workers, or end what else holds memory",
                usage.memory / MEGABYTE,
            )

    def _retire_worker(self, number: int, limits: Limits) -> None:
        slot = self._shared.slots[number]
        share = f"it holds {slot.memory / MEGABYTE:.1f}MB"
        if slot.memory > totals.memory_limit(self._shared)["mb"] * MEGABYTE:
            names = self._shared.names.all()
            function_stats = self._shared.statistics[number].function_stats
            recent = function_stats.latest(names, slot.since, RECENT_FUNCTIONS)
            share += f" alone, its last functions were {', '.join(recent) or 'none'}"
        reason = f"memory has been over its limit for {limits.memory_grace:g} s, and {share}"
        if self._retire(number, reason):
            self._last = slot.pid
            self._shared.header.retired += 1

    def _end_orphan(self, pid: int, memory: int, limits: Limits, now: float) -> None:
        name = self._tree.end(pid, signal.SIGTERM)
        if name is not None:
            self._last, self._kill_at = pid, now + ORPHAN_SECONDS
            LOGGER.warning(
                f"Process {pid} ({name}), left by a worker that has ended, is ended: memory has "
                f"been over its limit for {limits.memory_grace:g} s, and it holds "
                f"{memory / MEGABYTE:.1f}MB"
            )
