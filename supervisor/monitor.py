"""The master's watch over the load of the whole tree, and what follows from it.

Every `sample_interval` it looks at memory, CPU, requests and connections, leaves the numbers in the
shared memory for reports, and tells the log. While memory or CPU is over its limit the verdict is
closed; then it looks four times as often, so that the gate is open again within a second of
recovery. Running requests go on.

Memory does not fall by waiting, because an interpreter hardly ever gives it back. So when it has
been over its limit for `memory_grace`, the worker that holds most is retired; and the next one only
when that one has gone and it was not enough.

Times are CLOCK_MONOTONIC, which stands still while the machine is suspended and does not know what
the wall clock is set to. Called in the master's loop.
"""

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence

from cpanbridge.supervisor import totals, tree
from cpanbridge.supervisor.alarms import Alarms
from cpanbridge.supervisor.backlog import Backlog
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Bells, change_verdict
from cpanbridge.supervisor.loop import Loop
from cpanbridge.supervisor.shared import (
    VERDICT_CLOSED,
    VERDICT_OPEN,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    Shared,
)
from cpanbridge.supervisor.tree import Tree, Usage
from cpanbridge.supervisor.verdict import CLOSING, MEGABYTE, SCALE, Kind, Level, Reading

LOGGER = logging.getLogger("cpanbridge.master")

CLOSER_LOOKS = 4  # samples in an interval while the verdict is closed
LEAST_SECONDS = 0.05  # between two samples
MOST_SHARE = 0.02  # of the time may go into samples
HEALTH_SECONDS = 60.0
SUMMARY_SECONDS = 300.0
# A sample that comes so many intervals late: the process, or the machine, was stopped.
GAP = 3
RECENT_FUNCTIONS = 5

Retire = Callable[[int, str], bool]


