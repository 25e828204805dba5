"""The thread at the door hears of everything, and lets others know of whom it does not let in."""

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import take_down
from plain_client import until

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Bells, Gate
from cpanbridge.supervisor.shared import Shared
from cpanbridge.workers import brief, door
from cpanbridge.workers.door import Door
from cpanbridge.workers.keepalive import KeepAlive
from cpanbridge.workers.peer import Peer
from cpanbridge.workers.restraint import Restraint


class House:
    """A worker's door, the bells of this worker and of another one, and clients of all kinds."""

    def __init__(self, listeners: Sequence[socket.socket] = ()) -> None:
        self.bells = [Bells.hang(), Bells.hang()]
        self.keep_alive = KeepAlive()
        self.runs_calls = False
        self.door: Door[None] = Door(
            listeners=listeners,
            gate=Gate(Shared.create(2, Limits()), 0, self.bells),
            prepare=lambda data, arrived: None,
            runs_calls=lambda: self.runs_calls,
            incoming=self.nobody(),
            outgoing=self.nobody(),
            keep_alive=self.keep_alive,
            restraint=Restraint(self.nobody()),
        )
        self.thread: threading.Thread | None = None
        self.arrivals: list[Any] = []

    def nobody(self) -> Any:
        """A side from which nobody comes."""
        return SimpleNamespace(
            descriptor=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            waiting=False,
            settle=lambda most: None,
            away=0,
        )

    def send_thread(self) -> None:
        """Have a thread wait at the door for one arrival."""
        self.thread = threading.Thread(
            target=lambda: self.arrivals.append(self.door.next()), daemon=True
        )
        self.thread.start()

    def others_are_told(self) -> bool:
        """Whether the other worker's main thread was rung since the last look."""
        bell = self.bells[1].watch
        if not select.select([bell], [], [], 0)[0]:
            return False
        return os.eventfd_read(bell) > 0

    def close(self) -> None:
        self.door.close()
        if self.thread is not None:
            self.thread.join(20)
            assert not self.thread.is_alive()
        take_down(self.bells)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        yield listener


def come(listener: socket.socket) -> socket.socket:
    """A client that has connected and waits."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    return client


def sleeps(house: House) -> bool:
    """Whether the thread at the door waits in the kernel."""
    assert house.thread is not None
    stat = Path(f"/proc/self/task/{house.thread.native_id}/stat").read_text()
    return house.door._sleeps and stat.rpartition(")")[2].split()[0] == "S"


def test_of_idle_workers_one_is_woken_for_a_client_and_of_busy_ones_all(
    listener: socket.socket,
) -> None:
    houses = [House([listener]) for _ in range(6)]
    busy = houses[:2]
    for house in busy:
        house.runs_calls = True
    for house in houses:
        house.send_thread()
    until(lambda: all(map(sleeps, houses)))
    woken: list[House] = []
    for house in houses:
        house.door._let_in = lambda house=house: woken.append(house) or until(all_are)  # type: ignore
    expected = len(busy) + 1

    def all_are() -> bool:
        return len(woken) == expected

    with come(listener):
        until(all_are)
        assert set(busy) < set(woken)
        assert sum(map(sleeps, houses)) == len(houses) - expected
    for house in houses:
        house.close()


@pytest.mark.parametrize("is_shut", [False, True])
def test_a_client_of_whom_only_another_worker_was_told_is_found(
    listener: socket.socket, is_shut: bool
) -> None:
    house = House([listener])
    house.door._told_in_turn = house.door._interrupts  # the other one is the one to be told
    house.send_thread()
    until(lambda: sleeps(house))
    house.door.look_out()
    assert not select.select([house.door._bell], [], [], 0)[0]  # nobody is there
    with come(listener):
        if is_shut:
            house.door.shut()
            until(lambda: house.door.is_shut)
        house.door.look_out()
        if not is_shut:
            until(lambda: house.arrivals)
            os.close(house.arrivals[0].descriptor)
        house.close()
    assert (house.arrivals == [None]) is is_shut


def test_a_client_that_waits_outside_while_all_threads_are_busy_is_left_to_others(
    listener: socket.socket,
) -> None:
    house = House([listener])
    ours, rests = socket.socketpair()
    peer = Peer(ours.detach(), 0)
    house.keep_alive.rest(peer)
    clients: list[socket.socket] = []
    sleep = house.door._sleep

    def come_both() -> Any:
        """At one time, after a look at either side."""
        clients.append(come(listener))
        rests.send(b"x")
        return sleep()

    house.door._sleep = come_both  # type: ignore[method-assign]
    arrival = house.door.next()
    assert arrival is not None
    assert arrival.peer is peer  # who waited inside
    assert not house.others_are_told()
    house.door.left()
    assert house.others_are_told()
    house.door.left()
    assert not house.others_are_told()
    for each in (*clients, rests):
        each.close()
    peer.close()
    house.close()


def test_a_client_that_cannot_be_let_in_for_want_of_descriptors_is_left_to_others(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House([listener])

    def accept(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(brief, "accept", accept)
    with come(listener):
        house.send_thread()
        until(house.others_are_told)
        house.close()


@pytest.mark.parametrize("read_first", [False, True], ids=["before", "after"])
def test_a_door_that_closes_while_the_bell_is_silenced_is_left(
    monkeypatch: pytest.MonkeyPatch, read_first: bool
) -> None:
    """The main thread shuts it, and closes it just when the other one reads that it was shut."""
    lonely = House().door
    closed = threading.Event()

    def read(descriptor: int) -> int:
        if closed.is_set():
            return os.eventfd_read(descriptor)
        closed.set()
        if not read_first:
            lonely.close()
        count = os.eventfd_read(descriptor)
        if read_first:
            lonely.close()
        return count

    fake = SimpleNamespace(**{**vars(os), "eventfd_read": read})
    monkeypatch.setattr(door, "os", cast(Any, fake))
    lonely.shut()
    left = threading.Thread(target=lonely.next, daemon=True)
    left.start()
    left.join(20)
    assert closed.is_set()
    assert not left.is_alive()
