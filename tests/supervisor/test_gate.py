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
from typing import Any

import pytest
from conftest import Clock
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from killing import kill_at

from cpanbridge.supervisor import gate as gate_module
from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import PATIENCE_NS, Gate, set_overload_state
from cpanbridge.supervisor.memory import layout as shared_module
from cpanbridge.supervisor.memory import rate_window as window_module
from cpanbridge.supervisor.memory.fields import (
    ADMITTED,
    GATE_CLOSED,
    GATE_OPEN,
    WAITS_FOR_LOAD,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    WAITS_FOR_THREAD,
    WAITS_FOR_TURN,
)
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.rate_window import WINDOW_NS
from cpanbridge.supervisor.memory.wakeups import Wakeups


class Workers:
    """Shared memory, wake-ups and a gate for each of some workers, all in this process."""

    def __init__(self, workers: int = 2, **limits: Any) -> None:
        self.limits = Limits(**({"max_requests_per_minute": 0} | limits))
        self.shared = Shared.create(workers, self.limits)
        self.wakeups = [Wakeups.create() for _ in range(workers)]
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in range(workers)]

    def close(self) -> None:
        for descriptor in (self.shared.fd, *(fd for wakeups in self.wakeups for fd in wakeups)):
            os.close(descriptor)

    def try_to_admit(self, gate: Gate) -> bool:
        """Admit a request if there is room now."""
        return gate.admit() == ADMITTED

    def try_to_open(self, gate: Gate) -> bool:
        """Let a client in if there is room now."""
        return gate.take_connection() and gate.accepted() > 0

    def is_woken(self, number: int) -> bool:
        """Whether a worker's leading thread has been woken since the last look."""
        room = self.wakeups[number].room
        return bool(select.select([room], [], [], 0)[0]) and os.eventfd_read(room) > 0


@pytest.fixture
def new_workers() -> Iterator[Callable[..., Workers]]:
    with contextlib.ExitStack() as stack:

        def make(count: int = 2, **limits: Any) -> Workers:
            workers = Workers(count, **limits)
            stack.callback(workers.close)
            return workers

        yield make


NewWorkers = Callable[..., Workers]


# -- 1 and 2: connections and requests --


def test_no_more_connections_than_allowed_over_all_workers(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_connections=5)
    results = [workers.try_to_open(workers.gates[n % 3]) for n in range(9)]
    assert results == [True] * 5 + [False] * 4
    workers.gates[2].release_connection()
    assert workers.try_to_open(workers.gates[0])
    assert not workers.try_to_open(workers.gates[1])
    assert workers.shared.connections() == 5
    assert workers.shared.header.peak_connections == 5


def test_room_for_a_client_that_is_not_accepted_yet_is_taken(new_workers: NewWorkers) -> None:
    workers = new_workers(2, max_connections=2)
    first, second = workers.gates
    assert workers.try_to_open(first)
    assert first.take_connection()
    assert not second.take_connection(wait=True)
    assert not workers.is_woken(1)
    first.release_connection()  # no client came
    assert workers.is_woken(1)
    assert second.take_connection()
    assert waiting(workers) == 0
    assert workers.shared.connections() == 2
    assert workers.shared.header.peak_connections == 2


def test_no_more_requests_than_allowed_over_all_workers(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_concurrent_requests=4)
    results = [workers.try_to_admit(workers.gates[n % 3]) for n in range(9)]
    assert results == [True] * 4 + [False] * 5
    assert workers.gates[0].admit() == WAITS_FOR_REQUEST
    workers.gates[1].release_request(True)
    assert workers.try_to_admit(workers.gates[0])
    assert not workers.try_to_admit(workers.gates[2])


def test_clients_are_accepted_whatever_the_limits_of_requests_say(new_workers: NewWorkers) -> None:
    workers = new_workers(max_concurrent_requests=1, max_requests_per_minute=1)
    assert workers.try_to_admit(workers.gates[0])
    workers.shared.counters.overload_state.value = GATE_CLOSED
    assert workers.try_to_open(workers.gates[0])
    assert workers.try_to_open(workers.gates[1])


def test_while_the_gate_is_closed_no_request_begins(new_workers: NewWorkers) -> None:
    workers = new_workers()
    workers.shared.counters.overload_state.value = GATE_CLOSED
    assert workers.gates[0].admit() == WAITS_FOR_LOAD
    workers.shared.counters.overload_state.value = GATE_OPEN
    assert workers.try_to_admit(workers.gates[0])


