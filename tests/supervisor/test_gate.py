"""The gate's promises, over several workers, and whatever instruction one of them is killed at."""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from conftest import Clock
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from killing import kill_at
from plain_client import until

from cpanbridge.supervisor import gate as gate_module
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate, Obstacle, Wakeups, set_overload_state
from cpanbridge.supervisor.memory import layout as shared_module
from cpanbridge.supervisor.memory import rate_window as window_module
from cpanbridge.supervisor.memory.fields import GATE_CLOSED, GATE_OPEN, WAITS_FOR_REQUEST
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.rate_window import WINDOW_NS


class Workers:
    """Shared memory, wake-ups and a gate for each of some workers, all in this process."""

    def __init__(self, workers: int = 2, **limits: Any) -> None:
        self.limits = Limits(**({"max_requests_per_minute": 0} | limits))
        self.shared = Shared.create(workers, self.limits)
        self.wakeups = [Wakeups.create() for _ in range(workers)]
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in range(workers)]
        self.stop = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        for descriptor in (
            self.shared.fd,
            *(fd for wakeups in self.wakeups for fd in wakeups),
            self.stop,
        ):
            os.close(descriptor)

    def try_to_admit(self, gate: Gate) -> bool:
        """Admit a request if there is room now."""
        return gate.attempt(gate.admit, connection=False) is True

    def try_to_open(self, gate: Gate) -> bool:
        """Let a client in if there is room now."""
        return gate.attempt(gate.take_connection, connection=True) is True and gate.accepted() > 0

    def reason(self, *, connection: bool) -> str | None:
        with self.shared.lock:
            obstacle = self.gates[0].obstacle(connection=connection)
        return obstacle and obstacle.reason


@pytest.fixture
def new_workers() -> Iterator[Callable[..., Workers]]:
    with contextlib.ExitStack() as stack:

        def make(count: int = 2, **limits: Any) -> Workers:
            workers = Workers(count, **limits)
            stack.callback(workers.close)
            return workers

        yield make


NewWorkers = Callable[..., Workers]


def enter(
    workers: Workers, gate: Gate, take: Callable[[], Literal[True]], *, connection: bool
) -> object:
    """Take room as a worker does; None when told to stop before there was any."""
    outcome = gate.attempt(take, connection=connection)
    if not isinstance(outcome, Obstacle):
        return outcome
    return gate.wait_and_take(take, workers.stop, connection=connection)


class Waiter(threading.Thread):
    """Enters the gate in a thread; `result` says whether it has got in."""

    def __init__(self, workers: Workers, gate: Gate, *, connection: bool) -> None:
        super().__init__(daemon=True)
        self.workers, self.gate, self.connection = workers, gate, connection
        self.result: object = "still waiting"
        self.start()

    def run(self) -> None:
        take = self.gate.take_connection if self.connection else self.gate.admit
        entered = enter(self.workers, self.gate, take, connection=self.connection)
        self.result = "in" if entered else None


# -- 1 and 2: connections and requests --


def test_no_more_connections_than_allowed_over_all_workers(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_connections=5)
    results = [workers.try_to_open(workers.gates[n % 3]) for n in range(9)]
    assert results == [True] * 5 + [False] * 4
    assert workers.reason(connection=True) == "connections"
    workers.gates[2].release_connection()
    assert workers.try_to_open(workers.gates[0])
    assert not workers.try_to_open(workers.gates[1])
    assert workers.shared.connections() == 5
    assert workers.shared.header.peak_connections == 5


def test_room_for_a_client_that_is_not_accepted_yet_is_taken(new_workers: NewWorkers) -> None:
    workers = new_workers(2, max_connections=2)
    first, second = workers.gates
    assert workers.try_to_open(first)
    assert first.attempt(first.take_connection, connection=True) is True
    assert workers.reason(connection=True) == "connections"
    assert not second.take_any_connection()
    waiter = Waiter(workers, second, connection=True)
    until(lambda: registered(workers) == 1)
    first.release_connection()  # no client came
    waiter.join(20)
    assert waiter.result == "in"
    assert workers.shared.connections() == 2
    assert workers.shared.header.peak_connections == 2


