"""The monitor: it samples the load of the whole tree, and opens and closes the gate.

Every `sample_interval` it measures memory, CPU, requests and connections, writes the numbers into
the shared memory for reports, and logs what changes. While memory or CPU is over its limit the
overload state is closed; then it samples four times as often, so that the gate is open again within
a second of recovery. Running requests go on. What follows from memory that stays over its limit is
in `memory_relief`.

Times are CLOCK_MONOTONIC, which stands still while the machine is suspended and does not depend on
the wall clock. Called in the master's loop.
"""

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import set_overload_state
from cpanbridge.supervisor.listening.backlog import Backlog
from cpanbridge.supervisor.memory.fields import (
    CONCURRENCY,
    CONNECTIONS,
    GATE_CLOSED,
    GATE_OPEN,
    RATE,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
)
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import (
    CLOSING,
    MEGABYTE,
    MEMORY_KINDS,
    SCALE,
    Kind,
    Level,
)
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.monitor.cgroup_memory import CgroupMemory
from cpanbridge.supervisor.monitor.load_log import Alarms
from cpanbridge.supervisor.monitor.memory_relief import MemoryRelief, Retire
from cpanbridge.supervisor.reports import totals
from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.process_tree import Tree, Usage
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

SAMPLES_WHILE_CLOSED = 4  # in an interval
MOST_SECONDS_CLOSED = 0.5  # between two of them, so that recovery is seen within a second
LEAST_SECONDS = 0.05  # between two samples
MOST_SHARE = 0.02  # of a core may go into samples, while the gate is open
STEP_SECONDS = 0.02  # for which a sample keeps the master's loop from everything else
HEALTH_SECONDS = 60.0
SUMMARY_SECONDS = 300.0
# A sample that comes so many intervals late: the process, or the machine, was stopped.
GAP = 3
# What the gate limits: what a thread waits for then, and why a request is rejected.
_GATE_LIMITS = {
    Kind.REQUESTS: (WAITS_FOR_RATE, RATE),
    Kind.CONCURRENT: (WAITS_FOR_REQUEST, CONCURRENCY),
    Kind.CONNECTIONS: (WAITS_FOR_CONNECTION, CONNECTIONS),
}


