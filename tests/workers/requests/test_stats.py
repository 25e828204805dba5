"""What a worker records of its requests: each count in its field, and none lost between threads."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import histogram
from cpanbridge.supervisor.memory.fields import EVENT_KINDS, RATE, REASONS, Slot
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.requests.stats import StatisticsWriter

MS = 1_000_000


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared.create(2, Limits())
    yield shared
    os.close(shared.fd)


def test_a_request_that_has_run_is_counted_in_all_statistics(shared: Shared) -> None:
    statistics = StatisticsWriter(shared, 1)
    statistics.ran(3, True, 10 * MS, time.monotonic_ns())
    statistics.ran(3, False, 20 * MS, time.monotonic_ns())
    written = shared.statistics[1]
    assert shared.slots[1].busy_ns == 30 * MS
    assert written.function_stats.read(3) == (2, 1, 30 * MS)
    latencies = histogram.merged([written.histogram])
    assert (latencies.requests, latencies.failed) == (2, 1)
    assert shared.slots[1].finished == 0  # the gate counts that
    assert shared.statistics[0].function_stats.read(3) == (0, 0, 0)


def test_an_error_is_recorded_with_its_function_and_its_duration(shared: Shared) -> None:
    StatisticsWriter(shared, 0).error(7, 5 * MS, "division by zero")
    (event,) = shared.statistics[0].errors.read()
    assert (event.first, event.second, event.text) == (5 * MS, 7, "division by zero")
    assert abs(event.at / 1e9 - time.time()) < 600


@pytest.mark.parametrize("kind", EVENT_KINDS)
def test_a_security_event_is_counted_by_its_kind_and_recorded(shared: Shared, kind: str) -> None:
    StatisticsWriter(shared, 0).event(kind, "what it was", 4711, 1000)
    assert list(shared.slots[0].security_events) == [each == kind for each in EVENT_KINDS]
    (event,) = shared.statistics[0].events.read()
    assert (event.first, event.second, event.text) == (4711, 1000, f"{kind}\nwhat it was")


@pytest.mark.parametrize("reason", REASONS)
def test_a_reply_overloaded_is_counted_by_its_reason(shared: Shared, reason: str) -> None:
    StatisticsWriter(shared, 0).overloaded(reason)
    assert list(shared.slots[0].overloaded) == [each == reason for each in REASONS]


def test_a_replacement_goes_on_counting(shared: Shared) -> None:
    for _ in range(2):
        statistics = StatisticsWriter(shared, 0)
        statistics.refused()
        statistics.rejected()
    assert (shared.slots[0].refused, shared.slots[0].rejected) == (2, 2)


class YieldingSlot:
    """A slot of which another thread may read a field before this one has written it."""

    def __init__(self, slot: Slot) -> None:
        object.__setattr__(self, "slot", slot)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.slot, name)
        if isinstance(value, ctypes.Array):
            return YieldingArray(value)
        time.sleep(0.0001)
        return value

    def __setattr__(self, name: str, value: int) -> None:
        setattr(self.slot, name, value)


class YieldingArray:
    """The same for a field that is an array."""

    def __init__(self, array: ctypes.Array[ctypes.c_int64]) -> None:
        self.array = array

    def __getitem__(self, index: int) -> Any:
        value = self.array[index]
        time.sleep(0.0001)
        return value

    def __setitem__(self, index: int, value: int) -> None:
        self.array[index] = value


def count_of(value: Any) -> int:
    """A field's value; an array's sum."""
    return sum(value) if isinstance(value, ctypes.Array) else int(value)


@pytest.mark.parametrize(
    ("write", "field"),
    [
        (StatisticsWriter.refused, "refused"),
        (StatisticsWriter.rejected, "rejected"),
        (lambda statistics: statistics.overloaded(RATE), "overloaded"),
        (
            lambda statistics: statistics.event("invalid_request", "x", 1, 1),
            "security_events",
        ),
        (lambda statistics: statistics.ran(1, False, 1, 1), "busy_ns"),
    ],
    ids=["refused", "rejected", "overloaded", "event", "ran"],
)
def test_no_count_is_lost_between_threads(
    shared: Shared, write: Callable[[StatisticsWriter], None], field: str
) -> None:
    statistics = StatisticsWriter(shared, 0)
    statistics._slot = YieldingSlot(shared.slots[0])  # type: ignore[assignment]

    def work() -> None:
        for _ in range(25):
            write(statistics)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count_of(getattr(shared.slots[0], field)) == 100