def test_no_more_requests_than_allowed_over_all_workers(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_concurrent_requests=4)
    results = [workers.try_to_admit(workers.gates[n % 3]) for n in range(9)]
    assert results == [True] * 4 + [False] * 5
    assert workers.reason(connection=False) == "concurrency"
    workers.gates[1].release_request(True)
    assert workers.try_to_admit(workers.gates[0])
    assert not workers.try_to_admit(workers.gates[2])


def test_nobody_is_accepted_while_requests_have_no_room(new_workers: NewWorkers) -> None:
    workers = new_workers(max_concurrent_requests=1, max_requests_per_minute=2)
    assert workers.try_to_admit(workers.gates[0])
    assert workers.reason(connection=True) == "concurrency"
    workers.gates[0].release_request(True)
    assert workers.try_to_admit(workers.gates[0])
    workers.gates[0].release_request(True)
    assert workers.reason(connection=True) == "rate"


def test_while_the_gate_is_closed_nothing_is_accepted_or_admitted(new_workers: NewWorkers) -> None:
    workers = new_workers()
    workers.shared.counters.overload_state.value = GATE_CLOSED
    assert workers.reason(connection=True) == "overload"
    assert workers.reason(connection=False) == "overload"
    workers.shared.counters.overload_state.value = GATE_OPEN
    assert workers.reason(connection=True) is None
    assert workers.reason(connection=False) is None


def test_a_worker_that_exits_finishes_what_it_has_while_the_gate_is_closed(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_concurrent_requests=1)
    exiting, other = workers.gates
    workers.shared.counters.overload_state.value = GATE_CLOSED
    waiter = Waiter(workers, exiting, connection=False)
    until(lambda: registered(workers) == 1)
    exiting.ignore_overload()
    waiter.join(20)
    assert waiter.result == "in"
    assert not workers.try_to_admit(exiting)  # the other limits are kept
    exiting.release_request(True)
    assert not workers.try_to_admit(other)


def test_opening_the_gate_wakes_all_threads_that_wait_for_it(
    new_workers: NewWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "OVERLOAD_RECHECK_MS", 60_000)
    workers = new_workers(3)
    set_overload_state(workers.shared, workers.wakeups, GATE_CLOSED)
    waiters = [Waiter(workers, gate, connection=c) for gate in workers.gates for c in (True, False)]
    until(lambda: registered(workers) == 6)
    set_overload_state(workers.shared, workers.wakeups, GATE_OPEN)
    for waiter in waiters:
        waiter.join(20)
        assert waiter.result == "in"
    assert workers.shared.header.closings == 1


