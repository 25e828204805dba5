"""The master's watch over the load of the whole tree, and what follows from it.

Every `sample_interval` it looks at memory, CPU, requests and connections, leaves the numbers in the
shared memory for reports, and tells the log. While memory or CPU is over its limit the verdict is
closed; then it looks four times as often, so that the gate is open again within a second of
recovery. Running requests go on.

Memory does not fall by waiting, because an interpreter hardly ever gives it back. So when it has
been over its limit for `memory_grace`, the worker that holds most is retired; and the next one only
when that one has gone and it was not enough. What a worker has started counts with it; what it
leaves behind when it ends is ended if that holds most.

Times are CLOCK_MONOTONIC, which stands still while the machine is suspended and does not know what
the wall clock is set to. Called in the master's loop.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Wakeups, set_overload_state
from cpanbridge.supervisor.listening.backlog import Backlog
from cpanbridge.supervisor.memory.layout import (
    GATE_CLOSED,
    GATE_OPEN,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    Shared,
    Slot,
)
from cpanbridge.supervisor.memory.overload_state import (
    CLOSING,
    MEGABYTE,
    SCALE,
    Kind,
    Level,
    Reading,
)
from cpanbridge.supervisor.monitor.load_log import Alarms
from cpanbridge.supervisor.reports import totals
from cpanbridge.supervisor.system import process_tree
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.system.process_tree import Tree, Usage

LOGGER = logging.getLogger("cpanbridge.master")

CLOSER_LOOKS = 4  # samples in an interval while the verdict is closed
MOST_SECONDS_CLOSED = 0.5  # between two of them, so that recovery is seen within a second
LEAST_SECONDS = 0.05  # between two samples
MOST_SHARE = 0.02  # of a core may go into samples, while the verdict is open
STEP_SECONDS = 0.02  # for which the master's loop does nothing but look
ORPHAN_SECONDS = 5.0  # for a process to end by itself, once it was told to
HEALTH_SECONDS = 60.0
SUMMARY_SECONDS = 300.0
# A sample that comes so many intervals late: the process, or the machine, was stopped.
GAP = 3
RECENT_FUNCTIONS = 5

Retire = Callable[[int, str], bool]


class Monitor:
    """One daemon's monitor.

    `retire` tells the worker in a slot to leave, or to hurry if it is leaving already, with the
    reason, and returns whether it was there to be told. `limits` and `listeners` may be replaced
    when a reload changes them.
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
        self._retire = retire
        self._tree = Tree(os.getpid())
        self._backlog: Backlog | None = None
        self._alarms = Alarms()
        self._over_since = math.inf  # memory
        self._retired = 0  # the pid of the last one told to leave for memory, until it has gone
        self._kill_at = math.inf  # when that is an orphan that does not leave
        self._began = 0.0  # the present sample
        self._cpu_used = 0.0  # for it so far
        self._steps: Iterator[None] = iter(())
        self._backlog_before = 0
        self._late_after = math.inf  # a sample after this time is late (see GAP)
        self._full = 0
        self._overloaded: dict[str, int] = {}
        self._levels = dict.fromkeys(Kind, Level.NORMAL)
        self._next_check = self._next_health = self._next_summary = math.inf
        self._next_advice = self._next_complaint = -math.inf

    def start(self) -> None:
        """Begin. Called once, when the daemon is ready."""
        with contextlib.suppress(OSError):  # an old kernel: orphans are not counted
            process_tree.inherit_orphans()
        with contextlib.suppress(OSError):  # a kernel without it: waiting clients are not counted
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
        """Go on with it for a short time; the loop has other things to do."""
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
            self._judge(self._tree.usage)
        self._cpu_used += time.thread_time() - used
        self._keep_schedule(self._began)
        self._plan_next(failed)

    def _plan_next(self, failed: bool) -> None:
        """Look again after the interval, or later when looking takes long."""
        pause = max(self.limits.sample_interval, self._cpu_used / MOST_SHARE)
        if self._shared.header.overload_state != GATE_OPEN:
            pause = min(self.limits.sample_interval / CLOSER_LOOKS, MOST_SECONDS_CLOSED)
        now = time.monotonic()
        due = max(self._began + pause, now + LEAST_SECONDS)
        if not failed:
            self._late_after = due + GAP * self.limits.sample_interval
        self._shared.header.sample_due = round(due * 1e9)
        self._loop.after(due - now, self._sample)

    # -- what is measured --

    def _judge(self, usage: Usage) -> None:
        now = time.monotonic()
        stopped = now > self._late_after
        self._write_down(usage)
        readings = totals.readings(self._shared)
        self._count_alerts(readings)
        self._close_or_open(readings)
        self._alarms.tell(readings, now, self.limits.resource_check_interval)
        self._tell_connections(now)
        if readings[Kind.MEMORY].level is not Level.VIOLATION:
            self._over_since = math.inf
        elif stopped or self._over_since == math.inf:
            self._over_since = now
        if now - self._over_since >= self.limits.memory_grace:
            self._give_memory_back(usage, now)

    def _write_down(self, usage: Usage) -> None:
        """Leave what was measured in the shared memory."""
        shared, header = self._shared, self._shared.header
        most = 100.0 * (os.cpu_count() or 1)  # clock ticks may add up to a little more
        cpu = min(most, 100.0 * usage.cpu_seconds / usage.seconds) if usage.seconds else 0.0
        counts = totals.count(shared)
        header.backlog = backlog = self._waiting_clients()
        # One that is there for a moment only is on its way in.
        lasting, self._backlog_before = min(backlog, self._backlog_before), backlog
        held, doors = self._waiting()
        rejected = {
            reason: count > self._overloaded.get(reason, count)
            for reason, count in counts.overloaded.items()
        }
        self._overloaded = counts.overloaded

        def demand(inside: int, limit: int, waits_for: int, reason: str) -> int:
            wanted = inside + held[waits_for]
            if waits_for in doors and inside >= limit:
                wanted += lasting
            return max(wanted, limit + 1 if rejected[reason] else 0)

        limits = {reading.kind: int(reading.limit) for reading in totals.readings(shared)}
        values = {
            Kind.MEMORY: usage.memory / MEGABYTE,
            Kind.CPU: cpu,
            Kind.REQUESTS: demand(
                shared.admitted_in_window(), limits[Kind.REQUESTS], WAITS_FOR_RATE, "rate"
            ),
            Kind.CONCURRENT: demand(
                counts.running, limits[Kind.CONCURRENT], WAITS_FOR_REQUEST, "concurrency"
            ),
            Kind.CONNECTIONS: demand(
                counts.connections, limits[Kind.CONNECTIONS], WAITS_FOR_CONNECTION, "connections"
            ),
        }
        for kind, value in values.items():
            header.values[kind] = round(value * SCALE)
        shared.peak_connections()  # which notes it
        header.peak_memory = max(header.peak_memory, usage.memory)
        header.peak_cpu = max(header.peak_cpu, header.values[Kind.CPU])
        header.processes = usage.processes
        header.processes_by_rss = usage.by_rss
        for slot in shared.used_slots:
            slot.memory = usage.by_root.get(slot.pid, 0)
        header.sampled_at = time.monotonic_ns()

    def _waiting_clients(self) -> int:
        if self._backlog is None:
            return 0
        try:
            return self._backlog.waiting(self.listeners)
        except OSError:
            return 0  # closed for a stop

    def _waiting(self) -> tuple[dict[int, int], set[int]]:
        """How many requests wait for what, and what the workers' doors wait for."""
        held = dict.fromkeys((WAITS_FOR_CONNECTION, WAITS_FOR_REQUEST, WAITS_FOR_RATE), 0)
        doors = set()
        for slot in self._shared.used_slots:
            doors.add(int(slot.accept_waits_for))
            if slot.request_waits_for in held:
                held[slot.request_waits_for] += slot.queued
        return held, doors

    # -- what follows --

    def _count_alerts(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            before, self._levels[reading.kind] = self._levels[reading.kind], reading.level
            if reading.level is Level.VIOLATION and before is not Level.VIOLATION:
                self._shared.header.alerts[reading.kind] += 1

    def _close_or_open(self, readings: Sequence[Reading]) -> None:
        over = any(readings[kind].level is Level.VIOLATION for kind in CLOSING)
        overload_state = GATE_CLOSED if over else GATE_OPEN
        if overload_state != self._shared.header.overload_state:
            set_overload_state(self._shared, self._wakeups, overload_state)

    def _tell_connections(self, now: float) -> None:
        full = sum(slot.full for slot in self._shared.used_slots)
        was_full, self._full = full != self._full, full
        limit = self._shared.header.max_connections
        connections = self._shared.connections()
        self._alarms.tell_connections(
            connections,
            limit,
            was_full or connections >= limit,
            now,
            self.limits.resource_check_interval,
        )

    def _give_memory_back(self, usage: Usage, now: float) -> None:
        """Have whoever holds most leave, one at a time: there is no other way.

        That is a worker, with all that it has started, or a process that a worker has started and
        left behind. A worker that has not run anything has nothing to give back.
        """
        if self._retired in usage.by_root:
            return  # the last one has not gone yet
        if self._retired in usage.orphans:
            if now >= self._kill_at:
                self._kill_at = math.inf
                self._tree.end(self._retired, signal.SIGKILL)
            return
        workers = [
            (int(slot.memory), number, slot)
            for number, slot in enumerate(self._shared.used_slots)
            if slot.pid and slot.admitted > slot.admitted_before
        ]
        largest, number, slot = max(workers, default=(0, 0, None), key=lambda each: each[0])
        orphan = max(usage.orphans, default=0, key=usage.orphans.__getitem__)
        if orphan and usage.orphans[orphan] > largest:
            self._end_orphan(orphan, usage.orphans[orphan], now)
        elif slot is not None:
            self._retire_worker(number, slot)
        elif now >= self._next_advice:
            self._next_advice = now + self.limits.resource_check_interval
            LOGGER.warning(
                "Memory stays over its limit, but no worker has run anything since it was "
                "started: raise limits.max_memory_mb, or end what else holds memory"
            )

    def _retire_worker(self, number: int, slot: Slot) -> None:
        share = f"it holds {slot.memory / MEGABYTE:.1f}MB"
        if slot.memory > self.limits.max_memory_mb * MEGABYTE:
            names = self._shared.names.all()
            function_stats = self._shared.statistics[number].function_stats
            recent = function_stats.latest(names, slot.since, RECENT_FUNCTIONS)
            share += f" alone, its last functions were {', '.join(recent) or 'none'}"
        reason = f"memory has been over its limit for {self.limits.memory_grace:g} s, and {share}"
        if self._retire(number, reason):
            self._retired = slot.pid
            self._shared.header.retired += 1

    def _end_orphan(self, pid: int, memory: int, now: float) -> None:
        name = self._tree.end(pid, signal.SIGTERM)
        if name is not None:
            self._retired, self._kill_at = pid, now + ORPHAN_SECONDS
            LOGGER.warning(
                "Process %d (%s), left by a worker that has ended, is ended: memory has been over "
                "its limit for %g s, and it holds %.1fMB",
                pid,
                name,
                self.limits.memory_grace,
                memory / MEGABYTE,
            )

    # -- what is told in any case --

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
            self._shared.peak_connections(),
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
