"""The admissions of the last minute: counted exactly, and kept when the limit changes."""

import os

import pytest
from conftest import Clock
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import rate_window as window_module
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.rate_window import RUNS, WINDOW_NS

MS = 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch, window_module)
    return clock


def create(limit: int) -> Shared:
    return Shared.create(1, Limits(max_requests_per_minute=limit))


def admit(shared: Shared, clock: Clock) -> bool:
    if shared.window.free_at() > clock.now:
        return False
    shared.window.record(clock.now)
    return True


@pytest.mark.parametrize("limit", [1, 2, 5, 16])
def test_the_last_minute_is_counted_exactly_however_often_the_ring_wraps(
    clock: Clock, limit: int
) -> None:
    shared = create(limit)
    assert shared.admitted_in_window() == 0
    times: list[int] = []
    for _ in range(5 * (limit + 1)):
        clock.now = max(clock.now, shared.window.free_at())
        assert admit(shared, clock)
        times.append(clock.now)
        clock.now += WINDOW_NS // 7
        assert shared.admitted_in_window() == sum(clock.now - t < WINDOW_NS for t in times)
    clock.now = times[-1] + WINDOW_NS - 1
    assert shared.admitted_in_window() == 1
    clock.now += 1
    assert shared.admitted_in_window() == 0


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, WINDOW_NS // MS)), max_size=80))
def test_without_a_limit_the_last_minute_is_counted_to_a_millisecond(
    clock: Clock, steps: list[tuple[int, int]]
) -> None:
    shared = create(0)
    try:
        times: list[int] = []
        for admissions, pause in steps:
            for _ in range(admissions):
                assert admit(shared, clock)
                times.append(clock.now)
            clock.now += pause * MS
            assert shared.admitted_in_window() == sum(clock.now - t < WINDOW_NS for t in times)
    finally:
        os.close(shared.fd)


def test_without_a_limit_millions_are_counted_in_a_small_ring(clock: Clock) -> None:
    shared = create(0)
    shared.header.admissions = 3_000_000  # of a minute that is long over
    for _ in range(3 * RUNS):
        for _ in range(2):
            assert admit(shared, clock)
        clock.now += MS
    assert shared.admitted_in_window() == 2 * (60_000 - 1)
    assert shared.window.size == 2 * RUNS


# -- another limit, with what is known of the last minute --

limits = st.integers(0, 12)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(limits, st.lists(st.integers(0, WINDOW_NS // 4), max_size=20)),
        min_size=2,
        max_size=6,
    )
)
def test_a_changed_limit_holds_at_once_and_forgets_nothing(
    clock: Clock, phases: list[tuple[int, list[int]]]
) -> None:
    shared = create(phases[0][0])
    try:
        times: list[int] = []
        for limit, pauses in phases:
            shared.rings.try_to_resize(limit)
            for pause in pauses:
                clock.now += pause
                recent = sum(clock.now - t <= WINDOW_NS for t in times)
                if admit(shared, clock):
                    assert not limit or recent < limit
                    times.append(clock.now)
                else:
                    # What a ring without limit knows to a millisecond may count as so much later.
                    late = sum(clock.now - t <= WINDOW_NS + 2 * MS for t in times)
                    assert late >= limit > 0
    finally:
        os.close(shared.fd)


def test_a_higher_limit_lets_more_in_at_once(clock: Clock) -> None:
    shared = create(3)
    assert [admit(shared, clock) for _ in range(4)] == [True] * 3 + [False]
    shared.rings.try_to_resize(5)
    assert [admit(shared, clock) for _ in range(4)] == [True] * 2 + [False] * 2
    assert shared.admitted_in_window() == 5


def test_a_lower_limit_counts_what_came_before(clock: Clock) -> None:
    shared = create(0)
    for _ in range(50):
        assert admit(shared, clock)
        clock.now += 1_000 * MS
    shared.rings.try_to_resize(20)
    assert not admit(shared, clock)
    # 21 are too many until the 31st is over a minute old.
    clock.now = shared.window.free_at()
    assert admit(shared, clock)
    assert not admit(shared, clock)


def test_the_same_limit_changes_nothing(clock: Clock) -> None:
    shared = create(3)
    window = shared.window
    shared.rings.try_to_resize(3)
    assert shared.window is window


def test_other_processes_follow(clock: Clock) -> None:
    shared = create(3)
    workers = Shared.attach(os.dup(shared.fd))
    assert admit(workers, clock)
    for limit in (5, 0, 2):
        shared.rings.try_to_resize(limit)
        assert workers.window.limit == limit
        assert workers.admitted_in_window() == 1
