"""The shared memory: one mapping for all processes, and nothing lost with a dead one."""

import os

import pytest
from conftest import Clock
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor import shared as shared_module
from cpanbridge.supervisor.shared import UNLIMITED_WINDOW, WINDOW_NS, Shared


def test_a_forked_process_sees_and_writes_the_same_memory() -> None:
    shared = Shared(3, 10)
    pid = os.fork()
    if pid == 0:
        shared.slots[2].opened = 7
        shared.header.admissions = 5
        shared.ring[10] = -1
        os._exit(0)
    os.waitpid(pid, 0)
    assert (shared.slots[2].opened, shared.header.admissions, shared.ring[10]) == (7, 5, -1)


@given(st.integers(1, 300), st.integers(0, 50))
def test_no_two_fields_share_memory(workers: int, window: int) -> None:
    shared = Shared(workers, window)
    try:
        for number, slot in enumerate(shared.slots, 1):
            for place, (name, *_) in enumerate(slot._fields_):
                setattr(slot, name, number * 1000 + place)
        for position in range(min(shared.ring_size, 100)):
            shared.ring[position] = shared.ring[-1 - position] = -1
        for name, *_ in shared.header._fields_:
            setattr(shared.header, name, -2)
        for number, slot in enumerate(shared.slots, 1):
            for place, (name, *_) in enumerate(slot._fields_):
                assert getattr(slot, name) == number * 1000 + place
        assert shared.ring[0] == shared.ring[-1] == -1
    finally:
        os.close(shared.fd)


def test_it_has_no_name_and_is_not_handed_to_other_programs() -> None:
    shared = Shared(2, 10)
    assert os.readlink(f"/proc/self/fd/{shared.fd}").startswith("/memfd:")
    assert not os.get_inheritable(shared.fd)


def test_what_is_open_is_the_sum_over_all_workers() -> None:
    shared = Shared(3, 10)
    for slot, (opened, closed) in zip(shared.slots, ((5, 1), (7, 7), (3, 0)), strict=True):
        slot.opened, slot.closed = opened, closed
        slot.admitted, slot.succeeded, slot.failed = opened + 1, closed - closed // 2, closed // 2
    assert shared.connections() == 7
    assert shared.running() == 10


def test_clear_gives_back_what_a_dead_worker_held_and_keeps_its_totals() -> None:
    shared = Shared(2, 10)
    slot, other = shared.slots
    slot.pid = 99
    slot.opened, slot.closed = 10, 4
    slot.admitted, slot.succeeded, slot.failed = 9, 5, 1
    slot.door_waits_for, slot.request_waits = 2, 1
    slot.refused, slot.security_events, slot.busy_ns = 3, 2, 12345
    other.opened, other.admitted = 2, 1
    shared.clear(slot)
    assert (slot.pid, slot.connections, slot.running) == (0, 0, 0)
    assert (slot.door_waits_for, slot.request_waits) == (0, 0)
    assert (slot.opened, slot.admitted) == (10, 9)
    assert slot.finished == slot.admitted
    assert (slot.succeeded, slot.failed) == (5, 4)  # those that it ran have failed
    assert slot.refused == 3
    assert (slot.security_events, slot.busy_ns) == (2, 12345)
    assert (shared.connections(), shared.running()) == (2, 1)


def test_uptime_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.install(monkeypatch, shared_module)
    shared = Shared(1, 1)
    clock.now += 2_500_000_000
    assert shared.uptime == 2.5


@pytest.mark.parametrize("window", [1, 2, 5, 16])
def test_admitted_in_window_counts_exactly_across_ring_wraps(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    clock = Clock()
    clock.install(monkeypatch, shared_module)
    shared = Shared(1, window)
    assert shared.admitted_in_window() == 0
    times: list[int] = []
    for step in range(5 * (window + 1)):
        if len(times) >= window:  # what the gate would do
            clock.now = max(clock.now, times[-window] + WINDOW_NS)
        shared.ring[step % shared.ring_size] = clock.now
        shared.header.admissions = step + 1
        times.append(clock.now)
        clock.now += WINDOW_NS // 7
        assert shared.admitted_in_window() == sum(clock.now - t < WINDOW_NS for t in times)
    clock.now = times[-1] + WINDOW_NS - 1
    assert shared.admitted_in_window() == 1
    clock.now += 1
    assert shared.admitted_in_window() == 0


def test_without_a_rate_limit_the_count_goes_up_to_a_million() -> None:
    shared = Shared(1, 0)
    assert shared.capacity == UNLIMITED_WINDOW
    assert len(shared.ring) == UNLIMITED_WINDOW + 1