def test_a_worker_that_exits_finishes_what_it_has_while_the_gate_is_closed(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_concurrent_requests=1)
    exiting, other = workers.gates
    workers.shared.counters.overload_state.value = GATE_CLOSED
    assert not workers.try_to_admit(exiting)
    exiting.ignore_overload()
    assert workers.is_woken(0)
    assert workers.try_to_admit(exiting)
    assert exiting.admit() == WAITS_FOR_REQUEST  # the other limits are kept
    exiting.release_request(True)
    assert not workers.try_to_admit(other)


def test_a_worker_runs_as_many_requests_as_it_has_threads(new_workers: NewWorkers) -> None:
    workers = new_workers(2)
    gate = Gate(workers.shared, 0, workers.wakeups, threads=2)
    assert workers.try_to_admit(gate)
    assert not gate.has_no_thread
    assert workers.try_to_admit(gate)
    assert gate.has_no_thread
    ticket = gate.enqueue(gate.admit())
    assert workers.shared.slots[0].request_waits_for == WAITS_FOR_THREAD
    gate.release_request(True)
    assert workers.is_woken(0)
    assert gate.admit(ticket) == ADMITTED


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
    assert workers.gates[1].admit() == WAITS_FOR_RATE
    free_at = first + WINDOW_NS + 1
    assert workers.gates[1].retry_after(WAITS_FOR_RATE) == (free_at - clock.now) / 1e9
    clock.now = free_at - 1
    assert not workers.try_to_admit(workers.gates[1])
    clock.now = free_at
    assert workers.try_to_admit(workers.gates[1])
    assert not workers.try_to_admit(workers.gates[0])


def test_without_a_rate_limit_nothing_is_refused_and_the_last_minute_is_counted(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_requests_per_minute=0, max_concurrent_requests=10_000)
    assert all(workers.try_to_admit(workers.gates[n % 2]) for n in range(5000))
    assert workers.shared.admitted_in_window() == 5000


# -- 5: waiting in order --


def waiting(workers: Workers) -> int:
    """How much is registered as waiting, by the slots; the counter agrees."""
    found = sum(slot.waiting for slot in workers.shared.slots)
    assert workers.shared.header.waiting == found
    return found


def ring(workers: Workers) -> memoryview:
    """The times of the last admissions, as they stand in the memory."""
    window = workers.shared.window
    return window._ring[: window.size]


