"""A call whose time is over is answered once, and its room is given back once."""

import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import ADMITTED, WAITS_FOR_THREAD
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.protocol.requests import Request
from cpanbridge.workers.requests.timeouts import CallTimeouts, Running


class SlowClient:
    """A client socket whose last sending takes until the test lets it end."""

    framed = released = False

    def __init__(self) -> None:
        self.is_sending = threading.Event()
        self.may_end = threading.Event()
        self.received = b""

    def send_last(self, data: bytes) -> None:
        self.is_sending.set()
        assert self.may_end.wait(20)
        self.received = data


class Worker:
    """A worker's call timeouts, with one client that has a connection's and a request's room."""

    def __init__(self) -> None:
        self.shared = Shared.create(1, Limits())
        self._descriptors = Wakeups.create()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        gate = self.gate = Gate(self.shared, 0, [self._descriptors], threads=1)
        self.slot = self.shared.slots[0]
        with self.shared.lock:
            gate.take_connection()
            gate.admit()
        self.timeouts = CallTimeouts(0, self.slot, 0.0, self._wake, gate)
        self.client = SlowClient()

    def begin(self, seconds: float) -> Running:
        request = Request("m", "f")
        running = self.timeouts.begin(request, 0, cast(Any, self.client), seconds, seconds)
        assert running is not None
        return running

    def close(self) -> None:
        for descriptor in (*self._descriptors, self._wake, self.shared.fd):
            os.close(descriptor)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_a_call_that_returns_while_its_client_is_answered_waits_for_that(worker: Worker) -> None:
    running = worker.begin(1e-9)
    received: list[bytes] = []

    def call_returns() -> None:
        assert not worker.timeouts.end(running)
        received.append(worker.client.received)  # its thread closes the connection now

    main = threading.Thread(target=worker.timeouts.check, daemon=True)
    main.start()
    assert worker.client.is_sending.wait(20)
    call = threading.Thread(target=call_returns, daemon=True)
    call.start()
    call.join(0.1)
    worker.client.may_end.set()
    for thread in (call, main):
        thread.join(20)
        assert not thread.is_alive()
    assert b"RequestTimeout" in received[0]


def test_its_room_is_given_back_once(worker: Worker) -> None:
    worker.client.may_end.set()
    running = worker.begin(1e-9)
    worker.timeouts.check()
    worker.timeouts.check()
    assert not worker.timeouts.end(running)
    slot = worker.slot
    assert (slot.admitted, slot.succeeded, slot.failed) == (1, 0, 1)
    assert (slot.opened, slot.closed) == (1, 1)
    assert worker.client.released


def test_its_thread_is_not_free_before_it_returns(worker: Worker) -> None:
    worker.client.may_end.set()
    running = worker.begin(1e-9)
    worker.timeouts.check()
    assert worker.shared.running() == 0
    assert worker.gate.admit() == WAITS_FOR_THREAD
    worker.timeouts.end(running)
    assert worker.gate.admit() == ADMITTED


def test_a_call_that_is_in_time_is_not_answered(worker: Worker) -> None:
    running = worker.begin(1000)
    assert worker.timeouts.check() is not None
    assert worker.timeouts.end(running)
    assert not worker.client.is_sending.is_set()
    assert worker.timeouts.check() is None