class Monitor:
    """One daemon's monitor.

    `retire` is that of `MemoryRelief`. `limits` and `listeners` are replaced by a reload that
    changes them.
    """

    def __init__(
        self,
        loop: Loop,
        shared: Shared,
        wakeups: Sequence[Wakeups],
        limits: Limits,
        listeners: Sequence[socket.socket],
        retire: Retire,
    ) -> None:
        self.limits = limits
        self.listeners = listeners
        self._loop = loop
        self._shared = shared
        self._wakeups = wakeups
        self._tree = Tree(os.getpid())
        self._cgroup_memory = CgroupMemory(shared)
        self._memory_relief = MemoryRelief(shared, self._tree, retire)
        self._backlog: Backlog | None = None
        self._alarms = Alarms()
        self._began = 0.0  # the current sample
        self._cpu_used = 0.0  # CPU seconds for it so far
        self._steps: Iterator[None] = iter(())
        self._backlog_before = 0
        self._late_after = math.inf  # a sample after this time is late (see GAP)
        self._full = 0  # how often the workers had found all connections taken
        self._overloaded: dict[str, int] = {}
        self._violations: set[Kind] = set()
        self._next: dict[Callable[[], None], float] = {}  # when something regular is due
        self._next_complaint = -math.inf

    def start(self) -> None:
        """Begin. Called once, when the daemon is ready."""
        with contextlib.suppress(OSError):  # an old kernel: orphans are not counted
            process_tree.inherit_orphans()
        with contextlib.suppress(OSError):  # no sock_diag(7): waiting clients are not counted
            self._backlog = Backlog()
        now = time.monotonic()
        self._next = {action: now + seconds for action, seconds in self._regular()}
        self._sample()

    def _sample(self) -> None:
        """Begin a sample."""
        self._began, self._cpu_used = time.monotonic(), 0.0
        self._steps = self._tree.steps([slot.pid for slot in self._shared.used_slots if slot.pid])
        self._step()

    def _step(self) -> None:
        """Continue the sample for `STEP_SECONDS`; the loop has other things to do."""
        until, used = time.monotonic() + STEP_SECONDS, time.thread_time()
        failed = False
        try:
            for _ in self._steps:
                if time.monotonic() > until:
                    self._cpu_used += time.thread_time() - used
                    self._loop.after(0.0, self._step)
                    return
        except OSError as error:  # no descriptor left, or no memory
            failed = True
            if self._began >= self._next_complaint:
                self._next_complaint = self._began + self.limits.resource_check_interval
                LOGGER.error("Cannot look at the processes: %s", explain(error))
        else:
            self._evaluate(self._tree.usage)
        self._cpu_used += time.thread_time() - used
        self._keep_schedule(self._began)
        self._plan_next(failed)

    def _plan_next(self, failed: bool) -> None:
        """Sample again after the interval, or later when a sample takes long."""
        pause = max(self.limits.sample_interval, self._cpu_used / MOST_SHARE)
        if self._shared.header.overload_state != GATE_OPEN:
            pause = min(self.limits.sample_interval / SAMPLES_WHILE_CLOSED, MOST_SECONDS_CLOSED)
        now = time.monotonic()
        due = max(self._began + pause, now + LEAST_SECONDS)
        if not failed:
            self._late_after = due + GAP * self.limits.sample_interval
        self._shared.header.sample_due = round(due * 1e9)
        self._loop.after(due - now, self._sample)

    # -- what is measured --

    def _evaluate(self, usage: Usage) -> None:
        now = time.monotonic()
        gap = now > self._late_after
        self._record(usage)
        readings = totals.readings(self._shared)
        violations = {each.kind for each in readings if each.level is Level.VIOLATION}
        for kind in violations - self._violations:
            self._shared.header.alerts[kind] += 1
        self._violations = violations
        overload_state = GATE_OPEN if violations.isdisjoint(CLOSING) else GATE_CLOSED
        if overload_state != self._shared.header.overload_state:
            set_overload_state(self._shared, self._wakeups, overload_state)
        self._alarms.log(readings, now, self.limits.resource_check_interval)
        self._log_connections(now)
        over = not violations.isdisjoint(MEMORY_KINDS)
        self._memory_relief.check(usage, over, gap, self.limits, now)

    def _record(self, usage: Usage) -> None:
        """Write what was measured into the shared memory."""
        shared, header = self._shared, self._shared.header
        most = 100.0 * (os.cpu_count() or 1)  # clock ticks may add up to a little more
        cpu = min(most, 100.0 * usage.cpu_seconds / usage.seconds) if usage.seconds else 0.0
        values = {Kind.MEMORY: usage.memory / MEGABYTE, Kind.CPU: cpu, **self._demands()}
        for kind, value in values.items():
            header.values[kind] = round(value * SCALE)
        self._cgroup_memory.measure()
        header.peak_memory = max(header.peak_memory, usage.memory)
        header.peak_cpu = max(header.peak_cpu, header.values[Kind.CPU])
        header.processes = usage.processes
        header.processes_by_rss = usage.by_rss
        for slot in shared.used_slots:
            slot.memory = usage.by_root.get(slot.pid, 0)
        header.sampled_at = time.monotonic_ns()

    def _demands(self) -> dict[Kind, int]:
        """For each limit that the gate keeps: what is accepted, and what waits because of it."""
        shared = self._shared
        counts = totals.count(shared)
        shared.header.backlog = backlog = self._waiting_clients()
        # A client that only one of two samples finds was about to be accepted.
        lasting, self._backlog_before = min(backlog, self._backlog_before), backlog
        accept_waits = {slot.accept_waits_for for slot in shared.used_slots}
        limits = {reading.kind: int(reading.limit) for reading in totals.readings(shared)}
        taken = {
            Kind.REQUESTS: counts.admitted_last_minute,
            Kind.CONCURRENT: counts.running,
            Kind.CONNECTIONS: counts.connections,
        }
        demands = {}
        for kind, (waits_for, reason) in _GATE_LIMITS.items():
            slots = [each for each in shared.used_slots if each.request_waits_for == waits_for]
            demand = taken[kind] + sum(slot.queued for slot in slots)
            if waits_for in accept_waits and taken[kind] >= limits[kind]:
                demand += lasting
            rejected = counts.overloaded[reason] > self._overloaded.get(reason, math.inf)
            demands[kind] = max(demand, limits[kind] + 1 if rejected else 0)
        self._overloaded = counts.overloaded
        return demands

    def _waiting_clients(self) -> int:
        if self._backlog is None:
            return 0
        try:
            return self._backlog.waiting(self.listeners)
        except OSError:
            return 0  # closed for a stop

    # -- what is logged --

    def _log_connections(self, now: float) -> None:
        full = sum(slot.full for slot in self._shared.used_slots)
        was_full, self._full = full != self._full, full
        limit = self._shared.header.max_connections
        connections = self._shared.connections()
        full_now = was_full or connections >= limit
        interval = self.limits.resource_check_interval
        self._alarms.log_connections(connections, limit, full_now, now, interval)

    def _regular(self) -> Iterator[tuple[Callable[[], None], float]]:
        """What is done in any case, and how often, in seconds."""
        yield self._note_check, self.limits.resource_check_interval
        yield self._log_health, HEALTH_SECONDS
        yield self._log_summary, SUMMARY_SECONDS

    def _keep_schedule(self, now: float) -> None:
        for action, seconds in self._regular():
            if now >= self._next[action]:
                self._next[action] = now + seconds
                action()

    def _note_check(self) -> None:
        self._shared.header.checked_at = time.monotonic_ns()

    def _log_health(self) -> None:
        counts, header = totals.count(self._shared), self._shared.header
        LOGGER.info(
            f"Health check - Uptime: {int(self._shared.uptime)}s, Requests: {counts.finished}, "
            f"Errors: {counts.failed}, Active connections: "
            f"{counts.connections}/{header.peak_connections} (current/peak)"
        )

    def _log_summary(self) -> None:
        counts, header = totals.count(self._shared), self._shared.header
        memory, cpu = header.values[Kind.MEMORY] / SCALE, header.values[Kind.CPU] / SCALE
        LOGGER.info(
            f"Resource summary - Memory: {memory:.1f}MB (peak: {header.peak_memory / MEGABYTE:.1f}"
            f"MB), CPU: {cpu:.1f}% (peak: {header.peak_cpu / SCALE:.1f}%), "
            f"Concurrent: {counts.running}, Requests/min: {counts.admitted_last_minute}"
        )
