"""Threads come one by one as calls need them, and the door is never left alone."""

import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from plain_client import until

from cpanbridge.workers.accept.leader_followers import ThreadPool


class Visit(NamedTuple):
    """An arrival of the tests: whether it is expected to be quick, and what serving it does."""

    quick: bool
    serve: Callable[[], object]


class Hall:
    """A crew whose door is a queue. The test plays the worker's main thread, in `tend`."""

    def __init__(self, limit: int) -> None:
        self.arrivals: queue.SimpleQueue[Visit | None] = queue.SimpleQueue()
        self.started: set[threading.Thread] = set()
        self.threads: ThreadPool[Visit] = ThreadPool(
            limit, self.fetch, lambda visit: visit.quick, self.serve
        )
        self.at_door = 0
        self.most_at_door = 0
        self.over = threading.Event()

    def fetch(self) -> Visit | None:
        self.at_door += 1
        self.most_at_door = max(self.most_at_door, self.at_door)
        visit = self.arrivals.get()
        self.at_door -= 1
        return visit

    def serve(self, visit: Visit) -> None:
        self.started.add(threading.current_thread())
        visit.serve()

    def tend(self) -> None:
        while not self.over.is_set():
            self.over.wait(min(0.01, self.threads.look_after_door()))

    def send(self, *, quick: bool, serve: Callable[[], object] = lambda: None) -> threading.Event:
        """Let somebody arrive; the event tells when they have been served."""
        served = threading.Event()

        def run() -> None:
            try:
                serve()
            finally:
                served.set()

        self.arrivals.put(Visit(quick, run))
        return served

    def hold(self, gate: threading.Event, *, quick: bool = False) -> tuple[threading.Event, ...]:
        """An arrival that is served until `gate` is set: its beginning and its end."""
        begun = threading.Event()

        def work() -> None:
            begun.set()
            gate.wait(30)

        ended = self.send(quick=quick, serve=work)
        return begun, ended


@pytest.fixture
def hall(request: pytest.FixtureRequest) -> Iterator[Hall]:
    hall = Hall(getattr(request, "param", 100))
    tender = threading.Thread(target=hall.tend, daemon=True)
    tender.start()
    hall.threads.start()
    yield hall
    hall.arrivals.put(None)
    hall.over.set()
    tender.join(10)


def test_quick_arrivals_are_served_by_one_thread(hall: Hall) -> None:
    for _ in range(500):
        assert hall.send(quick=True).wait(20)
    # On a busy machine a quick one may be overtaken now and then: two or three, not one each.
    assert len(hall.started) <= 5


def test_slow_arrivals_one_after_another_need_no_more_than_two_threads(hall: Hall) -> None:
    for _ in range(200):
        assert hall.send(quick=False).wait(20)
        until(lambda: hall.threads.serving == 0)
    assert len(hall.started) <= 4


def test_a_slow_arrival_makes_another_thread_come(hall: Hall) -> None:
    gate = threading.Event()
    begun, ended = hall.hold(gate)
    assert begun.wait(20)
    assert hall.send(quick=False).wait(20)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(20)


def test_there_are_as_many_threads_as_slow_arrivals(hall: Hall) -> None:
    gate = threading.Event()
    held = [hall.hold(gate) for _ in range(30)]
    for begun, _ in held:
        assert begun.wait(20)
    assert hall.threads.serving == 30
    assert len(hall.started) == 30
    gate.set()
    for _, ended in held:
        assert ended.wait(20)
    until(lambda: hall.threads.serving == 0)


def test_only_one_thread_is_at_the_door(hall: Hall) -> None:
    gate = threading.Event()
    held = [hall.hold(gate, quick=n % 2 == 0) for n in range(20)]
    for begun, _ in held:
        assert begun.wait(20)
    gate.set()
    for _, ended in held:
        assert ended.wait(20)
    for n in range(200):
        hall.send(quick=n % 3 == 0)
    until(hall.arrivals.empty)
    assert hall.most_at_door == 1


