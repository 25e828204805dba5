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
from collections.abc import Iterator, Sequence

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Wakeups, set_overload_state
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
    SCALE,
    Kind,
    Level,
    Reading,
)
from cpanbridge.supervisor.monitor.load_log import Alarms
from cpanbridge.supervisor.monitor.memory_relief import MemoryRelief, Retire
from cpanbridge.supervisor.reports import totals
from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.process_tree import Tree, Usage

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
        self._levels = dict.fromkeys(Kind, Level.NORMAL)
        self._next_check = self._next_health = self._next_summary = math.inf
        self._next_complaint = -math.inf

    def start(self) -> None:
        """Begin. Called once, when the daemon is ready."""
        with contextlib.suppress(OSError):  # an old kernel: orphans are not counted
            process_tree.inherit_orphans()
        with contextlib.suppress(OSError):  # no sock_diag(7): waiting clients are not counted
            self._backlog = Backlog()
        now = time.monotonic()
        self._next_check = now + self.limits.resource_check_interval
        self._next_health = now + HEALTH_SECONDS
        self._next_summary = now + SUMMARY_SECONDS
        self._sample()

    def _sample(self) -> None:
        """Begin a sample."""
        self._began = time.monotonic()
        self._cpu_used = 0.0
        pids = [slot.pid for slot in self._shared.used_slots if slot.pid]
        self._steps = self._tree.steps(pids)
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
                LOGGER.error("Cannot look at the processes: %s", error.strerror)
        else:
            self._evaluate(self._tree.usage)
        self._cpu_used += time.thread_time() - used
        self._keep_schedule(self._began)
        self._plan_next(failed)

    def _plan_next(self, failed: bool) -> None:
        """Sample again after the interval, or later when a sample takes long."""
        pause = max(self.limits.sample_interval, self._cpu_used / MOST_SHARE)
        if self._shared.counters.overload_state.get_obj().value != GATE_OPEN:
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
        self._count_alerts(readings)
        self._close_or_open(readings)
        self._alarms.log(readings, now, self.limits.resource_check_interval)
        self._log_connections(now)
        over = readings[Kind.MEMORY].level is Level.VIOLATION
        self._memory_relief.check(usage, over, gap, self.limits, now)

    def _record(self, usage: Usage) -> None:
        """Write what was measured into the shared memory."""
        shared, header = self._shared, self._shared.header
        most = 100.0 * (os.cpu_count() or 1)  # clock ticks may add up to a little more
        cpu = min(most, 100.0 * usage.cpu_seconds / usage.seconds) if usage.seconds else 0.0
        values = {Kind.MEMORY: usage.memory / MEGABYTE, Kind.CPU: cpu, **self._demands()}
        for kind, value in values.items():
            header.values[kind] = round(value * SCALE)
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
        queued, accept_waits = self._waiting()
        rejected = {
            reason: count > self._overloaded.get(reason, count)
            for reason, count in counts.overloaded.items()
        }
        self._overloaded = counts.overloaded
        limits = {reading.kind: int(reading.limit) for reading in totals.readings(shared)}

        def demand(kind: Kind, taken: int, waits_for: int, reason: str) -> int:
            wanted = taken + queued[waits_for]
            if waits_for in accept_waits and taken >= limits[kind]:
                wanted += lasting
            return max(wanted, limits[kind] + 1 if rejected[reason] else 0)

        demands = (
            (Kind.REQUESTS, shared.admitted_in_window(), WAITS_FOR_RATE, RATE),
            (Kind.CONCURRENT, counts.running, WAITS_FOR_REQUEST, CONCURRENCY),
            (Kind.CONNECTIONS, counts.connections, WAITS_FOR_CONNECTION, CONNECTIONS),
        )
        return {each[0]: demand(*each) for each in demands}

    def _waiting_clients(self) -> int:
        if self._backlog is None:
            return 0
        try:
            return self._backlog.waiting(self.listeners)
        except OSError:
            return 0  # closed for a stop

    def _waiting(self) -> tuple[dict[int, int], set[int]]:
        """How many requests wait for what, and what the accepting threads wait for."""
        queued = dict.fromkeys((WAITS_FOR_CONNECTION, WAITS_FOR_REQUEST, WAITS_FOR_RATE), 0)
        accept_waits = set()
        for slot in self._shared.used_slots:
            accept_waits.add(int(slot.accept_waits_for))
            if slot.request_waits_for in queued:
                queued[slot.request_waits_for] += slot.queued
        return queued, accept_waits

    # -- what follows from it --

    def _count_alerts(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            before, self._levels[reading.kind] = self._levels[reading.kind], reading.level
            if reading.level is Level.VIOLATION and before is not Level.VIOLATION:
                self._shared.header.alerts[reading.kind] += 1

    def _close_or_open(self, readings: Sequence[Reading]) -> None:
        over = any(readings[kind].level is Level.VIOLATION for kind in CLOSING)
        overload_state = GATE_CLOSED if over else GATE_OPEN
        if overload_state != self._shared.counters.overload_state.get_obj().value:
            set_overload_state(self._shared, self._wakeups, overload_state)

    def _log_connections(self, now: float) -> None:
        full = sum(slot.full for slot in self._shared.used_slots)
        was_full, self._full = full != self._full, full
        limit = self._shared.header.max_connections
        connections = self._shared.connections()
        self._alarms.log_connections(
            connections,
            limit,
            was_full or connections >= limit,
            now,
            self.limits.resource_check_interval,
        )

    # -- what is logged in any case --

    def _keep_schedule(self, now: float) -> None:
        """The resource check, the health line and the summary, each when it is due."""
        if now >= self._next_check:
            self._next_check = now + self.limits.resource_check_interval
            self._shared.header.checked_at = time.monotonic_ns()
        if now >= self._next_health:
            self._next_health = now + HEALTH_SECONDS
            self._log_health()
        if now >= self._next_summary:
            self._next_summary = now + SUMMARY_SECONDS
            self._log_summary()

    def _log_health(self) -> None:
        counts = totals.count(self._shared)
        LOGGER.info(
            "Health check - Uptime: %ds, Requests: %d, Errors: %d, "
            "Active connections: %d/%d (current/peak)",
            self._shared.uptime,
            counts.finished,
            counts.failed,
            counts.connections,
            self._shared.header.peak_connections,
        )

    def _log_summary(self) -> None:
        header = self._shared.header
        LOGGER.info(
            "Resource summary - Memory: %.1fMB (peak: %.1fMB), CPU: %.1f%% (peak: %.1f%%), "
            "Concurrent: %d, Requests/min: %d",
            header.values[Kind.MEMORY] / SCALE,
            header.peak_memory / MEGABYTE,
            header.values[Kind.CPU] / SCALE,
            header.peak_cpu / SCALE,
            self._shared.running(),
            self._shared.admitted_in_window(),
        )
