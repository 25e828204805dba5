"""The monitor: overload state, memory relief, statistics and log. The clock is the test's."""

import heapq
import itertools
import logging
import math
import os
import signal
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conftest import close_wakeups

from cpanbridge.supervisor import gate as gate_module
from cpanbridge.supervisor.cgroup import Memory, Processors
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory import layout as shared_module
from cpanbridge.supervisor.memory import rate_window as window_module
from cpanbridge.supervisor.memory.fields import (
    CONCURRENCY,
    CONNECTIONS,
    GATE_CLOSED,
    GATE_OPEN,
    RATE,
    REASONS,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    Slot,
)
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.monitor import cgroup_memory
from cpanbridge.supervisor.monitor import monitor as monitor_module
from cpanbridge.supervisor.monitor.monitor import Monitor
from cpanbridge.supervisor.reports import surroundings
from cpanbridge.supervisor.system import process_tree as tree_module
from cpanbridge.supervisor.system.process_tree import Usage

WORKERS = 3


class Harness:
    """A monitor whose loop, clock, tree and listen queue are the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        self.now_ns = 10**15
        self.wall_ns = 1_700_000_000 * 10**9
        clock = types.SimpleNamespace(
            monotonic=lambda: self.now_ns / 1e9,
            monotonic_ns=lambda: self.now_ns,
            time=lambda: self.wall_ns / 1e9,
            time_ns=lambda: self.wall_ns,
            thread_time=lambda: self.now_ns / 1e9,
        )
        for module in (monitor_module, gate_module, shared_module, window_module):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(monitor_module, "Tree", lambda root: self)
        monkeypatch.setattr(monitor_module, "Backlog", lambda: self)
        self.groups: list[Memory] = []
        cgroups = types.SimpleNamespace(
            memory=lambda: self.groups, processors=lambda: Processors(4, math.inf, "")
        )
        for module in (cgroup_memory, surroundings):
            monkeypatch.setattr(module, "Cgroups", lambda: cgroups)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(tree_module, "inherit_orphans", lambda: None)
        self.limits = Limits(**({"max_memory_mb": 1000, "max_cpu_percent": 200.0} | limits))
        self.shared = Shared.create(WORKERS, self.limits)
        self.wakeups = [Wakeups.create() for _ in range(WORKERS)]
        weakref.finalize(self, close_wakeups, self.wakeups)
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in range(WORKERS)]
        for number, slot in enumerate(self.shared.slots):
            slot.pid = 100 + number
            slot.admitted = slot.succeeded = 1
        # What the next samples find: megabytes, of each worker and of the rest; percent of CPU.
        self.memory = [50.0] * WORKERS
        self.others = 50.0
        self.orphans: dict[int, float] = {}
        self.signals: list[tuple[int, signal.Signals]] = []
        self.cpu = 10.0
        self.sample_takes = 0.0  # seconds
        self.error: OSError | None = None
        self.queue = 0
        self.retired: list[tuple[int, str]] = []
        self.can_retire = True
        self.samples: list[float] = []  # when
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.monitor = Monitor(
            self,  # type: ignore[arg-type]
            self.shared,
            self.wakeups,
            self.limits,
            [],
            self.retire,
        )

    # -- what the monitor calls --

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), action))

    def steps(self, roots: Sequence[int]) -> Iterator[None]:
        before = self.samples[-1] if self.samples else self.now
        self.samples.append(self.now)
        seconds = self.now - before
        self.pass_time(self.sample_takes)
        if self.error is not None:
            raise self.error
        yield
        memory = [round(each * MEGABYTE) for each in self.memory]
        pids = [slot.pid for slot in self.shared.slots]
        orphans = {pid: round(each * MEGABYTE) for pid, each in self.orphans.items()}
        self.usage = Usage(
            seconds=seconds,
            cpu_seconds=self.cpu / 100 * seconds,
            memory=sum(memory) + sum(orphans.values()) + round(self.others * MEGABYTE),
            orphans=orphans,
            by_root={pid: each for pid, each in zip(pids, memory, strict=True) if pid in roots},
            processes=1 + len(roots),
            by_rss=0,
        )

    def end(self, pid: int, number: signal.Signals) -> str | None:
        self.signals.append((pid, number))
        return "leaky"

    def waiting(self, listeners: object) -> int:
        if self.queue < 0:
            raise OSError("closed")
        return self.queue

    def retire(self, number: int, reason: str) -> bool:
        self.retired.append((number, reason))
        return self.can_retire

    # -- what the tests call --

    @property
    def now(self) -> float:
        return self.now_ns / 1e9

    def pass_time(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    def start(self) -> "Harness":
        self.monitor.start()
        return self

    def sample(self) -> None:
        """Advance the clock to the next sample, and take it."""
        (at, _, action) = heapq.heappop(self._timers)
        self.now_ns = max(self.now_ns, round(at * 1e9))
        action()

    def sample_for(self, seconds: float) -> None:
        """Advance the clock by so many seconds, with all samples that are due."""
        end = self.now + seconds
        while self._timers[0][0] <= end + 1e-6:
            self.sample()
        self.now_ns = max(self.now_ns, round(end * 1e9))

    @property
    def closed(self) -> bool:
        return bool(self.shared.header.overload_state == GATE_CLOSED)

    def slot(self, number: int) -> Slot:
        return self.shared.slots[number]

    def replace(self, number: int) -> None:
        """A worker has ended, and a new one is in its slot."""
        slot = self.slot(number)
        self.shared.clear(slot)
        slot.pid = 200 + number
        slot.since = self.now_ns
        slot.admitted_before = slot.admitted
        self.memory[number] = 20

    def value(self, kind: Kind) -> float:
        return float(self.shared.header.values[kind] / SCALE)

    def alerts(self) -> dict[str, int]:
        alerts = self.shared.header.alerts
        return {kind.name.lower(): alerts[kind] for kind in Kind if alerts[kind]}


NewHarness = Callable[..., Harness]


@pytest.fixture
def new_harness(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> NewHarness:
    caplog.set_level(logging.INFO, "cpanbridge.master")
    return lambda **limits: Harness(monkeypatch, **limits).start()


def lines(caplog: pytest.LogCaptureFixture, containing: str = "") -> list[str]:
    """The log so far."""
    logged = [f"{each.levelname} {each.getMessage()}" for each in caplog.records]
    return [line for line in logged if containing in line]


# -- the overload state --


@pytest.mark.parametrize("kind", ["memory", "cpu"])
def test_the_gate_closes_over_a_limit_and_opens_by_itself(
    new_harness: NewHarness, kind: str
) -> None:
    harness = new_harness()
    harness.sample()
    assert not harness.closed

    def load(share: float) -> None:
        if kind == "memory":
            harness.others = share * 1000 - sum(harness.memory)
        else:
            harness.cpu = share * 200

    for share, closed in ((0.9, False), (1.0, False), (1.01, True), (1.5, True), (0.95, False)):
        load(share)
        harness.sample()
        assert harness.closed is closed
    assert harness.shared.header.closings == 1


def test_a_violation_of_a_limit_that_the_gate_keeps_does_not_close_it(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(max_concurrent_requests=1, max_connections=1, max_requests_per_minute=1)
    slot = harness.slot(0)
    slot.admitted, slot.opened = 10, 10
    harness.shared.window.record(harness.now_ns)
    slot.request_waits_for, slot.queued = WAITS_FOR_RATE, 1
    harness.sample()
    assert harness.alerts() == {"requests": 1, "concurrent": 1, "connections": 1}
    assert not harness.closed


def allow(harness: Harness, *groups: tuple[int, int]) -> None:
    """From now on there are these cgroups: their limits, and what is used of these; megabytes."""
    harness.groups = [
        Memory(f"/cgroup{number}", limit * MEGABYTE, used * MEGABYTE)
        for number, (limit, used) in enumerate(groups)
    ]


def test_the_gate_closes_at_nine_tenths_of_what_a_cgroup_allows(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(max_memory_mb=1000)  # the tree has 200 MB
    allow(harness, (300, 200), (1200, 900))
    harness.sample()
    assert not harness.closed
    # Read anew for each sample: a limit that is changed holds for the next one.
    allow(harness, (300, 200), (220, 150))
    harness.sample()
    assert harness.closed
    allow(harness, (300, 200), (210, 150))
    harness.sample()  # not logged: some hosts adjust such a limit all the time
    assert lines(caplog, "exceeds")[0].endswith("['Memory usage 200.0MB exceeds limit 198MB']")
    assert lines(caplog, "memory limit") == [
        "INFO The memory limit is 270 MB, nine tenths of the 300 MB of /cgroup0",
        "INFO The memory limit is 198 MB, nine tenths of the 220 MB of /cgroup1",
    ]
    allow(harness)
    harness.sample()
    assert not harness.closed
    assert lines(caplog, "memory limit")[2] == (
        "INFO The memory limit is 1000 MB, limits.max_memory_mb (no cgroup limits it)"
    )


def test_what_else_is_in_a_cgroup_counts_when_that_is_nearer_to_its_limit(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(max_memory_mb=1000, memory_grace=1)
    allow(harness, (4000, 3500), (5000, 4600))
    harness.sample()
    assert harness.closed
    (line,) = lines(caplog, "CRITICAL")
    assert line.endswith("['Memory of the cgroup 4600.0MB exceeds limit 4500MB']")
    harness.sample_for(3)
    assert len(harness.retired) == 1  # which is all that the daemon can give back
    assert harness.alerts() == {"cgroup_memory": 1}
    allow(harness, (4000, 3500), (5000, 3000))
    harness.sample()
    assert not harness.closed


def test_it_samples_four_times_as_often_while_the_gate_is_closed(new_harness: NewHarness) -> None:
    harness = new_harness(sample_interval=2)
    harness.sample_for(10)
    harness.cpu = 300
    harness.sample_for(10)
    harness.cpu = 10
    harness.sample_for(10)
    gaps = [round(b - a, 3) for a, b in itertools.pairwise(harness.samples)]
    closed = gaps.count(0.5)
    assert gaps == [2] * 6 + [0.5] * closed + [2] * (len(gaps) - 6 - closed)
    assert closed >= 4 * 4


def test_it_opens_within_a_second_of_recovery(new_harness: NewHarness) -> None:
    harness = new_harness()
    harness.cpu = 300
    harness.sample_for(3)
    assert harness.closed
    harness.cpu = 10
    harness.sample_for(0.5)
    assert not harness.closed


def test_samples_take_no_more_than_a_small_share_of_the_time(new_harness: NewHarness) -> None:
    harness = new_harness()
    harness.sample_takes = 0.1
    harness.sample_for(600)
    assert len(harness.samples) * 0.1 <= 0.02 * 600 + 0.2


# -- memory relief --


def over(harness: Harness, *memory: float) -> None:
    """From now on the workers hold so many megabytes."""
    harness.memory = list(memory)


def test_the_worker_that_holds_most_is_retired_after_the_grace(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 300, 600, 200)
    harness.sample()
    began = harness.now
    assert harness.closed
    harness.sample_for(4.9)
    assert harness.retired == []
    harness.sample_for(0.3)
    assert [number for number, _ in harness.retired] == [1]
    assert harness.now - began >= 5
    assert harness.retired[0][1] == ("memory has been over its limit for 5 s, and it holds 600.0MB")
    assert harness.shared.header.retired == 1


def test_memory_that_falls_in_time_retires_nobody(new_harness: NewHarness) -> None:
    harness = new_harness(memory_grace=5)
    for _ in range(10):
        over(harness, 300, 600, 200)
        harness.sample_for(4)
        over(harness, 300, 100, 200)
        harness.sample_for(2)
    assert harness.retired == []


def test_one_worker_at_a_time_is_retired_until_the_tree_fits(new_harness: NewHarness) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 900, 800, 700)
    harness.sample_for(60)
    assert [number for number, _ in harness.retired] == [0]  # it has not ended yet
    harness.replace(0)
    harness.sample_for(30)
    assert [number for number, _ in harness.retired] == [0, 1]
    assert harness.closed
    harness.replace(1)
    harness.sample_for(30)
    assert [number for number, _ in harness.retired] == [0, 1]  # it was enough
    assert not harness.closed
    assert harness.shared.header.retired == 2


def test_a_worker_that_cannot_be_retired_is_tried_again_and_not_counted(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(memory_grace=5)
    harness.can_retire = False
    over(harness, 900, 800, 700)
    harness.sample_for(10)
    assert len(harness.retired) > 1
    assert harness.shared.header.retired == 0


def test_only_a_worker_that_has_run_something_is_retired(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 900, 800, 700)
    for number in (0, 2):
        harness.slot(number).admitted_before = harness.slot(number).admitted
    harness.sample_for(8)
    assert [number for number, _ in harness.retired] == [1]


def test_memory_that_no_worker_can_give_back_is_logged_once_per_interval(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(memory_grace=5)
    harness.others = 5000
    for slot in harness.shared.slots:
        slot.admitted_before = slot.admitted
    harness.sample_for(10)
    advice = [
        "WARNING Memory stays over its limit, but no worker has run anything since it was "
        "started, so the idle daemon takes as much (5150MB): raise limits.max_memory_mb, "
        "or what the cgroup allows, have fewer workers, or end what else holds memory"
    ]
    assert lines(caplog, "raise limits") == advice
    harness.sample_for(54)
    assert lines(caplog, "raise limits") == advice
    harness.sample_for(60)
    assert lines(caplog, "raise limits") == 2 * advice
    assert harness.retired == []


def test_a_worker_over_the_limit_by_itself_is_retired_with_its_last_functions(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(memory_grace=5)
    harness.slot(2).since = harness.now_ns
    harness.pass_time(1)
    with harness.shared.lock:
        numbers = [harness.shared.names.number_of(f"report.f{each}") for each in range(8)]
    for number in numbers:
        harness.pass_time(1)
        harness.shared.statistics[2].function_stats.add(number, True, 1, harness.now_ns)
    over(harness, 10, 20, 1500)
    harness.sample_for(8)
    assert harness.retired == [
        (
            2,
            "memory has been over its limit for 5 s, and it holds 1500.0MB alone, its last "
            "functions were report.f7, report.f6, report.f5, report.f4, report.f3",
        )
    ]


def test_a_worker_over_the_limit_that_has_finished_nothing_has_no_functions(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(memory_grace=0)
    over(harness, 10, 20, 1500)
    harness.sample()
    assert harness.retired[0][1].endswith("1500.0MB alone, its last functions were none")


def test_an_orphan_that_holds_most_is_ended_and_no_worker_is_retired(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(memory_grace=1)
    over(harness, 50, 50, 50)
    harness.orphans = {77: 900.0, 78: 20.0}
    harness.sample_for(3)
    assert harness.signals == [(77, signal.SIGTERM)]  # and again only if it does not help
    assert harness.retired == []
    (line,) = lines(caplog, "Process 77 (leaky), left by a worker that has ended, is ended")
    assert line.endswith("memory has been over its limit for 1 s, and it holds 900.0MB")
    harness.sample_for(5)
    assert harness.signals == [(77, signal.SIGTERM), (77, signal.SIGKILL)]
    harness.orphans = {78: 20.0}
    harness.sample_for(3)
    assert not harness.closed
    assert len(harness.signals) == 2


def test_a_worker_that_holds_more_than_an_orphan_is_retired_first(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(memory_grace=1)
    over(harness, 50, 900, 50)
    harness.orphans = {77: 800.0}
    harness.sample_for(3)
    assert [number for number, _ in harness.retired] == [1]
    assert harness.signals == []


def test_while_the_gate_is_closed_it_samples_often_however_long_that_takes(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(max_cpu_percent=50)
    harness.sample_takes = 0.2
    harness.cpu = 90
    harness.sample_for(60)
    assert harness.closed
    seen = len(harness.samples)
    harness.sample_for(10)
    assert len(harness.samples) - seen >= 19


def test_too_much_cpu_retires_nobody(new_harness: NewHarness) -> None:
    harness = new_harness(memory_grace=5)
    harness.cpu = 390
    harness.sample_for(60)
    assert harness.closed
    assert harness.retired == []


def test_time_in_which_the_process_was_stopped_does_not_count_as_grace(
    new_harness: NewHarness,
) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 300, 600, 200)
    harness.sample()
    harness.pass_time(100)  # SIGSTOP, or a virtual machine that was not run
    harness.sample()
    harness.sample_for(4.9)
    assert harness.retired == []
    harness.sample_for(0.5)
    assert [number for number, _ in harness.retired] == [1]


def test_the_grace_passes_also_when_each_sample_takes_long(new_harness: NewHarness) -> None:
    """A large tree, or a busy machine: then there is more time between two samples."""
    harness = new_harness(memory_grace=5)
    harness.sample_takes = 0.09
    over(harness, 300, 600, 200)
    harness.sample_for(20)
    assert [number for number, _ in harness.retired][:1] == [1]


def test_replaced_limits_hold_from_the_next_sample(new_harness: NewHarness) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 300, 300, 300)
    harness.sample()
    limits = Limits(max_memory_mb=500, memory_grace=0, sample_interval=4)
    harness.monitor.limits = limits
    assert harness.shared.apply_limits(limits)
    harness.sample()
    assert harness.closed
    assert len(harness.retired) == 1
    over(harness, 10, 10, 10)
    harness.sample_for(30)
    assert round(harness.samples[-1] - harness.samples[-2], 3) == 4


# -- what is recorded --


def test_a_sample_is_recorded_in_the_shared_memory(new_harness: NewHarness) -> None:
    harness = new_harness()
    over(harness, 100, 200, 300)
    harness.others, harness.cpu, harness.queue = 150, 42.5, 7
    harness.sample()
    header = harness.shared.header
    assert harness.value(Kind.MEMORY) == 750
    assert harness.value(Kind.CPU) == pytest.approx(42.5, abs=0.001)
    assert [slot.memory // MEGABYTE for slot in harness.shared.slots] == [100, 200, 300]
    assert (header.processes, header.processes_by_rss, header.backlog) == (1 + WORKERS, 0, 7)
    assert header.sampled_at == harness.now_ns
    over(harness, 10, 10, 10)
    harness.cpu = 5
    harness.sample()
    assert header.peak_memory == 750 * MEGABYTE
    assert header.peak_cpu == pytest.approx(42_500, abs=1)
    assert harness.slot(2).memory == 10 * MEGABYTE


def test_cpu_is_never_more_than_the_machine_has(new_harness: NewHarness) -> None:
    harness = new_harness()
    harness.cpu = 100_000
    harness.sample()
    assert harness.value(Kind.CPU) == 400


def test_alerts_are_counted_by_kind_when_a_violation_begins(new_harness: NewHarness) -> None:
    harness = new_harness()
    assert harness.alerts() == {}
    for _ in range(3):
        harness.cpu = 250
        harness.sample_for(10)
        harness.cpu = 180  # a warning is none
        harness.sample_for(10)
    harness.others = 2000
    harness.sample_for(10)
    assert harness.alerts() == {"cpu": 3, "memory": 1}


def test_the_demand_includes_what_waits(new_harness: NewHarness) -> None:
    harness = new_harness(max_requests_per_minute=100)
    first, second, third = harness.shared.slots
    first.admitted, first.succeeded, first.opened = 10, 4, 8
    for _ in range(60):
        harness.shared.window.record(harness.now_ns)

    def demand() -> list[float]:
        harness.sample()
        return [harness.value(kind) for kind in (Kind.REQUESTS, Kind.CONCURRENT, Kind.CONNECTIONS)]

    assert demand() == [60, 6, 8]
    # Threads whose requests wait for room to run, or for the rate.
    first.request_waits_for, first.queued = WAITS_FOR_REQUEST, 3
    second.request_waits_for, second.queued = WAITS_FOR_REQUEST, 2
    third.request_waits_for, third.queued = WAITS_FOR_RATE, 4
    assert demand() == [64, 11, 8]
    # Clients in the listen queue wait for what the accepting threads wait for.
    first.opened = 100
    for _ in range(40):
        harness.shared.window.record(harness.now_ns)
    harness.queue = 20
    assert demand() == demand() == [104, 11, 100]  # they wait for nothing
    first.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand() == [104, 11, 120]
    second.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand() == [104, 11, 120]  # no client is counted twice
    first.accept_waits_for = second.accept_waits_for = WAITS_FOR_RATE
    assert demand() == [124, 11, 100]
    harness.queue = -1  # the listeners are closed
    assert demand() == [104, 11, 100]
    # A client that only one of two samples finds was about to be accepted.
    harness.queue = 20
    assert demand() == [104, 11, 100]
    assert demand() == [124, 11, 100]
    # Where there is room they wait for something else, for a moment.
    first.opened = 99
    first.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand()[2] == 99


def test_the_demand_is_over_the_limit_when_a_client_was_rejected_since_the_last_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(monkeypatch, max_requests_per_minute=100)
    slot = harness.slot(1)
    slot.overloaded[REASONS.index(RATE)] = 1000  # long ago, under an earlier master
    harness.start()
    assert harness.value(Kind.REQUESTS) == 0

    def demand() -> list[float]:
        harness.sample()
        return [harness.value(kind) for kind in (Kind.REQUESTS, Kind.CONCURRENT, Kind.CONNECTIONS)]

    for reason, count in ((RATE, 5), (CONCURRENCY, 3), (CONNECTIONS, 2)):
        slot.overloaded[REASONS.index(reason)] += count
    assert demand() == [101, 101, 101]
    assert demand() == [0, 0, 0]


def test_a_rate_that_only_reaches_its_limit_is_no_violation(new_harness: NewHarness) -> None:
    harness = new_harness(max_requests_per_minute=5)
    for _ in range(5):
        harness.shared.window.record(harness.now_ns)
    harness.sample()
    assert harness.alerts() == {}
    slot = harness.slot(0)
    slot.request_waits_for, slot.queued = WAITS_FOR_RATE, 1
    harness.sample()
    assert harness.alerts() == {"requests": 1}


# -- the log --


def test_a_violation_is_one_line_and_then_one_per_interval(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(resource_check_interval=60)
    harness.cpu = 250
    harness.sample_for(59)
    words = "RESOURCE VIOLATION: ['CPU usage 250.0% exceeds limit 200%']"
    assert lines(caplog, "VIOLATION") == [f"CRITICAL {words}"]
    harness.sample_for(120)
    assert lines(caplog, "VIOLATION") == [f"CRITICAL {words}"] * 3


def test_a_connection_limit_reached_between_two_samples_is_logged(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(max_connections=10)
    harness.slot(1).full += 1
    harness.sample()
    harness.sample_for(30)
    assert lines(caplog, "limit reached") == [
        "WARNING Connection limit reached (10), rejecting new connections"
    ]


def test_health_is_logged_every_minute_and_the_load_every_five(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness()
    slot = harness.slot(0)
    slot.admitted, slot.succeeded, slot.failed, slot.opened, slot.closed = 5242, 5222, 12, 40, 25
    harness.shared.header.peak_connections = 28
    harness.cpu = 45.3
    harness.sample_for(299)
    assert lines(caplog, "Resource summary") == []
    harness.sample_for(2)
    health = lines(caplog, "Health check")
    assert len(health) == 5
    assert health[0] == (
        "INFO Health check - Uptime: 60s, Requests: 5236, Errors: 12, "
        "Active connections: 15/28 (current/peak)"
    )
    assert lines(caplog, "Resource summary") == [
        "INFO Resource summary - Memory: 200.0MB (peak: 200.0MB), CPU: 45.3% (peak: 45.3%), "
        "Concurrent: 8, Requests/min: 0"
    ]


def test_the_time_of_the_last_resource_check_is_recorded(new_harness: NewHarness) -> None:
    harness = new_harness(resource_check_interval=30)
    harness.sample_for(29)
    assert harness.shared.header.checked_at == 0
    harness.sample_for(1)
    assert harness.shared.header.checked_at == harness.now_ns
    harness.sample_for(29)
    assert harness.shared.header.checked_at == harness.now_ns - 29 * 10**9


# -- errors --


def test_a_sample_that_fails_is_logged_once_per_interval(
    new_harness: NewHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness = new_harness(resource_check_interval=60)
    harness.cpu = 250
    harness.sample()
    harness.error = OSError(24, "Too many open files")
    harness.sample_for(59)
    logged = [
        "ERROR Cannot look at the processes: Too many open files: "
        "raise this process's limit (ulimit -n, LimitNOFILE=)"
    ]
    assert lines(caplog, "Cannot look") == logged
    assert harness.closed  # no sample says that it may open
    assert len(lines(caplog, "Health check")) == 1  # the rest goes on
    harness.sample_for(60)
    assert lines(caplog, "Cannot look") == 2 * logged
    harness.error, harness.cpu = None, 10
    harness.sample()
    assert not harness.closed


def test_failed_samples_do_not_count_as_grace(new_harness: NewHarness) -> None:
    harness = new_harness(memory_grace=5)
    over(harness, 300, 600, 200)
    harness.sample()
    harness.error = OSError(24, "Too many open files")
    harness.sample_for(20)
    harness.error = None
    harness.sample()
    assert harness.retired == []


@pytest.mark.parametrize("what", ["inherit_orphans", "Backlog"])
def test_a_kernel_that_lacks_a_feature_is_monitored_without_it(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    harness = Harness(monkeypatch)

    def lacks() -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(tree_module if what == "inherit_orphans" else monitor_module, what, lacks)
    harness.start()
    harness.cpu = 250
    harness.sample()
    assert harness.closed


def test_setting_the_wall_clock_back_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cpanbridge.master")

    def story(shift_ns: int) -> tuple[list[str], list[float], list[tuple[int, str]], list[int]]:
        caplog.clear()
        harness = Harness(monkeypatch, memory_grace=5).start()
        for step in range(40):
            harness.wall_ns += shift_ns if step % 2 else 10**9
            if step == 5:
                over(harness, 300, 600, 200)
            if step == 25:
                harness.replace(1)
            harness.cpu = 150 + 5 * (step % 20)
            harness.sample_for(20 if step % 7 == 0 else 1)
        header = harness.shared.header
        numbers = [header.closings, header.retired, header.changed_at, header.checked_at]
        return lines(caplog), harness.samples, harness.retired, numbers

    assert story(-3600 * 10**9) == story(10**9)
    assert lines(caplog, "VIOLATION")


def test_the_gate_is_open_from_the_start(new_harness: NewHarness) -> None:
    assert new_harness().shared.header.overload_state == GATE_OPEN