@pytest.mark.parametrize("hall", [3], indirect=True)
def test_no_more_than_the_limit_are_served_at_a_time(hall: Hall) -> None:
    gate = threading.Event()
    held = [hall.hold(gate, quick=n == 1) for n in range(3)]
    for begun, _ in held:
        assert begun.wait(20)
    extra_begun, extra_ended = hall.hold(gate)
    # Nobody is left to fetch it, however long one looks after the door.
    for _ in range(20):
        hall.threads.look_after_door()
        assert not extra_begun.wait(0.01)
    assert hall.arrivals.qsize() == 1
    gate.set()
    assert extra_ended.wait(20)
    assert len(hall.started) <= 3


def test_the_door_is_taken_over_from_a_quick_one_that_hangs(hall: Hall) -> None:
    gate = threading.Event()
    begun, ended = hall.hold(gate, quick=True)
    assert begun.wait(20)
    assert hall.send(quick=True).wait(20)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(20)
    assert hall.send(quick=True).wait(20)
    until(lambda: hall.threads.serving == 0)


def test_the_main_thread_is_told_to_look_when_a_thread_keeps_the_door() -> None:
    hall = Hall(10)
    assert hall.threads.look_after_door() > 0.1  # nothing to look after
    hall.threads.start()
    gate = threading.Event()
    begun, _ = hall.hold(gate, quick=True)
    assert begun.wait(20)
    assert until(lambda: _readable(hall.threads.attention))
    assert hall.threads.look_after_door() <= 0.1  # soon again
    gate.set()
    hall.arrivals.put(None)


def _readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_an_exception_while_serving_costs_no_thread(hall: Hall) -> None:
    def fault() -> None:
        raise RuntimeError("a fault of the daemon's own")

    for quick in (True, False) * 20:
        assert hall.send(quick=quick, serve=fault).wait(20)
    assert hall.send(quick=False).wait(20)
    until(lambda: hall.threads.serving == 0)


def test_parked_threads_are_called_back_rather_than_new_ones_made(hall: Hall) -> None:
    for _ in range(20):
        gate = threading.Event()
        held = [hall.hold(gate) for _ in range(5)]
        for begun, _ in held:
            assert begun.wait(20)
        gate.set()
        for _, ended in held:
            assert ended.wait(20)
        until(lambda: hall.threads.serving == 0)
    assert len(hall.started) <= 8


def test_at_the_end_it_is_idle_once_the_last_has_been_served(hall: Hall) -> None:
    gate = threading.Event()
    begun, _ = hall.hold(gate)
    assert begun.wait(20)
    hall.arrivals.put(None)
    assert not hall.threads.wait_until_idle(0.05)
    gate.set()
    began = time.monotonic()
    assert hall.threads.wait_until_idle(20)
    assert time.monotonic() - began < 19


def test_a_door_that_is_closed_does_not_wait_for_who_keeps_it(hall: Hall) -> None:
    hall.over.set()  # the main thread looks after nothing while it drains
    gate = threading.Event()
    begun, ended = hall.hold(gate, quick=True)
    assert begun.wait(20)
    hall.threads.close_door()
    assert hall.threads.wait_until_door_is_left(20)
    assert not hall.threads.wait_until_idle(0)
    gate.set()
    assert ended.wait(20)
    assert hall.threads.wait_until_idle(20)


def test_a_thread_that_could_not_be_started_is_made_up_for(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    failures: list[threading.Thread] = []

    def fail_once(thread: threading.Thread) -> None:
        if thread.name == "client" and not failures:
            failures.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    gate = threading.Event()
    begun, ended = hall.hold(gate)
    assert begun.wait(20)
    assert failures
    assert hall.send(quick=False).wait(20), "nobody went to the door again"
    gate.set()
    assert ended.wait(20)