class Monitor:
    """One daemon's monitor.

    `retire` tells the worker in a slot to leave, with the reason, and returns whether it was there
    to be told. `limits` and `listeners` may be replaced when a reload changes them.
    """

    def __init__(
        self,
        loop: Loop,
        shared: Shared,
        bells: Sequence[Bells],
        limits: Limits,
        listeners: Sequence[socket.socket],
        retire: Retire,
    ) -> None:
        self.limits = limits
        self.listeners = listeners
        self._loop = loop
        self._shared = shared
        self._bells = bells
        self._retire = retire
        self._tree = Tree(os.getpid())
        self._backlog: Backlog | None = None
        self._alarms = Alarms()
        self._over_since = math.inf  # memory
        self._retired = 0  # the pid of the last worker retired for memory, until it has gone
        self._late_after = math.inf  # a sample after this time is late (see GAP)
        self._full = 0
        self._overloaded: dict[str, int] = {}
        self._levels = dict.fromkeys(Kind, Level.NORMAL)
        self._next_check = self._next_health = self._next_summary = math.inf
        self._next_advice = self._next_complaint = -math.inf

    def start(self) -> None:
        """Begin. Called once, when the daemon is ready."""
        with contextlib.suppress(OSError):  # an old kernel: orphans are not counted
            tree.adopt_orphans()
        with contextlib.suppress(OSError):  # a kernel without it: waiting clients are not counted
            self._backlog = Backlog()
        now = time.monotonic()
        self._next_check = now + self.limits.resource_check_interval
        self._next_health = now + HEALTH_SECONDS
        self._next_summary = now + SUMMARY_SECONDS
        self._sample()

    def _sample(self) -> None:
        began = time.monotonic()
        usage = None
        try:
            usage = self._tree.sample([slot.pid for slot in self._shared.used_slots if slot.pid])
        except OSError as error:  # no descriptor left, or no memory
            if began >= self._next_complaint:
                self._next_complaint = began + self.limits.resource_check_interval
                LOGGER.error("Cannot look at the processes: %s", error.strerror)
        else:
            self._judge(usage)
        took = time.monotonic() - began
        self._keep_schedule(began)
        closed = self._shared.header.verdict != VERDICT_OPEN
        interval = self.limits.sample_interval / (CLOSER_LOOKS if closed else 1)
        pause = max(interval, took / MOST_SHARE, LEAST_SECONDS)
        if usage is not None:
            self._late_after = began + pause + GAP * self.limits.sample_interval
        self._loop.after(began + pause - time.monotonic(), self._sample)

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
            self._retire_the_largest(usage, now)

    def _write_down(self, usage: Usage) -> None:
        """Leave what was measured in the shared memory."""
        shared, header = self._shared, self._shared.header
        most = 100.0 * (os.cpu_count() or 1)  # clock ticks may add up to a little more
        cpu = min(most, 100.0 * usage.cpu_seconds / usage.seconds) if usage.seconds else 0.0
        counts = totals.count(shared)
        header.backlog = backlog = self._waiting_clients()
        waiting = self._waiting(backlog)
        overloaded = {
            reason: count - self._overloaded.get(reason, count)
            for reason, count in counts.overloaded.items()
        }
        self._overloaded = counts.overloaded
        values = {
            Kind.MEMORY: usage.memory / MEGABYTE,
            Kind.CPU: cpu,
            Kind.REQUESTS: shared.admitted_in_window()
            + waiting[WAITS_FOR_RATE]
            + overloaded["rate"],
            Kind.CONCURRENT: counts.running
            + waiting[WAITS_FOR_REQUEST]
            + overloaded["concurrency"],
            Kind.CONNECTIONS: counts.connections
            + waiting[WAITS_FOR_CONNECTION]
            + overloaded["connections"],
        }
        for kind, value in values.items():
            header.values[kind] = round(value * SCALE)
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

    def _waiting(self, backlog: int) -> dict[int, int]:
        """How many clients and requests wait for what.

        Those outside wait for whatever keeps the workers' doors shut.
        """
        waiting = dict.fromkeys((WAITS_FOR_CONNECTION, WAITS_FOR_REQUEST, WAITS_FOR_RATE), 0)
        doors = set()
        for slot in self._shared.used_slots:
            doors.add(slot.door_waits_for)
            if slot.request_waits_for in waiting:
                waiting[slot.request_waits_for] += slot.queued
        for reason in doors & waiting.keys():
            waiting[reason] += backlog
        return waiting

    # -- what follows --

    def _count_alerts(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            before, self._levels[reading.kind] = self._levels[reading.kind], reading.level
            if reading.level is Level.VIOLATION and before is not Level.VIOLATION:
                self._shared.header.alerts[reading.kind] += 1

    def _close_or_open(self, readings: Sequence[Reading]) -> None:
        over = any(readings[kind].level is Level.VIOLATION for kind in CLOSING)
        verdict = VERDICT_CLOSED if over else VERDICT_OPEN
        if verdict != self._shared.header.verdict:
            change_verdict(self._shared, self._bells, verdict)

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

    def _retire_the_largest(self, usage: Usage, now: float) -> None:
        """Give memory back by the only way that there is, one worker at a time.

        A worker that has not run anything has nothing to give back.
        """
        if self._retired in usage.by_root:
            return  # the last one has not gone yet
        workers = [
            (number, slot)
            for number, slot in enumerate(self._shared.used_slots)
            if slot.pid and slot.admitted > slot.admitted_before
        ]
        if not workers:
            if now >= self._next_advice:
                self._next_advice = now + self.limits.resource_check_interval
                LOGGER.warning(
                    "Memory stays over its limit, but no worker has run anything since it was "
                    "started: raise limits.max_memory_mb, or end what else holds memory"
                )
            return
        number, slot = max(workers, key=lambda each: int(each[1].memory))
        share = f"it holds {slot.memory / MEGABYTE:.1f}MB"
        if slot.memory > self.limits.max_memory_mb * MEGABYTE:
            names = self._shared.names.all()
            tally = self._shared.books[number].tally
            recent = tally.latest(names, slot.since, RECENT_FUNCTIONS)
            share += f" alone, its last functions were {', '.join(recent) or 'none'}"
        reason = f"memory has been over its limit for {self.limits.memory_grace:g} s, and {share}"
        if self._retire(number, reason):
            self._retired = slot.pid
            self._shared.header.retired += 1

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
