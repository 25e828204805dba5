"""The shared memory: one mapping for all processes, and nothing lost with a dead one."""

import ctypes
import mmap
import os
import time
from typing import Any

import pytest
from conftest import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import layout as shared_module
from cpanbridge.supervisor.memory.connection_table import ConnectionTableWriter
from cpanbridge.supervisor.memory.fields import LAYOUT, Header
from cpanbridge.supervisor.memory.layout import LayoutError, Shared, slot_capacity


def create(slots: int, window: int = 10) -> Shared:
    return Shared.create(slots, Limits(max_requests_per_minute=window))


def ring(shared: Shared) -> memoryview:
    return shared.window._ring


def test_a_forked_process_sees_and_writes_the_same_memory() -> None:
    shared = create(3)
    pid = os.fork()
    if pid == 0:
        shared.slots[2].opened = 7
        shared.header.admissions = 5
        ring(shared)[10] = -1
        os._exit(0)
    os.waitpid(pid, 0)
    assert (shared.slots[2].opened, shared.header.admissions, ring(shared)[10]) == (7, 5, -1)


def fields(structure: ctypes.Structure) -> list[str]:
    return [name for name, kind, *_ in structure._fields_ if kind is ctypes.c_int64]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(0, 50))
def test_no_two_fields_share_memory(slots: int, window: int) -> None:
    shared = create(slots, window)
    try:
        places: list[tuple[Any, str]] = [(shared.header, name) for name in fields(shared.header)]
        for slot in shared.slots:
            places += [(slot, name) for name in fields(slot)]
        values = memoryview(ring(shared))
        for number, (structure, name) in enumerate(places):
            setattr(structure, name, number)
        for position in range(len(values)):
            values[position] = -1 - position
        assert [getattr(*context) for context in places] == list(range(len(places)))
        assert list(values) == [-1 - position for position in range(len(values))]
    finally:
        os.close(shared.fd)


def test_it_has_no_name_and_is_not_handed_to_other_programs() -> None:
    shared = create(2)
    assert os.readlink(f"/proc/self/fd/{shared.fd}").startswith("/memfd:")
    assert not os.get_inheritable(shared.fd)


def test_what_is_open_is_the_sum_over_all_workers() -> None:
    shared = create(3)
    for slot, (opened, closed) in zip(shared.slots, ((5, 1), (7, 7), (3, 0)), strict=True):
        slot.opened, slot.closed = opened, closed
        slot.admitted, slot.succeeded, slot.failed = opened + 1, closed - closed // 2, closed // 2
    assert shared.connections() == 7
    assert shared.running() == 10


def test_clear_gives_back_what_a_dead_worker_held_and_keeps_its_totals() -> None:
    shared = create(2)
    slot, other = shared.slots
    slot.pid = 99
    slot.opened, slot.closed = 10, 4
    slot.admitted, slot.succeeded, slot.failed = 9, 5, 1
    slot.accept_waits_for, slot.request_waits_for = 2, 2
    slot.refused, slot.invalid_request, slot.busy_ns = 3, 2, 12345
    slot.memory = 1 << 20
    ConnectionTableWriter(shared.statistics[0].connection_table).enter(1, 5)
    other.opened, other.admitted = 2, 1
    shared.clear(slot)
    assert (slot.pid, slot.connections, slot.running) == (0, 0, 0)
    assert (slot.accept_waits_for, slot.request_waits_for) == (0, 0)
    assert (slot.opened, slot.admitted) == (10, 9)
    assert slot.finished == slot.admitted
    assert (slot.succeeded, slot.failed) == (5, 4)  # those that it ran have failed
    assert slot.refused == 3
    assert (slot.invalid_request, slot.busy_ns) == (2, 12345)
    assert slot.memory == 0
    assert shared.statistics[0].connection_table.connections() == []
    assert (shared.connections(), shared.running()) == (2, 1)


def test_uptime_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.install(monkeypatch, shared_module)
    shared = create(1)
    clock.now += 2_500_000_000
    assert shared.uptime == 2.5


def test_there_is_room_for_two_generations_and_more() -> None:
    for workers in range(1, 257):
        assert slot_capacity(workers) >= 3 * workers


def test_slots_that_were_never_used_are_not_looked_at() -> None:
    shared = Shared.create(8, Limits(), used=2)
    assert len(shared.used_slots) == 2
    shared.header.slots_used = 5
    assert len(shared.used_slots) == 5


class Ordering:
    """Stands for the gate's lock, which orders what is stored before it is released."""

    def __init__(self, shared: Shared, *, free: bool) -> None:
        self._shared = shared
        self._free = free
        self.seen: list[int] = []

    def acquire(self, *, timeout: float) -> bool:
        assert timeout < 0.1  # the master must not stand still
        self.seen.append(self._shared.header.recount)
        return self._free

    def release(self) -> None:
        self.seen.append(self._shared.header.recount)


@pytest.mark.parametrize(("free", "seen"), [(True, [0, 1]), (False, [0])])
def test_that_a_slot_was_cleared_is_told_by_the_lock_where_it_is_free(
    monkeypatch: pytest.MonkeyPatch, free: bool, seen: list[int]
) -> None:
    shared = create(1)
    lock = Ordering(shared, free=free)
    monkeypatch.setattr(shared, "lock", lock)
    shared.clear(shared.slots[0])
    assert lock.seen == seen
    assert shared.header.recount == 1


# -- a master that takes over --


def test_another_process_finds_everything_by_the_descriptor_alone() -> None:
    shared = create(3, window=20)
    shared.slots[2].opened = 7
    for number in range(5):
        shared.window.record(number)
    other = Shared.attach(os.dup(shared.fd))
    assert len(other.slots) == 3
    assert other.slots[2].opened == 7
    assert other.window.limit == 20
    assert list(ring(other)[:5]) == [0, 1, 2, 3, 4]
    other.slots[1].failed = 9
    other.rings.try_to_resize(30)
    assert shared.slots[1].failed == 9
    assert shared.window.limit == 30


def test_limits_that_change_again_and_again_take_no_more_memory() -> None:
    shared = create(2, 100_000)
    for _ in range(50_000):
        shared.window.record(time.monotonic_ns())

    def blocks_after(changes: int) -> int:
        for change in range(changes):
            shared.rings.try_to_resize((200_000, 100_000)[change % 2])
        assert shared.window.count() == 50_000
        return os.fstat(shared.fd).st_blocks

    few = blocks_after(2)
    assert blocks_after(20) <= 1.1 * few


def test_memory_of_another_layout_is_refused() -> None:
    shared = create(1)
    with mmap.mmap(shared.fd, ctypes.sizeof(Header)) as memory:
        memory[:8] = (LAYOUT + 1).to_bytes(8, "little")
    with pytest.raises(LayoutError, match=f"layout is {LAYOUT + 1}, and this version's is"):
        Shared.attach(shared.fd)


def test_memory_that_is_not_ours_is_refused() -> None:
    descriptor = os.memfd_create("empty")
    with pytest.raises(LayoutError, match="too small"):
        Shared.attach(descriptor)
    os.close(descriptor)