class Line:
    """The requests of one worker that wait, as its `Admission` keeps them."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.tickets: list[int] = []

    def enter(self, ticket: int = 0) -> int:
        """A request comes that cannot run; its ticket."""
        self.tickets.append(self.gate.enqueue(self.gate.admit(ticket) or WAITS_FOR_TURN, ticket))
        self.tickets.sort()
        return self.tickets[-1]

    def admit(self) -> int:
        """Try to admit the first one."""
        first, *others = self.tickets
        code = self.gate.admit(first, others[0] if others else 0)
        if code == ADMITTED:
            self.tickets.pop(0)
        return code

    def leave(self) -> None:
        """The first one leaves."""
        self.tickets.pop(0)
        self.gate.dequeue(self.tickets[0] if self.tickets else 0)


def test_requests_are_admitted_in_the_order_in_which_they_came_over_all_workers(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(4, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    lines = [Line(gate) for gate in workers.gates]
    came = [lines[number].enter() for number in (2, 0, 0, 3, 1, 2, 3, 3, 0, 1)]
    assert came == sorted(came)
    assert waiting(workers) == 10
    holder = workers.gates[0]
    for ticket in came:
        assert {line.admit() for line in lines if line.tickets} == {WAITS_FOR_REQUEST}
        holder.release_request(True)
        first = next(line for line in lines if line.tickets[:1] == [ticket])
        others = [line for line in lines if line.tickets and line is not first]
        assert all(line.admit() == WAITS_FOR_TURN for line in others)
        assert all(gate.admit() == WAITS_FOR_TURN for gate in workers.gates)  # new ones
        assert first.admit() == ADMITTED
        holder = first.gate
    holder.release_request(True)
    assert waiting(workers) == 0
    assert workers.try_to_admit(workers.gates[3])


def test_room_that_is_given_back_wakes_the_worker_whose_turn_it_is(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(3, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    second, third = Line(workers.gates[2]), Line(workers.gates[1])
    second.enter()
    third.enter()
    workers.gates[0].release_request(True)
    assert [workers.is_woken(number) for number in range(3)] == [False, False, True]
    assert third.admit() == WAITS_FOR_TURN  # and wakes it again
    assert [workers.is_woken(number) for number in range(3)] == [False, False, True]
    second.leave()  # there is room still: so it is the next one's turn
    assert [workers.is_woken(number) for number in range(3)] == [False, True, False]
    assert third.admit() == ADMITTED


def test_one_that_is_admitted_wakes_the_next_one(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_concurrent_requests=2)
    assert all(workers.try_to_admit(workers.gates[0]) for _ in range(2))
    lines = [Line(workers.gates[number]) for number in (1, 2)]
    for line in lines:
        line.enter()
    for _ in range(2):
        workers.gates[0].release_request(True)
    workers.is_woken(2)
    assert lines[0].admit() == ADMITTED
    assert workers.is_woken(2)
    assert lines[1].admit() == ADMITTED


def test_a_worker_that_does_not_take_its_turn_is_passed_over_until_it_does(
    new_workers: NewWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.install(monkeypatch, gate_module, shared_module, window_module)
    workers = new_workers(3, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    stopped, other = Line(workers.gates[1]), Line(workers.gates[2])
    for line in (stopped, stopped, other, other, other):
        line.enter()
    workers.gates[0].release_request(True)
    assert other.admit() == WAITS_FOR_TURN
    clock.now += PATIENCE_NS
    assert other.admit() == WAITS_FOR_TURN
    clock.now += 1
    assert other.admit() == ADMITTED
    other.gate.release_request(True)
    assert workers.is_woken(1)  # in case it runs again
    assert other.admit() == ADMITTED  # at once: that it does not run is known
    other.gate.release_request(True)
    assert stopped.admit() == ADMITTED
    stopped.gate.release_request(True)
    assert other.admit() == WAITS_FOR_TURN


def test_a_worker_without_a_thread_is_passed_over_also_while_there_is_no_room(
    new_workers: NewWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.install(monkeypatch, gate_module, shared_module, window_module)
    workers = new_workers(2, max_concurrent_requests=2)
    workers.gates[0].threads = 1
    assert all(workers.try_to_admit(gate) for gate in workers.gates)
    busy, other = Line(workers.gates[0]), Line(workers.gates[1])
    for line in (busy, other, other, other):
        line.enter()
    for patience in (PATIENCE_NS, 0, 0):  # once, and not for each of the others
        assert busy.admit() == WAITS_FOR_REQUEST
        other.gate.release_request(True)
        assert busy.admit() == WAITS_FOR_THREAD
        if patience:
            assert other.admit() == WAITS_FOR_TURN
            clock.now += patience + 1
        assert other.admit() == ADMITTED
    workers.gates[0].release_request(True)
    assert busy.admit() == ADMITTED


def test_the_requests_of_a_dead_worker_keep_nobody_waiting(new_workers: NewWorkers) -> None:
    workers = new_workers(2, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[1])
    dead, other = Line(workers.gates[0]), Line(workers.gates[1])
    dead.enter()
    other.enter()
    workers.gates[1].release_request(True)
    workers.shared.clear(workers.shared.slots[0])
    assert other.admit() == ADMITTED
    assert waiting(workers) == 0


def test_a_request_keeps_its_place_in_another_worker(new_workers: NewWorkers) -> None:
    workers = new_workers(2, max_concurrent_requests=1)
    assert workers.try_to_admit(workers.gates[0])
    here, there = Line(workers.gates[0]), Line(workers.gates[1])
    ticket = here.enter()
    there.enter()
    here.leave()
    there.enter(ticket)
    workers.gates[0].release_request(True)
    assert there.tickets[0] == ticket
    assert there.admit() == ADMITTED


@pytest.mark.parametrize("limit", ["max_concurrent_requests", "max_requests_per_minute"])
def test_opening_the_gate_wakes_all_that_wait_for_it(new_workers: NewWorkers, limit: str) -> None:
    workers = new_workers(3, **{limit: 100})
    set_overload_state(workers.shared, workers.wakeups, GATE_CLOSED)
    lines = [Line(gate) for gate in workers.gates]
    for line in lines:
        line.enter()
        assert line.admit() == WAITS_FOR_LOAD
    assert not any(workers.is_woken(number) for number in range(3))
    set_overload_state(workers.shared, workers.wakeups, GATE_OPEN)
    assert all(workers.is_woken(number) for number in range(3))
    assert [line.admit() for line in lines] == [ADMITTED] * 3
    assert workers.shared.header.closings == 1


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "admit", "finish", "leave", "die"]), st.integers(0, 2)),
        max_size=80,
    )
)
def test_in_any_order_of_events_the_oldest_request_is_the_next(
    monkeypatch: pytest.MonkeyPatch, operations: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(gate_module, "PATIENCE_NS", 10**15)  # none is passed over
    workers = Workers(3, max_concurrent_requests=2)
    try:
        lines = [Line(gate) for gate in workers.gates]
        running = [0, 0, 0]
        for operation, who in operations:
            line = lines[who]
            if operation == "enter":
                line.enter()
                if running[who] != workers.shared.slots[who].running:  # there was room
                    running[who] += 1
                    line.tickets.pop()
                    line.gate.dequeue(line.tickets[0] if line.tickets else 0)
            elif operation == "admit" and line.tickets:
                is_first = line.tickets[0] == min(
                    min(each.tickets) for each in lines if each.tickets
                )
                wanted = ADMITTED if is_first else WAITS_FOR_TURN
                assert line.admit() == (wanted if sum(running) < 2 else WAITS_FOR_REQUEST)
                running[who] = workers.shared.slots[who].running
            elif operation == "finish" and running[who]:
                running[who] -= 1
                line.gate.release_request(True)
            elif operation == "leave" and line.tickets:
                line.leave()
            elif operation == "die":
                workers.shared.clear(workers.shared.slots[who])
                line.tickets, running[who] = [], 0
                workers.gates[who].look(0)  # counts anew
            assert waiting(workers) == sum(len(each.tickets) for each in lines)
            assert workers.shared.running() == sum(running)
    finally:
        workers.close()


# -- 6: killed at any instruction --


def one_life(workers: Workers) -> None:
    """Let a client in with its request, run it, and let it out."""
    gate = workers.gates[0]
    assert gate.take_connection(wait=True)
    gate.accepted()
    ticket = gate.enqueue(WAITS_FOR_TURN)
    assert gate.admit(ticket) == ADMITTED
    gate.release_request(True)
    gate.release_connection()


def kept_life(workers: Workers) -> None:
    """The same without ever waiting, with a second request for which there is no room."""
    gate = workers.gates[0]
    assert gate.take_connection()
    gate.accepted()
    assert gate.admit() == ADMITTED
    assert gate.admit() == WAITS_FOR_REQUEST
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
    assert waiting(workers) == 0
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
                assert not gate.take_connection()
                assert gate.admit() == WAITS_FOR_REQUEST

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
            assert workers.try_to_admit(workers.gates[1])

            def wait(workers: Workers = workers) -> None:
                gate = workers.gates[0]
                assert not gate.take_connection(wait=True)
                line = Line(gate)
                line.enter()
                line.enter()
                assert line.admit() == WAITS_FOR_REQUEST
                line.leave()
                line.leave()
                gate.stop_waiting_for_connection()

            killed = kill_at(step, wait)
            workers.gates[1].release_request(True)
            workers.gates[1].release_connection()
            assert_unharmed(workers, admitted_before=1)
        finally:
            workers.close()
        step += 1
    assert step > 50


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
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(workers.try_to_open(workers.gates[1])), daemon=True
    )
    thread.start()
    thread.join(0.2)
    held = thread.is_alive()  # as long as the lock is the child's
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    thread.join(20)
    assert held
    assert results == [True]
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


def test_wakeups_do_not_pile_up(new_workers: NewWorkers) -> None:
    workers = new_workers()
    workers.gates[1].enqueue(WAITS_FOR_TURN)  # it waits, and is slow to wake
    for _ in range(20):
        workers.gates[0].wake_first()
    assert workers.is_woken(1)
    assert not workers.is_woken(1)


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
            has_room = sum(connections) + sum(reserved) < most
            if operation == "open" and not reserved[who]:
                assert workers.try_to_open(gate) == has_room
                connections[who] += has_room
            elif operation == "reserve" and not reserved[who]:
                assert gate.take_connection() == has_room
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
                assert workers.shared.apply_limits(limits)
            taken = sum(connections) + sum(reserved)
            assert workers.shared.connections() == taken
            if not workers.shared.header.recount:  # or until the next decision
                assert workers.shared.header.connections == taken
                assert workers.shared.header.running == sum(running)
            assert workers.shared.running() == sum(running)
    finally:
        workers.close()


def test_a_worker_in_a_slot_that_was_not_used_before_is_woken(new_workers: NewWorkers) -> None:
    workers = new_workers(3, max_concurrent_requests=2)
    workers.shared.header.slots_used = 2
    assert workers.try_to_admit(workers.gates[0])  # it has seen two slots
    workers.shared.header.slots_used = 3
    assert workers.try_to_admit(workers.gates[2])
    Line(workers.gates[2]).enter()
    workers.gates[0].release_request(True)
    assert workers.is_woken(2)


def test_room_of_a_dead_worker_is_there_for_a_client_that_is_only_to_be_told(
    new_workers: NewWorkers,
) -> None:
    workers = new_workers(max_connections=1)
    assert workers.try_to_open(workers.gates[0])
    workers.shared.clear(workers.shared.slots[0])
    assert workers.gates[1].take_connection()


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