# -- 3: the rate --


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 6),
    st.lists(
        st.sampled_from([0, 1, WINDOW_NS // 5, WINDOW_NS - 1, WINDOW_NS, WINDOW_NS + 1])
        | st.integers(0, WINDOW_NS),
        max_size=60,
    ),
)
def test_in_any_60_seconds_at_most_so_many_are_admitted(
    monkeypatch: pytest.MonkeyPatch, window: int, steps: list[int]
) -> None:
    clock = Clock()
    with monkeypatch.context() as patched:
        clock.install(patched, gate_module, shared_module, window_module)
        workers = Workers(2, max_requests_per_minute=window, max_concurrent_requests=1000)
        try:
            admitted: list[int] = []
            for number, step in enumerate(steps):
                clock.now += step
                # Exact: refused only if the interval of 60 s that ends now is full.
                room = sum(clock.now - at <= WINDOW_NS for at in admitted) < window
                assert workers.try_to_admit(workers.gates[number % 2]) is room
                if room:
                    admitted.append(clock.now)
                assert workers.shared.admitted_in_window() == sum(
                    clock.now - at < WINDOW_NS for at in admitted
                )
        finally:
            workers.close()


def test_a_refused_request_is_told_when_there_will_be_room(
    monkeypatch: pytest.MonkeyPatch, new_workers: NewWorkers
) -> None:
    clock = Clock()
    clock.install(monkeypatch, gate_module, shared_module, window_module)
    workers = new_workers(max_requests_per_minute=2)
    first = clock.now
    for _ in range(2):
        assert workers.try_to_admit(workers.gates[0])
        clock.now += 1_000_000_000
    with workers.shared.lock:
        obstacle = workers.gates[1].obstacle(connection=True)
    assert obstacle is not None
    assert obstacle.until == first + WINDOW_NS + 1
    clock.now = obstacle.until - 1
    assert not workers.try_to_admit(workers.gates[1])
    clock.now = obstacle.until
    assert workers.try_to_admit(workers.gates[1])
    assert not workers.try_to_admit(workers.gates[0])


def test_without_a_rate_limit_nothing_is_refused_and_the_last_minute_is_counted(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_requests_per_minute=0, max_concurrent_requests=10_000)
    assert all(workers.try_to_admit(workers.gates[n % 2]) for n in range(5000))
    assert workers.shared.admitted_in_window() == 5000


# -- 5: waiting --


def registered(workers: Workers) -> int:
    """How many threads are registered as waiting."""
    return sum(
        bool(slot.accept_waits_for) + bool(slot.request_waits_for) for slot in workers.shared.slots
    )


def ring(workers: Workers) -> memoryview:
    """The times of the last admissions, as they stand in the memory."""
    return workers.shared.window._ring


def queued(workers: Workers) -> int:
    """How many threads wait for a request's room."""
    return sum(slot.queued for slot in workers.shared.slots)


@pytest.mark.parametrize("connection", [True, False])
def test_a_thread_that_waits_goes_on_when_another_worker_gives_room_back(
    new_workers: NewWorkers, connection: bool
) -> None:
    workers = new_workers(max_connections=1, max_concurrent_requests=1)
    holder, other = workers.gates
    assert workers.try_to_open(holder) if connection else workers.try_to_admit(holder)
    waiter = Waiter(workers, other, connection=connection)
    until(lambda: registered(workers) == 1)
    if connection:
        holder.release_connection()
    else:
        holder.release_request(True)
    waiter.join(20)
    assert waiter.result == "in"
    assert registered(workers) == 0


@pytest.mark.parametrize("connection", [True, False])
def test_a_wakeup_that_was_lost_costs_no_turn(new_workers: NewWorkers, connection: bool) -> None:
    workers = new_workers(max_connections=1, max_concurrent_requests=1)
    holder, other = workers.gates
    assert workers.try_to_open(holder) if connection else workers.try_to_admit(holder)
    waiter = Waiter(workers, other, connection=connection)
    until(lambda: registered(workers) == 1)
    workers.shared.clear(workers.shared.slots[0])  # as the master does: it wakes nobody
    waiter.join(20)
    assert waiter.result == "in"


def test_all_threads_that_wait_go_on_one_after_another(new_workers: NewWorkers) -> None:
    workers = new_workers(4, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    waiters = [Waiter(workers, gate, connection=False) for gate in workers.gates for _ in range(5)]
    until(lambda: queued(workers) == 20)
    assert registered(workers) == 4  # one of each worker looks, whatever their number
    workers.gates[0].release_request(True)
    for _ in range(20):
        inside = until(lambda: [w for w in waiters if w.result == "in"])
        assert len(inside) == 1
        assert workers.shared.running() == 1
        inside[0].gate.release_request(True)
        waiters.remove(inside[0])
    until(lambda: queued(workers) == registered(workers) == 0)


def test_a_thread_that_waits_goes_on_when_the_gate_opens(new_workers: NewWorkers) -> None:
    workers = new_workers()
    workers.shared.counters.overload_state.value = GATE_CLOSED
    waiter = Waiter(workers, workers.gates[1], connection=True)
    until(lambda: registered(workers) == 1)
    workers.shared.counters.overload_state.value = GATE_OPEN
    waiter.join(20)
    assert waiter.result == "in"


@pytest.mark.parametrize("reason", ["connections", "concurrency", "rate", "overload"])
def test_a_thread_that_waits_returns_when_told_to_stop(
    new_workers: NewWorkers, reason: str
) -> None:
    workers = new_workers(
        max_connections=1 if reason == "connections" else 100,
        max_concurrent_requests=1 if reason == "concurrency" else 100,
        max_requests_per_minute=1 if reason == "rate" else 0,
    )
    if reason == "connections":
        assert workers.try_to_open(workers.gates[0])
    elif reason == "overload":
        workers.shared.counters.overload_state.value = GATE_CLOSED
    else:
        assert workers.try_to_admit(workers.gates[0])
    assert workers.reason(connection=True) == reason
    waiter = Waiter(workers, workers.gates[1], connection=True)
    if reason != "rate":
        until(lambda: registered(workers) == 1)
    os.eventfd_write(workers.stop, 1)
    waiter.join(20)
    assert waiter.result is None
    assert registered(workers) == 0


def test_a_rate_slot_is_taken_when_it_comes_free_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window_ns = 300_000_000
    monkeypatch.setattr(window_module, "WINDOW_NS", window_ns)
    workers = Workers(2, max_requests_per_minute=3)
    try:
        entered: list[int] = []
        for number in range(9):
            gate = workers.gates[number % 2]
            assert enter(workers, gate, gate.admit, connection=False)
            entered.append(ring(workers)[number % 4])
            gate.release_request(True)
        for early, late in zip(entered, entered[3:], strict=False):
            assert late - early > window_ns
        # Within 1 ms on an idle machine; on a busy one the best of six must come near.
        assert min(b - a for a, b in zip(entered, entered[3:], strict=False)) < window_ns + 10**8
    finally:
        workers.close()


def test_waiting_uses_no_processor_time(new_workers: NewWorkers) -> None:
    workers = new_workers(max_concurrent_requests=1, max_requests_per_minute=1)
    assert workers.try_to_admit(workers.gates[0])
    waiter = Waiter(workers, workers.gates[1], connection=False)
    until(lambda: registered(workers) == 1)
    used, began = time.process_time(), time.monotonic()
    select.select([], [], [], 0.5)
    assert time.process_time() - used < 0.2 * (time.monotonic() - began)
    os.eventfd_write(workers.stop, 1)
    waiter.join(20)


# -- 6: killed at any instruction --


def one_life(workers: Workers) -> None:
    """Let a client in with its request, run it, and let it out."""
    gate = workers.gates[0]
    assert enter(workers, gate, gate.take_connection, connection=True)
    gate.accepted()
    assert enter(workers, gate, gate.admit, connection=False)
    gate.release_request(True)
    gate.release_connection()


def kept_life(workers: Workers) -> None:
    """The same without ever waiting, with a second request for which there is no room."""
    gate = workers.gates[0]
    assert gate.attempt(gate.take_connection, connection=True) is True
    gate.accepted()
    assert gate.attempt(gate.admit, connection=False) is True
    assert isinstance(gate.attempt(gate.admit, connection=False), Obstacle)
    gate.release_request(False)
    gate.release_connection()


def age(workers: Workers) -> None:
    """Let all admissions so far be over a minute old."""
    for position in range(len(ring(workers))):
        ring(workers)[position] -= 2 * WINDOW_NS


def assert_unharmed(workers: Workers, admitted_before: int, aged: int = 0) -> None:
    """Cleared by the master, a slot holds nothing and the others go on at once."""
    workers.shared.clear(workers.shared.slots[0])
    assert (workers.shared.connections(), workers.shared.running()) == (0, 0)
    assert registered(workers) == 0
    slot = workers.shared.slots[0]
    assert slot.succeeded + slot.failed == slot.finished == slot.admitted
    window = workers.shared.admitted_in_window()
    assert window in (admitted_before, admitted_before + 1)
    assert workers.shared.header.admissions == aged + window
    began = time.monotonic()
    gate = workers.gates[1]
    for number in range(workers.limits.max_requests_per_minute - window):
        assert workers.try_to_open(gate), number
        assert workers.try_to_admit(gate), number
        gate.release_request(True)
        gate.release_connection()
    assert not workers.try_to_admit(gate)  # exactly so many: none was counted twice or lost
    assert workers.shared.admitted_in_window() == workers.limits.max_requests_per_minute
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("life", [one_life, kept_life])
@pytest.mark.parametrize(("aged", "before"), [(0, 2), (8, 0)], ids=["new", "wrapped"])
def test_a_process_killed_between_any_two_steps_of_an_admission_leaks_nothing(
    aged: int, before: int, life: Callable[[Workers], None]
) -> None:
    step, killed = 0, True
    while killed:
        workers = Workers(
            2, max_connections=1, max_concurrent_requests=1, max_requests_per_minute=4
        )
        try:
            for _ in range(aged):
                one_life(workers)
                age(workers)
            for _ in range(before):
                one_life(workers)
            killed = kill_at(step, lambda workers=workers: life(workers))  # type: ignore[misc]
            assert_unharmed(workers, before, aged)
        finally:
            workers.close()
        step += 1
    assert step > 50  # it was killed at many places indeed


def test_a_process_killed_while_it_finds_no_room_leaks_nothing() -> None:
    step, killed = 0, True
    while killed:
        workers = Workers(
            2, max_connections=1, max_concurrent_requests=1, max_requests_per_minute=4
        )
        try:
            other = workers.gates[1]
            assert workers.try_to_open(other)
            assert workers.try_to_admit(other)

            def reject(workers: Workers = workers) -> None:
                gate = workers.gates[0]
                assert isinstance(gate.attempt(gate.take_connection, connection=True), Obstacle)
                assert isinstance(gate.attempt(gate.admit, connection=False), Obstacle)
                assert not gate.take_any_connection()

            killed = kill_at(step, reject)
            assert workers.shared.slots[0].full <= 1
            other.release_request(True)
            other.release_connection()
            assert_unharmed(workers, admitted_before=1)
        finally:
            workers.close()
        step += 1
    assert step > 20


def test_a_process_killed_while_it_waits_leaks_nothing() -> None:
    step, killed = 0, True
    while killed:
        workers = Workers(
            2, max_connections=1, max_concurrent_requests=1, max_requests_per_minute=4
        )
        try:
            assert workers.try_to_open(workers.gates[1])
            os.eventfd_write(workers.stop, 1)  # so that the child does not wait for long

            def wait(workers: Workers = workers) -> None:
                gate = workers.gates[0]
                assert enter(workers, gate, gate.admit, connection=True) is None

            killed = kill_at(step, wait)
            workers.gates[1].release_connection()
            assert_unharmed(workers, admitted_before=0)
        finally:
            workers.close()
        step += 1
    assert step > 15


@pytest.mark.parametrize("killed", ["sender", "receiver"])
def test_a_process_killed_while_a_client_changes_hands_leaks_nothing(killed: str) -> None:
    """The client is the sender's until it is taken, and counted by one of the two at least."""
    step, was_killed = 0, True
    while was_killed:
        workers = Workers(3, max_connections=1)
        try:
            sender, receiver, other = workers.gates
            assert workers.try_to_open(sender)
            if killed == "receiver":
                was_killed = kill_at(step, receiver.take_handed_off)
                assert not workers.try_to_open(other)
                workers.shared.clear(
                    workers.shared.slots[1]
                )  # so it was not taken: the claim says so
                assert workers.shared.connections() == 1
                sender.release_connection()
            else:
                receiver.take_handed_off()
                was_killed = kill_at(step, sender.release_connection)
                assert not workers.try_to_open(other)
                workers.shared.clear(workers.shared.slots[0])
                assert workers.shared.connections() == 1
                receiver.release_connection()
            assert workers.shared.connections() == 0
            assert workers.try_to_open(other)
            assert not workers.try_to_open(other)
        finally:
            workers.close()
        step += 1
    assert step > 2


def test_the_lock_of_a_killed_process_is_free_at_once(new_workers: NewWorkers) -> None:
    workers = new_workers()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with workers.shared.lock:
            os.write(write_end, b"x")
            while True:
                signal.pause()
    os.read(read_end, 1)
    waiter = Waiter(workers, workers.gates[1], connection=True)
    waiter.join(0.2)
    held = waiter.is_alive()  # as long as the lock is the child's
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    waiter.join(20)
    assert held
    assert waiter.result == "in"
    os.close(read_end)
    os.close(write_end)


def test_processes_that_admit_at_the_same_time_lose_no_update(new_workers: NewWorkers) -> None:
    workers = new_workers(4, max_requests_per_minute=1000, max_concurrent_requests=1000)
    pids = []
    for slot in range(4):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                admitted = 0
                while workers.try_to_admit(workers.gates[slot]):
                    admitted += 1
                os._exit(0 if admitted == workers.shared.slots[slot].admitted else 2)
            os._exit(1)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert statuses == [0] * 4
    assert sum(slot.admitted for slot in workers.shared.slots) == 1000
    assert workers.shared.header.admissions == 1000
    times = list(ring(workers)[:1000])
    assert times == sorted(times)


def test_totals_are_counted(new_workers: NewWorkers) -> None:
    workers = new_workers()
    gate, slot = workers.gates[1], workers.shared.slots[1]
    for succeeded in (True, True, False):
        assert workers.try_to_admit(gate)
        gate.release_request(succeeded)
    assert (slot.finished, slot.succeeded, slot.failed) == (3, 2, 1)


@pytest.mark.parametrize("connection", [True, False])
def test_room_given_back_between_a_look_and_the_sleep_is_not_missed(
    new_workers: NewWorkers, connection: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "LOST_WAKEUP_MS", 60_000)
    workers = new_workers(max_concurrent_requests=1)
    holder, other = workers.gates
    assert workers.try_to_admit(holder)
    look, looks = other.obstacle, []

    def look_and_then_lose(*, connection: bool) -> Obstacle | None:
        obstacle = look(connection=connection)
        looks.append(obstacle)
        if len(looks) == 2:  # the first look in line, before anybody is registered
            holder.release_request(True)
        return obstacle

    monkeypatch.setattr(other, "obstacle", look_and_then_lose)
    waiter = Waiter(workers, other, connection=connection)
    waiter.join(20)
    assert waiter.result == "in"


def test_a_thread_that_accepts_takes_no_wakeup_from_one_that_has_a_request(
    new_workers: NewWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "LOST_WAKEUP_MS", 60_000)
    workers = new_workers(3, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    acceptor = Waiter(workers, workers.gates[1], connection=True)
    request = Waiter(workers, workers.gates[2], connection=False)
    until(lambda: registered(workers) == 2)
    workers.gates[0].release_request(True)
    request.join(20)
    assert request.result == "in"
    workers.gates[2].release_request(True)
    acceptor.join(20)
    assert acceptor.result == "in"


def test_wakeups_do_not_pile_up(new_workers: NewWorkers) -> None:
    workers = new_workers()
    with workers.shared.lock:  # somebody waits, and is slow to wake
        workers.gates[1]._publish(WAITS_FOR_REQUEST, connection=False)
    for _ in range(20):
        assert workers.try_to_admit(workers.gates[0])
        workers.gates[0].release_request(True)
    os.eventfd_read(workers.wakeups[1].request)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(workers.wakeups[1].request)


# -- the counters --


OPERATIONS = ("open", "reserve", "nobody", "close", "admit", "finish", "hand over", "die", "limits")


@given(
    st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2), st.integers(1, 12)), max_size=120
    )
)
@hypothesis_settings(deadline=None, max_examples=150)
def test_there_is_room_just_when_all_slots_together_leave_some(
    steps: list[tuple[str, int, int]],
) -> None:
    workers = Workers(3, max_connections=12, max_concurrent_requests=6)
    try:
        connections, reserved, running = [0] * 3, [0] * 3, [0] * 3
        most, most_running = 12, 6
        for operation, who, number in steps:
            gate = workers.gates[who]
            has_request_room = sum(running) < most_running
            has_room = has_request_room and sum(connections) + sum(reserved) < most
            if operation == "open" and not reserved[who]:
                assert workers.try_to_open(gate) == has_room
                connections[who] += has_room
            elif operation == "reserve" and not reserved[who]:
                found = gate.attempt(gate.take_connection, connection=True)
                assert isinstance(found, Obstacle) != has_room
                reserved[who] = int(has_room)
            elif operation == "nobody" and reserved[who]:
                gate.release_connection()
                reserved[who] = 0
            elif operation == "close" and connections[who]:
                gate.release_connection()
                connections[who] -= 1
            elif operation == "admit":
                assert workers.try_to_admit(gate) == has_request_room
                running[who] += has_request_room
            elif operation == "finish" and running[who]:
                gate.release_request(number % 2 == 0)
                running[who] -= 1
            elif operation == "hand over" and connections[who]:
                other = (who + 1) % 3
                workers.gates[other].take_handed_off()
                gate.release_connection()
                connections[who] -= 1
                connections[other] += 1
            elif operation == "die":
                workers.shared.clear(workers.shared.slots[who])
                connections[who] = reserved[who] = running[who] = 0
            elif operation == "limits":
                most, most_running = number, 1 + number // 2
                limits = Limits(
                    max_connections=most,
                    max_concurrent_requests=most_running,
                    max_requests_per_minute=0,
                )
                with workers.shared.lock:
                    workers.shared.apply_limits(limits)
            taken = sum(connections) + sum(reserved)
            assert workers.shared.connections() == taken
            if not workers.shared.header.recount:  # or until the next decision
                assert workers.shared.header.connections == taken
                assert workers.shared.header.running == sum(running)
            assert workers.shared.running() == sum(running)
    finally:
        workers.close()


