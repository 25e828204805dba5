"""What follows from the load: the verdict, the log, and who is retired. Time is the test's."""

import heapq
import itertools
import logging
import os
import signal
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conftest import take_down

from cpanbridge.supervisor import gate as gate_module
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate, Wakeups
from cpanbridge.supervisor.memory import layout as shared_module
from cpanbridge.supervisor.memory import rate_window as window_module
from cpanbridge.supervisor.memory.layout import (
    GATE_CLOSED,
    GATE_OPEN,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    Shared,
    Slot,
)
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind
from cpanbridge.supervisor.monitor import monitor as monitor_module
from cpanbridge.supervisor.monitor.monitor import Monitor
from cpanbridge.supervisor.system import process_tree as tree_module
from cpanbridge.supervisor.system.process_tree import Usage

WORKERS = 3


class Tower:
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
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(tree_module, "inherit_orphans", lambda: None)
        self.limits = Limits(**({"max_memory_mb": 1000, "max_cpu_percent": 200.0} | limits))
        self.shared = Shared.create(WORKERS, self.limits)
        self.wakeups = [Wakeups.hang() for _ in range(WORKERS)]
        weakref.finalize(self, take_down, self.wakeups)
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in range(WORKERS)]
        for number, slot in enumerate(self.shared.slots):
            slot.pid = 100 + number
            slot.admitted = slot.succeeded = 1
        # What the next samples find: megabytes, for each worker and for the rest; percent.
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
        self.looks: list[float] = []  # when
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

    # -- what the monitor sees of it --

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), action))

    def steps(self, roots: Sequence[int]) -> Iterator[None]:
        before = self.looks[-1] if self.looks else self.now
        self.looks.append(self.now)
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

    # -- the test's side --

    @property
    def now(self) -> float:
        return self.now_ns / 1e9

    def pass_time(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    def start(self) -> "Tower":
        self.monitor.start()
        return self

    def look(self) -> None:
        """Let the time come for the next sample."""
        (at, _, action) = heapq.heappop(self._timers)
        self.now_ns = max(self.now_ns, round(at * 1e9))
        action()

    def look_for(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._timers[0][0] <= end + 1e-6:
            self.look()
        self.now_ns = max(self.now_ns, round(end * 1e9))

    @property
    def closed(self) -> bool:
        return bool(self.shared.header.overload_state == GATE_CLOSED)

    def slot(self, number: int) -> Slot:
        return self.shared.slots[number]

    def replace(self, number: int) -> None:
        """A worker has gone, and a fresh one has its place."""
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


NewTower = Callable[..., Tower]


@pytest.fixture
def new_tower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> NewTower:
    caplog.set_level(logging.INFO, "cpanbridge.master")
    return lambda **limits: Tower(monkeypatch, **limits).start()


def lines(caplog: pytest.LogCaptureFixture, containing: str = "") -> list[str]:
    """What was logged so far."""
    logged = [f"{each.levelname} {each.getMessage()}" for each in caplog.records]
    return [line for line in logged if containing in line]


# -- the verdict --


@pytest.mark.parametrize("kind", ["memory", "cpu"])
def test_the_gate_closes_over_a_limit_and_opens_by_itself(new_tower: NewTower, kind: str) -> None:
    tower = new_tower()
    tower.look()
    assert not tower.closed

    def load(share: float) -> None:
        if kind == "memory":
            tower.others = share * 1000 - sum(tower.memory)
        else:
            tower.cpu = share * 200

    for share, closed in ((0.9, False), (1.0, False), (1.01, True), (1.5, True), (0.95, False)):
        load(share)
        tower.look()
        assert tower.closed is closed
    assert tower.shared.header.closings == 1


def test_a_violation_of_what_the_gate_keeps_itself_does_not_close_it(new_tower: NewTower) -> None:
    tower = new_tower(max_concurrent_requests=1, max_connections=1, max_requests_per_minute=1)
    slot = tower.slot(0)
    slot.admitted, slot.opened = 10, 10
    tower.shared.window.record(tower.now_ns)
    slot.request_waits_for, slot.queued = WAITS_FOR_RATE, 1
    tower.look()
    assert tower.alerts() == {"requests": 1, "concurrent": 1, "connections": 1}
    assert not tower.closed


def test_it_looks_four_times_as_often_while_the_gate_is_closed(new_tower: NewTower) -> None:
    tower = new_tower(sample_interval=2)
    tower.look_for(10)
    tower.cpu = 300
    tower.look_for(10)
    tower.cpu = 10
    tower.look_for(10)
    gaps = [round(b - a, 3) for a, b in itertools.pairwise(tower.looks)]
    closed = gaps.count(0.5)
    assert gaps == [2] * 6 + [0.5] * closed + [2] * (len(gaps) - 6 - closed)
    assert closed >= 4 * 4


def test_it_opens_within_a_second_of_recovery(new_tower: NewTower) -> None:
    tower = new_tower()
    tower.cpu = 300
    tower.look_for(3)
    assert tower.closed
    tower.cpu = 10
    tower.look_for(0.5)
    assert not tower.closed


def test_looking_takes_no_more_than_a_small_share_of_the_time(new_tower: NewTower) -> None:
    tower = new_tower()
    tower.sample_takes = 0.1
    tower.look_for(600)
    assert len(tower.looks) * 0.1 <= 0.02 * 600 + 0.2


# -- self-healing --


def over(tower: Tower, *memory: float) -> None:
    """From now on the workers hold so much."""
    tower.memory = list(memory)


def test_the_worker_that_holds_most_is_retired_after_the_grace(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 300, 600, 200)
    tower.look()
    began = tower.now
    assert tower.closed
    tower.look_for(4.9)
    assert tower.retired == []
    tower.look_for(0.3)
    assert [number for number, _ in tower.retired] == [1]
    assert tower.now - began >= 5
    assert tower.retired[0][1] == ("memory has been over its limit for 5 s, and it holds 600.0MB")
    assert tower.shared.header.retired == 1


def test_memory_that_falls_in_time_retires_nobody(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    for _ in range(10):
        over(tower, 300, 600, 200)
        tower.look_for(4)
        over(tower, 300, 100, 200)
        tower.look_for(2)
    assert tower.retired == []


def test_one_is_retired_at_a_time_until_the_tree_fits(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 900, 800, 700)
    tower.look_for(60)
    assert [number for number, _ in tower.retired] == [0]  # it is still there
    tower.replace(0)
    tower.look_for(30)
    assert [number for number, _ in tower.retired] == [0, 1]
    assert tower.closed
    tower.replace(1)
    tower.look_for(30)
    assert [number for number, _ in tower.retired] == [0, 1]  # it was enough
    assert not tower.closed
    assert tower.shared.header.retired == 2


def test_a_worker_that_cannot_be_retired_is_asked_again_and_not_counted(
    new_tower: NewTower,
) -> None:
    tower = new_tower(memory_grace=5)
    tower.can_retire = False
    over(tower, 900, 800, 700)
    tower.look_for(10)
    assert len(tower.retired) > 1
    assert tower.shared.header.retired == 0


def test_only_a_worker_that_has_run_something_is_retired(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 900, 800, 700)
    for number in (0, 2):
        tower.slot(number).admitted_before = tower.slot(number).admitted
    tower.look_for(8)
    assert [number for number, _ in tower.retired] == [1]


def test_memory_that_no_worker_can_give_back_is_told_once_per_interval(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(memory_grace=5)
    tower.others = 5000
    for slot in tower.shared.slots:
        slot.admitted_before = slot.admitted
    tower.look_for(10)
    advice = [
        "WARNING Memory stays over its limit, but no worker has run anything since it was "
        "started: raise limits.max_memory_mb, or end what else holds memory"
    ]
    assert lines(caplog, "raise limits") == advice
    tower.look_for(54)
    assert lines(caplog, "raise limits") == advice
    tower.look_for(60)
    assert lines(caplog, "raise limits") == 2 * advice
    assert tower.retired == []


def test_who_holds_a_limits_worth_alone_is_named_with_what_it_ran(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    tower.slot(2).since = tower.now_ns
    tower.pass_time(1)
    with tower.shared.lock:
        numbers = [tower.shared.names.number_of(f"report.f{each}") for each in range(8)]
    for number in numbers:
        tower.pass_time(1)
        tower.shared.statistics[2].function_stats.add(number, True, 1, tower.now_ns)
    over(tower, 10, 20, 1500)
    tower.look_for(8)
    assert tower.retired == [
        (
            2,
            "memory has been over its limit for 5 s, and it holds 1500.0MB alone, its last "
            "functions were report.f7, report.f6, report.f5, report.f4, report.f3",
        )
    ]


def test_a_hoarder_that_has_not_finished_anything_is_named_all_the_same(
    new_tower: NewTower,
) -> None:
    tower = new_tower(memory_grace=0)
    over(tower, 10, 20, 1500)
    tower.look()
    assert tower.retired[0][1].endswith("1500.0MB alone, its last functions were none")


def test_what_a_worker_has_left_behind_is_ended_before_any_other_worker_is(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(memory_grace=1)
    over(tower, 50, 50, 50)
    tower.orphans = {77: 900.0, 78: 20.0}
    tower.look_for(3)
    assert tower.signals == [(77, signal.SIGTERM)]  # and again only if it does not help
    assert tower.retired == []
    (line,) = lines(caplog, "Process 77 (leaky), left by a worker that has ended, is ended")
    assert line.endswith("memory has been over its limit for 1 s, and it holds 900.0MB")
    tower.look_for(5)
    assert tower.signals == [(77, signal.SIGTERM), (77, signal.SIGKILL)]
    tower.orphans = {78: 20.0}
    tower.look_for(3)
    assert not tower.closed
    assert len(tower.signals) == 2


def test_a_worker_that_holds_more_than_what_was_left_behind_is_retired_first(
    new_tower: NewTower,
) -> None:
    tower = new_tower(memory_grace=1)
    over(tower, 50, 900, 50)
    tower.orphans = {77: 800.0}
    tower.look_for(3)
    assert [number for number, _ in tower.retired] == [1]
    assert tower.signals == []


def test_while_the_gate_is_closed_it_looks_often_however_long_that_takes(
    new_tower: NewTower,
) -> None:
    tower = new_tower(max_cpu_percent=50)
    tower.sample_takes = 0.2
    tower.cpu = 90
    tower.look_for(60)
    assert tower.closed
    seen = len(tower.looks)
    tower.look_for(10)
    assert len(tower.looks) - seen >= 19


def test_too_much_cpu_retires_nobody(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    tower.cpu = 390
    tower.look_for(60)
    assert tower.closed
    assert tower.retired == []


def test_time_in_which_the_process_was_stopped_is_no_grace(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 300, 600, 200)
    tower.look()
    tower.pass_time(100)  # SIGSTOP, or a virtual machine that was not run
    tower.look()
    tower.look_for(4.9)
    assert tower.retired == []
    tower.look_for(0.5)
    assert [number for number, _ in tower.retired] == [1]


def test_the_grace_passes_also_when_each_look_takes_long(new_tower: NewTower) -> None:
    """A large tree, or a busy machine: then there is more time between two looks."""
    tower = new_tower(memory_grace=5)
    tower.sample_takes = 0.09
    over(tower, 300, 600, 200)
    tower.look_for(20)
    assert [number for number, _ in tower.retired][:1] == [1]


def test_limits_that_are_replaced_hold_from_the_next_look(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 300, 300, 300)
    tower.look()
    limits = Limits(max_memory_mb=500, memory_grace=0, sample_interval=4)
    tower.monitor.limits = limits
    with tower.shared.lock:
        tower.shared.apply_limits(limits)
    tower.look()
    assert tower.closed
    assert len(tower.retired) == 1
    over(tower, 10, 10, 10)
    tower.look_for(30)
    assert round(tower.looks[-1] - tower.looks[-2], 3) == 4


# -- what is written down --


def test_what_was_measured_is_left_in_the_shared_memory(new_tower: NewTower) -> None:
    tower = new_tower()
    over(tower, 100, 200, 300)
    tower.others, tower.cpu, tower.queue = 150, 42.5, 7
    tower.look()
    header = tower.shared.header
    assert tower.value(Kind.MEMORY) == 750
    assert tower.value(Kind.CPU) == pytest.approx(42.5, abs=0.001)
    assert [slot.memory // MEGABYTE for slot in tower.shared.slots] == [100, 200, 300]
    assert (header.processes, header.processes_by_rss, header.backlog) == (1 + WORKERS, 0, 7)
    assert header.sampled_at == tower.now_ns
    over(tower, 10, 10, 10)
    tower.cpu = 5
    tower.look()
    assert header.peak_memory == 750 * MEGABYTE
    assert header.peak_cpu == pytest.approx(42_500, abs=1)
    assert tower.slot(2).memory == 10 * MEGABYTE


def test_cpu_is_never_more_than_the_machine_has(new_tower: NewTower) -> None:
    tower = new_tower()
    tower.cpu = 100_000
    tower.look()
    assert tower.value(Kind.CPU) == 400


def test_alerts_are_counted_by_kind_when_a_violation_begins(new_tower: NewTower) -> None:
    tower = new_tower()
    assert tower.alerts() == {}
    for _ in range(3):
        tower.cpu = 250
        tower.look_for(10)
        tower.cpu = 180  # a warning is none
        tower.look_for(10)
    tower.others = 2000
    tower.look_for(10)
    assert tower.alerts() == {"cpu": 3, "memory": 1}


def test_the_demand_includes_those_who_wait(new_tower: NewTower) -> None:
    tower = new_tower(max_requests_per_minute=100)
    first, second, third = tower.shared.slots
    first.admitted, first.succeeded, first.opened = 10, 4, 8
    for _ in range(60):
        tower.shared.window.record(tower.now_ns)

    def demand() -> list[float]:
        tower.look()
        return [tower.value(kind) for kind in (Kind.REQUESTS, Kind.CONCURRENT, Kind.CONNECTIONS)]

    assert demand() == [60, 6, 8]
    # Threads that have a request, and wait for room to run it, or for the rate.
    first.request_waits_for, first.queued = WAITS_FOR_REQUEST, 3
    second.request_waits_for, second.queued = WAITS_FOR_REQUEST, 2
    third.request_waits_for, third.queued = WAITS_FOR_RATE, 4
    assert demand() == [64, 11, 8]
    # Clients outside, who wait for what keeps the doors shut.
    first.opened = 100
    for _ in range(40):
        tower.shared.window.record(tower.now_ns)
    tower.queue = 20
    assert demand() == demand() == [104, 11, 100]  # nothing does
    first.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand() == [104, 11, 120]
    second.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand() == [104, 11, 120]  # nobody is counted twice
    first.accept_waits_for = second.accept_waits_for = WAITS_FOR_RATE
    assert demand() == [124, 11, 100]
    tower.queue = -1  # the listeners are closed
    assert demand() == [104, 11, 100]
    # One that is there for a moment only is on its way in.
    tower.queue = 20
    assert demand() == [104, 11, 100]
    assert demand() == [124, 11, 100]
    # And who waits though there is room waits for something else, for a moment.
    first.opened = 99
    first.accept_waits_for = WAITS_FOR_CONNECTION
    assert demand()[2] == 99


def test_the_demand_is_over_the_limit_when_somebody_was_told_overloaded_since_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = Tower(monkeypatch, max_requests_per_minute=100)
    slot = tower.slot(1)
    slot.overloaded_rate = 1000  # long ago, under a master before this one
    tower.start()
    assert tower.value(Kind.REQUESTS) == 0

    def demand() -> list[float]:
        tower.look()
        return [tower.value(kind) for kind in (Kind.REQUESTS, Kind.CONCURRENT, Kind.CONNECTIONS)]

    slot.overloaded_rate += 5
    slot.overloaded_concurrency += 3
    slot.overloaded_connections += 2
    assert demand() == [101, 101, 101]
    assert demand() == [0, 0, 0]


def test_a_limit_of_requests_that_is_only_reached_is_no_violation(new_tower: NewTower) -> None:
    tower = new_tower(max_requests_per_minute=5)
    for _ in range(5):
        tower.shared.window.record(tower.now_ns)
    tower.look()
    assert tower.alerts() == {}
    slot = tower.slot(0)
    slot.request_waits_for, slot.queued = WAITS_FOR_RATE, 1
    tower.look()
    assert tower.alerts() == {"requests": 1}


# -- what is told --


def test_a_violation_is_one_line_and_then_one_per_interval(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(resource_check_interval=60)
    tower.cpu = 250
    tower.look_for(59)
    words = "RESOURCE VIOLATION: ['CPU usage 250.0% exceeds limit 200%']"
    assert lines(caplog, "VIOLATION") == [f"CRITICAL {words}"]
    tower.look_for(120)
    assert lines(caplog, "VIOLATION") == [f"CRITICAL {words}"] * 3


def test_a_full_house_is_told_though_it_was_full_between_two_looks_only(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(max_connections=10)
    tower.slot(1).full += 1
    tower.look()
    tower.look_for(30)
    assert lines(caplog, "limit reached") == [
        "WARNING Connection limit reached (10), rejecting new connections"
    ]


def test_health_is_told_every_minute_and_the_load_every_five(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower()
    slot = tower.slot(0)
    slot.admitted, slot.succeeded, slot.failed, slot.opened, slot.closed = 5242, 5222, 12, 40, 25
    tower.shared.header.peak_connections = 28
    tower.cpu = 45.3
    tower.look_for(299)
    assert lines(caplog, "Resource summary") == []
    tower.look_for(2)
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


def test_the_time_of_the_last_resource_check_is_kept(new_tower: NewTower) -> None:
    tower = new_tower(resource_check_interval=30)
    tower.look_for(29)
    assert tower.shared.header.checked_at == 0
    tower.look_for(1)
    assert tower.shared.header.checked_at == tower.now_ns
    tower.look_for(29)
    assert tower.shared.header.checked_at == tower.now_ns - 29 * 10**9


# -- what goes wrong --


def test_a_look_that_fails_is_told_once_per_interval_and_survived(
    new_tower: NewTower, caplog: pytest.LogCaptureFixture
) -> None:
    tower = new_tower(resource_check_interval=60)
    tower.cpu = 250
    tower.look()
    tower.error = OSError(24, "Too many open files")
    tower.look_for(59)
    told = ["ERROR Cannot look at the processes: Too many open files"]
    assert lines(caplog, "Cannot look") == told
    assert tower.closed  # nothing is known that would open it
    assert len(lines(caplog, "Health check")) == 1  # the rest goes on
    tower.look_for(60)
    assert lines(caplog, "Cannot look") == 2 * told
    tower.error, tower.cpu = None, 10
    tower.look()
    assert not tower.closed


def test_looks_that_failed_are_no_grace(new_tower: NewTower) -> None:
    tower = new_tower(memory_grace=5)
    over(tower, 300, 600, 200)
    tower.look()
    tower.error = OSError(24, "Too many open files")
    tower.look_for(20)
    tower.error = None
    tower.look()
    assert tower.retired == []


@pytest.mark.parametrize("what", ["inherit_orphans", "Backlog"])
def test_a_kernel_that_lacks_something_is_watched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    tower = Tower(monkeypatch)

    def lacks() -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(tree_module if what == "inherit_orphans" else monitor_module, what, lacks)
    tower.start()
    tower.cpu = 250
    tower.look()
    assert tower.closed


def test_setting_the_wall_clock_back_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cpanbridge.master")

    def story(shift_ns: int) -> tuple[list[str], list[float], list[tuple[int, str]], list[int]]:
        caplog.clear()
        tower = Tower(monkeypatch, memory_grace=5).start()
        for step in range(40):
            tower.wall_ns += shift_ns if step % 2 else 10**9
            if step == 5:
                over(tower, 300, 600, 200)
            if step == 25:
                tower.replace(1)
            tower.cpu = 150 + 5 * (step % 20)
            tower.look_for(20 if step % 7 == 0 else 1)
        header = tower.shared.header
        numbers = [header.closings, header.retired, header.changed_at, header.checked_at]
        return lines(caplog), tower.looks, tower.retired, numbers

    assert story(-3600 * 10**9) == story(10**9)
    assert lines(caplog, "VIOLATION")


def test_the_verdict_is_open_from_the_start(new_tower: NewTower) -> None:
    assert new_tower().shared.header.overload_state == GATE_OPEN
