"""A call whose time is over has an answer, whenever it returns."""

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate, Wakeups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.protocol.messages import Request
from cpanbridge.workers.requests.timeouts import CallTimeouts, Running

REQUEST = cast(
    Request, SimpleNamespace(module="m", function="f", request_id=None, perl_caller=None)
)


class SlowPeer:
    """A client that is told something only when the test says so."""

    framed = given_up = False

    def __init__(self) -> None:
        self.is_told = threading.Event()
        self.may_end = threading.Event()
        self.heard = b""

    def say_last(self, data: bytes) -> None:
        self.is_told.set()
        assert self.may_end.wait(20)
        self.heard = data


class House:
    """A worker's watch, and one call that has an admitted request's room and a connection's."""

    def __init__(self) -> None:
        self.shared = Shared.create(1, Limits())
        wakeups = [Wakeups.hang()]
        self.gate = Gate(self.shared, 0, wakeups)
        slot = self.shared.slots[0]
        slot.opened = slot.admitted = 1
        wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watch = CallTimeouts(0, slot, 0.0, wake, self.gate)
        self.client = SlowPeer()

    def begin(self, seconds: float) -> Running:
        running = self.watch.begin(REQUEST, 0, cast(Any, self.client), seconds, seconds)
        assert running is not None
        return running


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    os.close(house.shared.fd)


def test_a_call_that_returns_while_its_client_is_told_does_not_cut_that_off(house: House) -> None:
    running = house.begin(1e-9)
    outcome: list[bytes] = []

    def call_returns() -> None:
        assert not house.watch.end(running)
        outcome.append(house.client.heard)  # its connection is closed now

    looks = threading.Thread(target=house.watch.look, daemon=True)
    looks.start()
    assert house.client.is_told.wait(20)
    returns = threading.Thread(target=call_returns, daemon=True)
    returns.start()
    returns.join(0.1)
    house.client.may_end.set()
    for thread in (returns, looks):
        thread.join(20)
        assert not thread.is_alive()
    assert b"RequestTimeout" in outcome[0]


def test_its_room_is_given_back_once(house: House) -> None:
    house.client.may_end.set()
    running = house.begin(1e-9)
    house.watch.look()
    house.watch.look()
    assert not house.watch.end(running)
    slot = house.shared.slots[0]
    assert (slot.admitted, slot.succeeded, slot.failed) == (1, 0, 1)
    assert (slot.opened, slot.closed) == (1, 1)
    assert house.client.given_up


def test_a_call_that_is_in_time_is_not_answered(house: House) -> None:
    running = house.begin(1000)
    assert house.watch.look() is not None
    assert house.watch.end(running)
    assert not house.client.is_told.is_set()
    assert house.watch.look() is None
