"""The log of the load: a line when something changes, then one per interval, never a flood."""

import logging
import random
from collections.abc import Callable, Iterable

import pytest

from cpanbridge.supervisor.memory.overload_state import Kind, Reading
from cpanbridge.supervisor.monitor.load_log import SETTLE_SECONDS, Alarms

INTERVAL = 60.0
LIMITS = {
    Kind.MEMORY: 1024.0,
    Kind.CPU: 200.0,
    Kind.REQUESTS: 1000.0,
    Kind.CONCURRENT: 50.0,
    Kind.CONNECTIONS: 100.0,
    Kind.CGROUP_MEMORY: 2000.0,
}
CLOSED_BY_MEMORY = [
    "CRITICAL RESOURCE VIOLATION: ['Memory usage 1100.0MB exceeds limit 1024MB']",
    "WARNING Resource violations detected, throttling connections: "
    "['Memory usage 1100.0MB exceeds limit 1024MB']",
]
NEAR_MEMORY = "WARNING Resource warning: ['Memory usage 900.0MB approaching limit 1024MB']"
OVER = "INFO Resource violations are over, requests run again"


class LoadLog:
    """Alarms, the log that they write, and the time."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "cpanbridge.master")
        self._caplog = caplog
        self.alarms = Alarms()
        self.now = 1000.0

    def lines(self) -> list[str]:
        """What has been logged since the last call."""
        lines = [f"{each.levelname} {each.getMessage()}" for each in self._caplog.records]
        self._caplog.clear()
        return lines

    def sample(self, **values: float) -> list[str]:
        """One sample now; its lines."""
        readings = [Reading(k, values.get(k.name.lower(), 0.0), LIMITS[k]) for k in Kind]
        self.alarms.log(readings, self.now, INTERVAL)
        return self.lines()

    def sample_for(self, seconds: float, **values: float) -> list[str]:
        """A sample each second; all lines."""
        lines = []
        for _ in range(int(seconds)):
            self.now += 1
            lines += self.sample(**values)
        return lines

    def connected(self, connections: int, *, limit: int = 100, full: bool = False) -> list[str]:
        """One sample of the connections now; its lines."""
        self.alarms.log_connections(connections, limit, full, self.now, INTERVAL)
        return self.lines()

    def connected_for(self, seconds: float, connections: int, *, full: bool = False) -> list[str]:
        """A sample each second; all lines."""
        lines = []
        for _ in range(int(seconds)):
            self.now += 1
            lines += self.connected(connections, full=full)
        return lines


@pytest.fixture
def load_log(caplog: pytest.LogCaptureFixture) -> LoadLog:
    return LoadLog(caplog)


# -- the limits --


def test_a_normal_load_is_not_logged(load_log: LoadLog) -> None:
    assert load_log.sample_for(3600, memory=800, cpu=150, requests=700, concurrent=40) == []


def test_each_change_is_logged_at_once_and_once(load_log: LoadLog) -> None:
    assert load_log.sample(memory=900) == [NEAR_MEMORY]
    assert load_log.sample_for(10, memory=900) == []
    assert load_log.sample(memory=1100) == CLOSED_BY_MEMORY
    assert load_log.sample_for(10, memory=1100) == []


def test_what_lasts_is_logged_once_per_interval(load_log: LoadLog) -> None:
    assert load_log.sample(memory=900) == [NEAR_MEMORY]
    assert load_log.sample_for(59, memory=900) == []
    assert load_log.sample_for(1, memory=900) == [NEAR_MEMORY]
    assert load_log.sample_for(59, memory=900) == []
    assert load_log.sample_for(1, memory=1100) == CLOSED_BY_MEMORY
    for _ in range(5):  # that clients wait was said
        assert load_log.sample_for(59, memory=1100) == []
        assert load_log.sample_for(1, memory=1100) == CLOSED_BY_MEMORY[:1]


def test_each_line_has_the_current_numbers(load_log: LoadLog) -> None:
    load_log.sample(cpu=250)
    assert load_log.sample_for(60, cpu=275.5) == [
        "CRITICAL RESOURCE VIOLATION: ['CPU usage 275.5% exceeds limit 200%']",
    ]


def test_violations_that_begin_together_share_a_line(load_log: LoadLog) -> None:
    violations = "['Request rate 1234/min exceeds limit 1000/min', " + (
        "'Concurrent requests 52 exceeds limit 50']"
    )
    assert load_log.sample(requests=1234, concurrent=52, memory=900) == [
        f"CRITICAL RESOURCE VIOLATION: {violations}",
        f"WARNING Resource violations detected, throttling connections: {violations}",
        NEAR_MEMORY,
    ]


def test_another_violation_is_logged_with_those_that_last(load_log: LoadLog) -> None:
    load_log.sample(memory=1100)
    load_log.now += 1
    (critical, _) = load_log.sample(memory=1100, cpu=250)
    assert critical == (
        "CRITICAL RESOURCE VIOLATION: ['Memory usage 1100.0MB exceeds limit 1024MB', "
        "'CPU usage 250.0% exceeds limit 200%']"
    )


def test_recovery_is_logged_once_when_it_has_settled(load_log: LoadLog) -> None:
    load_log.sample(memory=1100)
    assert load_log.sample_for(SETTLE_SECONDS, memory=100) == []
    assert load_log.sample_for(1, memory=100) == [OVER]
    assert load_log.sample_for(600, memory=100) == []


def test_a_violation_that_becomes_a_warning_is_over_and_the_warning_is_logged(
    load_log: LoadLog,
) -> None:
    load_log.sample(memory=1100)
    assert load_log.sample_for(10, memory=900) == [NEAR_MEMORY, OVER]
    assert load_log.sample_for(10, memory=100) == []


def test_the_end_of_a_violation_that_did_not_close_the_gate_is_logged_too(
    load_log: LoadLog,
) -> None:
    assert len(load_log.sample(requests=1234, concurrent=52)) == 2
    assert load_log.sample_for(30, requests=345, concurrent=52) == [
        "INFO Resource violations are over: ['Request rate 345/min within limit 1000/min']"
    ]
    assert load_log.sample_for(10, requests=345, concurrent=45) == [
        "WARNING Resource warning: ['Concurrent requests 45 approaching limit 50']",
        "INFO Resource violations are over: ['Concurrent requests 45 approaching limit 50']",
    ]


def test_that_clients_wait_for_a_connection_is_said_once(load_log: LoadLog) -> None:
    assert load_log.sample(connections=101) == [
        "CRITICAL RESOURCE VIOLATION: ['Connections 101 exceeds limit 100']"
    ]
    assert FULL in load_log.connected(100, full=True)


def test_the_end_is_logged_when_both_memory_and_cpu_are_back(load_log: LoadLog) -> None:
    load_log.sample(memory=1100, cpu=250)
    assert load_log.sample_for(20, memory=1100) == []
    assert load_log.sample_for(20) == [OVER]


@pytest.mark.parametrize(
    "pattern",
    [[1100, 100], [1100, 900], [1100, 100, 100, 100], [1100, 1100, 1100, 900], [1100, 900, 100]],
)
def test_what_goes_up_and_down_within_seconds_is_logged_as_one(
    load_log: LoadLog, pattern: list[float]
) -> None:
    lines = []
    for _ in range(10):
        for memory in pattern:
            load_log.now += 1
            lines += load_log.sample(memory=memory)
    assert lines == CLOSED_BY_MEMORY
    assert [line for line in load_log.sample_for(10, memory=100) if line != OVER] == []


def test_what_comes_back_after_it_was_over_is_logged_again(load_log: LoadLog) -> None:
    for _ in range(3):
        assert load_log.sample_for(1, memory=1100) == CLOSED_BY_MEMORY
        assert load_log.sample_for(20, memory=100) == [OVER]


# -- connections --


ELEVATED = "INFO Elevated connection count: 25 active connections."
HIGH = (
    "WARNING High connection count detected: 78 active connections. "
    "This may indicate a connection leak."
)
FULL = "WARNING Connection limit reached (100), rejecting new connections"


@pytest.mark.parametrize(
    ("connections", "limit", "word"),
    [
        (20, 100, None),
        (21, 100, "Elevated"),
        (50, 100, "Elevated"),
        (51, 100, "High"),
        (100, 500, None),
        (101, 500, "Elevated"),
        (250, 500, "Elevated"),
        (251, 500, "High"),
    ],
)
def test_many_connections_are_logged_from_a_fifth_and_from_half_of_the_limit(
    load_log: LoadLog, connections: int, limit: int, word: str | None
) -> None:
    lines = load_log.connected(connections, limit=limit)
    assert [line.split()[1] for line in lines] == ([word] if word else [])
    assert all(f" {connections} active connections." in line for line in lines)


def test_connections_are_logged_in_the_documented_words_and_once_per_interval(
    load_log: LoadLog,
) -> None:
    assert load_log.connected(25) == [ELEVATED]
    assert load_log.connected_for(59, 25) == []
    assert load_log.connected_for(1, 25) == [ELEVATED]
    assert load_log.connected_for(1, 78) == [HIGH]
    assert load_log.connected_for(59, 78) == []
    assert load_log.connected_for(1, 78) == [HIGH]
    assert load_log.connected_for(20, 25) == [ELEVATED]
    assert load_log.connected_for(20, 3) == []


def test_a_reached_limit_is_logged_once_and_then_once_per_interval(load_log: LoadLog) -> None:
    assert load_log.connected(100, full=True) == [FULL, HIGH.replace("78", "100")]
    assert load_log.connected_for(59, 100, full=True) == []
    assert load_log.connected_for(1, 100, full=True) == [FULL, HIGH.replace("78", "100")]
    for _ in range(20):  # a client leaves now and then, and another one comes
        assert load_log.connected_for(1, 99) == []
        assert load_log.connected_for(1, 100, full=True) == []


def test_the_limit_that_is_logged_is_the_current_one(load_log: LoadLog) -> None:
    lines = load_log.connected(7, limit=7, full=True)
    assert lines[0] == "WARNING Connection limit reached (7), rejecting new connections"


# -- never a flood --


def rare_peaks(random: random.Random) -> Iterable[float]:
    return (1.2 if random.random() < 0.01 else 0.1 for _ in range(10_000))


def noise_around_the_limit(random: random.Random) -> Iterable[float]:
    return (random.uniform(0.9, 1.1) for _ in range(10_000))


def noise_around_the_warning(random: random.Random) -> Iterable[float]:
    return (random.uniform(0.7, 0.9) for _ in range(10_000))


def anything(random: random.Random) -> Iterable[float]:
    return (random.uniform(0.0, 1.5) for _ in range(10_000))


def slow_waves(random: random.Random) -> Iterable[float]:
    """The worst there can be: every rise and fall lasts just long enough to be one."""
    samples_of_a_rest = int(10_000 * (SETTLE_SECONDS + 1) / 3600) + 1
    wave = [1.1] + [0.5] * samples_of_a_rest
    return (wave[n % len(wave)] for n in range(10_000))


@pytest.mark.parametrize(
    "load", [rare_peaks, noise_around_the_limit, noise_around_the_warning, anything]
)
def test_an_hour_of_any_load_is_a_few_lines(
    load_log: LoadLog, load: Callable[[random.Random], Iterable[float]]
) -> None:
    """10,000 samples of all five kinds, and of connections, which follow the same course."""
    lines: list[str] = []
    generator = random.Random(20261124)
    for share in load(generator):
        load_log.now += 0.36
        lines += load_log.sample(
            **{kind.name.lower(): share * limit for kind, limit in LIMITS.items()}
        )
        connections = min(100, int(100 * share))
        lines += load_log.connected(connections, full=connections == 100)
    # Where it rises and rests by turns, each rise is a change: no more than one in 6 s.
    assert len(lines) <= (4 * 3600 / SETTLE_SECONDS if load is rare_peaks else 6 * 61)
    assert lines


def test_the_worst_course_is_logged_once_for_each_rise(load_log: LoadLog) -> None:
    violations = rises = 0
    before = 0.0
    for share in slow_waves(random.Random(1)):
        load_log.now += 0.36
        rises += share > 1 >= before
        before = share
        violations += sum(
            line.startswith("CRITICAL") for line in load_log.sample(memory=1024 * share)
        )
    assert violations == rises <= 3600 / SETTLE_SECONDS