def test_a_thread_in_a_slot_that_was_not_used_before_is_woken(
    new_workers: NewWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "LOST_WAKEUP_MS", 60_000)
    workers = new_workers(3, max_concurrent_requests=2)
    workers.shared.header.slots_used = 2
    assert workers.try_to_admit(workers.gates[0])  # it has seen two slots
    workers.shared.header.slots_used = 3
    assert workers.try_to_admit(workers.gates[2])
    waiter = Waiter(workers, workers.gates[2], connection=False)
    until(lambda: registered(workers) == 1)
    workers.gates[0].release_request(True)
    waiter.join(20)
    assert waiter.result == "in"


def test_a_thread_that_was_killed_while_it_waited_is_counted_no_longer(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers()
    waiting = workers.shared.counters.waiting
    with waiting.get_lock():
        workers.gates[1]._publish(WAITS_FOR_REQUEST, connection=False)
        assert waiting.value == 1
    workers.shared.clear(workers.shared.slots[1])
    assert workers.try_to_admit(workers.gates[0])
    assert waiting.value == 0


def test_room_of_a_dead_worker_is_there_for_a_client_that_is_only_to_be_told(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_connections=1)
    assert workers.try_to_open(workers.gates[0])
    workers.shared.clear(workers.shared.slots[0])
    assert workers.gates[1].take_any_connection()


def test_a_master_killed_while_it_clears_a_slot_leaks_no_room() -> None:
    step, killed = 0, True
    while killed:
        workers = Workers(2, max_connections=1, max_concurrent_requests=1)
        try:
            assert workers.try_to_open(workers.gates[0])
            assert workers.try_to_admit(workers.gates[0])
            workers.shared.slots[0].pid = 1234
            killed = kill_at(step, lambda w=workers: w.shared.clear(w.shared.slots[0]))  # type: ignore
            shared = Shared.attach(workers.shared.fd)  # the next master
            if shared.slots[0].pid:  # of a process that is not there
                shared.clear(shared.slots[0])
            assert workers.try_to_open(workers.gates[1])
            assert workers.try_to_admit(workers.gates[1])
        finally:
            workers.close()
        step += 1
    assert step > 10


def test_the_counters_are_those_of_multiprocessing(new_workers: NewWorkers) -> None:
    workers = new_workers(2)
    gate, counters = workers.gates[0], workers.shared.counters
    for counter in counters:
        assert type(counter) is type(multiprocessing.Value(ctypes.c_int64))
    assert workers.try_to_open(gate)
    assert workers.try_to_admit(gate)
    assert [counter.value for counter in counters] == [1, 1, 1, 0, GATE_OPEN]
    with counters.connections.get_lock():
        counters.connections.value += 1  # as everybody who knows them would write
    assert workers.shared.header.connections == 2


def test_a_counter_whose_lock_is_a_killed_processs_is_taken_within_a_second(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers()
    running = workers.shared.counters.running
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with running.get_lock():
            running.value += 1
            os.write(write_end, b"x")
            signal.pause()
    os.read(read_end, 1)
    assert not running.get_lock().acquire(block=False)  # as long as its holder lives
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with running.get_lock():
        assert running.value == 1
    assert time.monotonic() - began < 1
    os.waitpid(pid, 0)
    workers.shared.clear(workers.shared.slots[0])
    assert workers.try_to_admit(workers.gates[1])
    assert running.value == 1  # counted anew from the slots: the dead process had admitted none
    os.close(read_end)
    os.close(write_end)
