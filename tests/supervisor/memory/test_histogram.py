"""Percentiles without a list of samples: near enough, of the last five minutes, of all workers."""

import math
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from conftest import Clock
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.memory import histogram as histogram_module
from cpanbridge.supervisor.memory.histogram import SIZE, SLICE_NS, SLICES, Histogram, merged

MICROSECOND = 1_000
SECOND = 1_000_000_000
DAY = 86_400 * SECOND
NEAR = 0.05  # the relative error that is promised


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch, histogram_module)
    return clock


def new_histogram() -> Histogram:
    return Histogram(memoryview(bytearray(SIZE)).cast("q"))


def exact(durations: Sequence[int], percent: float) -> float:
    """The seconds within which so many percent of them were done."""
    rank = max(1, math.ceil(percent / 100 * len(durations)))
    return sorted(durations)[rank - 1] / 1e9


def uniform(random: random.Random) -> Iterator[int]:
    while True:
        yield random.randrange(50 * MICROSECOND, SECOND // 10)


def exponential(random: random.Random) -> Iterator[int]:
    while True:
        yield MICROSECOND + int(random.expovariate(1 / (5_000 * MICROSECOND)))


def bimodal(random: random.Random) -> Iterator[int]:
    """Nearly all are answered from memory, and one in twelve asks a slow database."""
    while True:
        middle = 3 * SECOND if random.random() < 1 / 12 else 40 * MICROSECOND
        yield int(middle * random.uniform(0.8, 1.2))


def test_the_average_and_the_error_rate_are_of_the_same_requests(clock: Clock) -> None:
    histogram = new_histogram()
    for number in range(1, 101):
        histogram.add(number * 1000 * MICROSECOND, number % 4 > 0, clock.now)
    latencies = merged([histogram])
    assert latencies.average_seconds == pytest.approx(0.0505, rel=NEAR)
    assert latencies.error_rate == 0.25
    assert (merged([]).average_seconds, merged([]).error_rate) == (0.0, 0.0)


@pytest.mark.parametrize("distribution", [uniform, exponential, bimodal])
def test_percentiles_are_near_the_exact_ones(clock: Clock, distribution: object) -> None:
    assert callable(distribution)
    numbers = distribution(random.Random(20261124))
    durations = [next(numbers) for _ in range(20_000)]
    histogram = new_histogram()
    for duration in durations:
        histogram.add(duration, True, clock.now)
    latencies = merged([histogram])
    assert latencies.requests == len(durations)
    for percent in (1, 10, 25, 50, 75, 90, 95, 99, 99.9, 100):
        assert latencies.percentile(percent) == pytest.approx(exact(durations, percent), rel=NEAR)


@given(st.integers(MICROSECOND, DAY))
def test_a_single_duration_from_a_microsecond_to_a_day_is_told_nearly(duration: int) -> None:
    histogram = new_histogram()
    histogram.add(duration, True, time.monotonic_ns())
    latencies = merged([histogram])
    for percent in (0, 50, 95, 99, 100):
        assert latencies.percentile(percent) == pytest.approx(duration / 1e9, rel=NEAR)


@given(st.lists(st.integers(MICROSECOND, DAY), min_size=1, max_size=50), st.floats(0, 100))
def test_any_percentile_of_any_durations_is_told_nearly(
    durations: list[int], percent: float
) -> None:
    histograms = [new_histogram() for _ in range(3)]
    for number, duration in enumerate(durations):
        histograms[number % 3].add(duration, True, time.monotonic_ns())
    latencies = merged(histograms)
    assert latencies.requests == len(durations)
    assert latencies.percentile(percent) == pytest.approx(exact(durations, percent), rel=NEAR)


@pytest.mark.parametrize("duration", [0, 1, 63, 64, 999])
def test_shorter_than_a_microsecond_is_told_within_a_unit(clock: Clock, duration: int) -> None:
    histogram = new_histogram()
    histogram.add(duration, True, clock.now)
    assert abs(merged([histogram]).percentile(50) * 1e9 - duration) <= 64


@pytest.mark.parametrize("duration", [2**47, 2**62])
def test_what_takes_longer_than_can_be_counted_counts_as_the_longest(
    clock: Clock, duration: int
) -> None:
    histogram = new_histogram()
    histogram.add(duration, True, clock.now)
    latencies = merged([histogram])
    assert latencies.requests == 1
    assert latencies.percentile(50) >= DAY / 1e9


def test_without_any_request_there_is_nothing_to_tell(clock: Clock) -> None:
    for latencies in (merged([]), merged([new_histogram()])):
        assert (latencies.requests, latencies.failed) == (0, 0)
        assert latencies.percentile(99) == 0.0


def test_all_workers_count(clock: Clock) -> None:
    quick, slow, idle = (new_histogram() for _ in range(3))
    for _ in range(90):
        quick.add(SECOND // 1000, True, clock.now)
    for _ in range(10):
        slow.add(SECOND, False, clock.now)
    latencies = merged([quick, slow, idle])
    assert (latencies.requests, latencies.failed) == (100, 10)
    assert latencies.percentile(90) == pytest.approx(0.001, rel=NEAR)
    assert latencies.percentile(91) == pytest.approx(1.0, rel=NEAR)


def test_failures_are_counted_beside_the_others(clock: Clock) -> None:
    histogram = new_histogram()
    for number in range(10):
        histogram.add(SECOND, number % 5 > 0, clock.now)
    assert (merged([histogram]).requests, merged([histogram]).failed) == (10, 2)


# -- five minutes --


def test_what_is_older_than_five_minutes_is_forgotten_and_nothing_else(clock: Clock) -> None:
    histogram = new_histogram()
    times: list[int] = []
    for _ in range(300):  # many times around the ring
        clock.now += 7 * SECOND
        histogram.add(SECOND, False, clock.now)
        times.append(clock.now)
        latencies = merged([histogram])
        recent = sum(clock.now - at < 300 * SECOND for at in times)
        with_the_last_slice = sum(clock.now - at < 300 * SECOND + SLICE_NS for at in times)
        assert recent <= latencies.requests <= with_the_last_slice
        assert latencies.failed == latencies.requests
    clock.now += 300 * SECOND + SLICE_NS
    latencies = merged([histogram])
    assert (latencies.requests, latencies.failed, latencies.percentile(50)) == (0, 0, 0.0)


def test_after_a_long_rest_only_the_new_ones_count(clock: Clock) -> None:
    histogram = new_histogram()
    for _ in range(5):
        histogram.add(SECOND, False, clock.now)
    clock.now += 3 * SLICES * SLICE_NS  # the same place in the ring again
    histogram.add(2 * SECOND, True, clock.now)
    latencies = merged([histogram])
    assert (latencies.requests, latencies.failed) == (1, 0)
    assert latencies.percentile(50) == pytest.approx(2, rel=NEAR)


class KilledAfter(Exception):
    """The process ends here."""


class Dying:
    """The memory of a worker that is killed after so many stores."""

    def __init__(self, memory: memoryview, stores: int) -> None:
        self.memory = memory
        self.stores = stores

    def __getitem__(self, key: int) -> int:
        value: int = self.memory[key]
        return value

    def __setitem__(self, key: int | slice, value: object) -> None:
        if self.stores == 0:
            if isinstance(key, slice) and isinstance(value, memoryview):
                # A copy that does not come to its end.
                self.memory[key.start : key.start + len(value) // 2] = value[: len(value) // 2]
            raise KilledAfter
        self.stores -= 1
        self.memory[key] = value  # type: ignore[call-overload]


@pytest.mark.parametrize("stores", range(4))
def test_a_slice_that_was_only_half_emptied_when_its_writer_was_killed_is_not_read(
    clock: Clock, stores: int
) -> None:
    memory = memoryview(bytearray(SIZE)).cast("q")
    for duration in (MICROSECOND, SECOND, DAY):
        Histogram(memory).add(duration, False, clock.now)
    clock.now += SLICES * SLICE_NS  # its place is now another half minute's
    with pytest.raises(KilledAfter):
        Histogram(Dying(memory, stores)).add(SECOND, False, clock.now)  # type: ignore[arg-type]
    latencies = merged([Histogram(memory)])
    counted = int(stores == 3)  # emptied, named and counted; that it failed is lost
    assert (latencies.requests, latencies.failed) == (counted, 0)
    Histogram(memory).add(SECOND, False, clock.now)  # the next worker in the slot goes on
    latencies = merged([Histogram(memory)])
    assert (latencies.requests, latencies.failed) == (1 + counted, 1)
    assert latencies.percentile(100) == pytest.approx(1, rel=NEAR)
