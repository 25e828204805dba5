"""Threads are started as calls need them, and one of them always leads."""

import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from plain_client import until
from running_out import no_threads

from cpanbridge.workers.accept.leader_followers import ThreadPool


class Job(NamedTuple):
    """An arrival of the tests: whether it is expected to be quick, and what serving it does."""

    quick: bool
    serve: Callable[[], object]


class Fixture:
    """A thread pool that fetches from a queue. `tend` does what the worker's main thread does."""

    def __init__(self, limit: int) -> None:
        self.arrivals: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.started: set[threading.Thread] = set()
        self.threads: ThreadPool[Job] = ThreadPool(
            limit, self.fetch, lambda job: job.quick, self.serve
        )
        self.leading = 0
        self.most_leading = 0
        self.over = threading.Event()

    def fetch(self) -> Job | None:
        self.leading += 1
        self.most_leading = max(self.most_leading, self.leading)
        job = self.arrivals.get()
        self.leading -= 1
        return job

    def serve(self, job: Job) -> None:
        self.started.add(threading.current_thread())
        job.serve()

    def tend(self) -> None:
        while not self.over.is_set():
            self.over.wait(min(0.01, self.threads.watch_leader()))

    def send(self, *, quick: bool, serve: Callable[[], object] = lambda: None) -> threading.Event:
        """Add a job; the event tells when it has been served."""
        served = threading.Event()

        def run() -> None:
            try:
                serve()
            finally:
                served.set()

        self.arrivals.put(Job(quick, run))
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
def pool(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    pool = Fixture(getattr(request, "param", 100))
    tender = threading.Thread(target=pool.tend, daemon=True)
    tender.start()
    pool.threads.start()
    yield pool
    pool.arrivals.put(None)
    pool.over.set()
    tender.join(10)


def test_quick_arrivals_are_served_by_one_thread(pool: Fixture) -> None:
    for _ in range(500):
        assert pool.send(quick=True).wait(20)
    # On a busy machine a quick one may be overtaken now and then: two or three, not one each.
    assert len(pool.started) <= 5


def test_slow_arrivals_one_after_another_need_no_more_than_two_threads(pool: Fixture) -> None:
    for _ in range(200):
        assert pool.send(quick=False).wait(20)
        until(lambda: pool.threads.serving == 0)
    assert len(pool.started) <= 4


def test_a_slow_arrival_makes_another_thread_come(pool: Fixture) -> None:
    gate = threading.Event()
    begun, ended = pool.hold(gate)
    assert begun.wait(20)
    assert pool.send(quick=False).wait(20)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(20)


def test_there_are_as_many_threads_as_slow_arrivals(pool: Fixture) -> None:
    gate = threading.Event()
    held = [pool.hold(gate) for _ in range(30)]
    for begun, _ in held:
        assert begun.wait(20)
    assert pool.threads.serving == 30
    assert len(pool.started) == 30
    gate.set()
    for _, ended in held:
        assert ended.wait(20)
    until(lambda: pool.threads.serving == 0)


def test_only_one_thread_leads(pool: Fixture) -> None:
    gate = threading.Event()
    held = [pool.hold(gate, quick=n % 2 == 0) for n in range(20)]
    for begun, _ in held:
        assert begun.wait(20)
    gate.set()
    for _, ended in held:
        assert ended.wait(20)
    for n in range(200):
        pool.send(quick=n % 3 == 0)
    until(pool.arrivals.empty)
    assert pool.most_leading == 1


@pytest.mark.parametrize("pool", [3], indirect=True)
def test_no_more_than_the_limit_are_served_at_a_time(pool: Fixture) -> None:
    gate = threading.Event()
    held = [pool.hold(gate, quick=n == 1) for n in range(3)]
    for begun, _ in held:
        assert begun.wait(20)
    extra_begun, extra_ended = pool.hold(gate)
    # No thread is left to fetch it, however often the leader is checked.
    for _ in range(20):
        pool.threads.watch_leader()
        assert not extra_begun.wait(0.01)
    assert pool.arrivals.qsize() == 1
    gate.set()
    assert extra_ended.wait(20)
    assert len(pool.started) <= 3


def test_a_follower_is_promoted_when_a_job_served_in_place_takes_long(pool: Fixture) -> None:
    gate = threading.Event()
    begun, ended = pool.hold(gate, quick=True)
    assert begun.wait(20)
    assert pool.send(quick=True).wait(20)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(20)
    assert pool.send(quick=True).wait(20)
    until(lambda: pool.threads.serving == 0)


def test_the_main_thread_is_woken_when_the_leader_serves_in_place() -> None:
    pool = Fixture(10)
    assert pool.threads.watch_leader() > 0.1  # nothing to look after
    pool.threads.start()
    gate = threading.Event()
    begun, _ = pool.hold(gate, quick=True)
    assert begun.wait(20)
    assert until(lambda: _readable(pool.threads.attention))
    assert pool.threads.watch_leader() <= 0.1  # soon again
    gate.set()
    pool.arrivals.put(None)


def _readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_an_exception_while_serving_costs_no_thread(pool: Fixture) -> None:
    def fault() -> None:
        raise RuntimeError("a fault of the daemon's own")

    for quick in (True, False) * 20:
        assert pool.send(quick=quick, serve=fault).wait(20)
    assert pool.send(quick=False).wait(20)
    until(lambda: pool.threads.serving == 0)


def test_idle_threads_are_promoted_before_new_ones_are_started(pool: Fixture) -> None:
    for _ in range(20):
        gate = threading.Event()
        held = [pool.hold(gate) for _ in range(5)]
        for begun, _ in held:
            assert begun.wait(20)
        gate.set()
        for _, ended in held:
            assert ended.wait(20)
        until(lambda: pool.threads.serving == 0)
    assert len(pool.started) <= 8


def test_it_has_finished_once_the_last_job_has_been_served(pool: Fixture) -> None:
    gate = threading.Event()
    begun, _ = pool.hold(gate)
    assert begun.wait(20)
    pool.arrivals.put(None)
    assert not pool.threads.wait_until_finished(0.05)
    gate.set()
    began = time.monotonic()
    assert pool.threads.wait_until_finished(20)
    assert time.monotonic() - began < 19


def test_closing_does_not_wait_for_a_leader_that_serves(pool: Fixture) -> None:
    pool.over.set()  # the main thread looks after nothing while it drains
    gate = threading.Event()
    begun, ended = pool.hold(gate, quick=True)
    assert begun.wait(20)
    pool.threads.close()
    assert pool.threads.wait_until_no_leader(20)
    assert not pool.threads.wait_until_finished(0)
    gate.set()
    assert ended.wait(20)
    assert pool.threads.wait_until_finished(20)


def test_a_thread_that_could_not_be_started_is_made_up_for(
    pool: Fixture, monkeypatch: pytest.MonkeyPatch
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
    begun, ended = pool.hold(gate)
    assert begun.wait(20)
    assert failures
    assert pool.send(quick=False).wait(20), "no thread leads again"
    gate.set()
    assert ended.wait(20)


def test_a_first_leader_that_cannot_be_started_is_made_up_for() -> None:
    threads: ThreadPool[None] = ThreadPool(1, lambda: None, lambda _: True, lambda _: None)
    with no_threads():
        threads.start()
        threads.watch_leader()
        assert not threads.has_leader
    threads.watch_leader()
    assert threads.wait_until_finished(20)
