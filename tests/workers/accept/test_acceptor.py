"""The thread at the door hears of everything, and lets others know of whom it does not let in."""

import contextlib
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
from cpanbridge.supervisor.gate import Gate, Wakeups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.accept import acceptor
from cpanbridge.workers.accept.acceptor import Acceptor
from cpanbridge.workers.accept.deference import Deference
from cpanbridge.workers.accept.restraint import Restraint
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive


class House:
    """A worker's door, the bells of this worker and of another one, and clients of all kinds."""

    def __init__(self, listeners: Sequence[socket.socket] = ()) -> None:
        self.wakeups = [Wakeups.hang(), Wakeups.hang()]
        self.keep_alive = KeepAlive()
        self.may_be_held_up = False
        self.shared = Shared.create(2, Limits())
        self.shared.header.last_door = 1
        self.deference = Deference(self.shared, 0)
        self.acceptor: Acceptor[None] = Acceptor(
            listeners=listeners,
            gate=Gate(self.shared, 0, self.wakeups),
            prepare=lambda data, arrived: None,
            may_be_held_up=lambda: self.may_be_held_up,
            incoming=self.nobody(),
            outgoing=self.nobody(),
            keep_alive=self.keep_alive,
            restraint=Restraint(self.nobody()),
            deference=self.deference,
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
            target=lambda: self.arrivals.append(self.acceptor.next()), daemon=True
        )
        self.thread.start()

    def others_are_told(self) -> bool:
        """Whether the other worker's main thread was rung since the last look."""
        wakeup = self.wakeups[1].watch
        if not select.select([wakeup], [], [], 0)[0]:
            return False
        return os.eventfd_read(wakeup) > 0

    def close(self) -> None:
        self.acceptor.close()
        if self.thread is not None:
            self.thread.join(20)
            assert not self.thread.is_alive()
        take_down(self.wakeups)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        yield listener


def come(listener: socket.socket) -> socket.socket:
    """A client that has connected and waits."""
    remote = socket.socket(socket.AF_UNIX)
    remote.connect(listener.getsockname())
    return remote


def sleeps(house: House) -> bool:
    """Whether the thread at the door waits for somebody to come."""
    assert house.thread is not None
    function = Path(f"/proc/self/task/{house.thread.native_id}/wchan").read_text()
    return function in ("do_epoll_wait", "ep_poll")


def asleep(listener: socket.socket, count: int) -> list[House]:
    """So many workers with one listener, whose threads have come to the door in this order."""
    houses = [House([listener]) for _ in range(count)]
    for house in houses:
        house.send_thread()
        until(lambda house=house: sleeps(house))
    return houses


def watch_who_looks(houses: Sequence[House]) -> set[House]:
    """Who looks outside from now on. They find nobody, and are let go when their door is closed."""
    looked: set[House] = set()

    def look(house: House) -> acceptor._Nobody:
        looked.add(house)
        until(lambda: house.acceptor._closed)
        return acceptor._Nobody.OUTSIDE

    for house in houses:
        house.acceptor._accept_next = lambda house=house: look(house)  # type: ignore
    return looked


def test_of_idle_workers_one_is_woken_for_a_client_and_of_busy_ones_all(
    listener: socket.socket,
) -> None:
    houses = [House([listener]) for _ in range(6)]
    busy = set(houses[:2])
    for house in busy:
        house.may_be_held_up = True
    for house in houses:
        house.send_thread()
    until(lambda: all(map(sleeps, houses)))
    looked = watch_who_looks(houses)
    with come(listener):
        until(lambda: len(looked) >= 3)
        assert busy < looked
        assert sum(map(sleeps, houses)) == 3
    for house in houses:
        house.close()


def test_who_has_a_client_that_stays_is_woken_last(listener: socket.socket) -> None:
    houses = asleep(listener, 3)
    looked = watch_who_looks(houses)
    command: list[House] = []
    houses[0].acceptor.queue_up_again()
    with contextlib.ExitStack() as clients:
        for number in range(3):
            clients.enter_context(come(listener))
            until(lambda number=number: len(looked) > number)
            command.append(next(iter(looked - set(command))))
    for house in houses:
        house.close()
    assert command == [houses[1], houses[2], houses[0]]


def test_who_cannot_be_told_in_turn_is_told_of_everybody(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    houses = asleep(listener, 2)
    own = houses[1].acceptor

    class Full:
        """An epoll, of which no other can be had any more."""

        unregister = own._outside._told_in_turn.unregister

        @staticmethod
        def register(listener: socket.socket, events: int) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(own._outside, "_told_in_turn", Full())
    own.queue_up_again()
    own.queue_up_again()
    until(lambda: not select.select([own._wakeup], [], [], 0)[0] and sleeps(houses[1]))
    with come(listener), come(listener):
        for house in houses:
            until(lambda house=house: house.arrivals)
            os.close(house.arrivals[0].descriptor)
    for house in houses:
        house.close()


@pytest.mark.parametrize("is_shut", [False, True])
def test_a_client_of_whom_only_another_worker_was_told_is_found(
    listener: socket.socket, is_shut: bool
) -> None:
    house = House([listener])
    house.acceptor._outside._told_in_turn = (
        house.acceptor._interrupts
    )  # the other one is the one to be told
    house.send_thread()
    until(lambda: sleeps(house))
    house.acceptor.look_out()
    assert not select.select([house.acceptor._wakeup], [], [], 0)[0]  # nobody is there
    with come(listener):
        if is_shut:
            house.acceptor.shut()
            until(lambda: house.acceptor.is_shut)
        house.acceptor.look_out()
        if not is_shut:
            until(lambda: house.arrivals)
            os.close(house.arrivals[0].descriptor)
        house.close()
    assert (house.arrivals == [None]) is is_shut


def test_a_client_is_found_by_who_has_just_looked_and_does_not_sleep_yet(
    listener: socket.socket,
) -> None:
    house = House([listener])
    clients: list[socket.socket] = []
    wait = house.acceptor._outside.wait

    def come_and_be_looked_for(*, always: bool) -> Any:
        if not clients:
            house.acceptor._outside._told_in_turn = house.acceptor._interrupts
            clients.append(come(listener))
            house.acceptor.look_out()
        return wait(always=always)

    house.acceptor._outside.wait = come_and_be_looked_for  # type: ignore[method-assign]
    house.send_thread()
    until(lambda: house.arrivals)
    os.close(house.arrivals[0].descriptor)
    clients[0].close()
    house.close()


def test_who_leaves_a_client_to_another_worker_comes_back(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House([listener])
    own = house.shared.slots[0]
    away = [0.2, 0.0]
    monkeypatch.setattr(house.deference, "seconds_away", lambda: away.pop(0))
    own.looks_again = 1  # as after a client
    house.send_thread()
    until(lambda: sleeps(house))
    assert not own.looks_again
    with come(listener):
        until(lambda: house.arrivals)
        os.close(house.arrivals[0].descriptor)
    assert not away
    assert (own.looks_again, house.shared.header.last_door) == (1, 0)
    house.acceptor.left()
    assert not own.looks_again
    house.close()


def test_who_leaves_a_client_to_another_worker_hears_the_bell(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House([listener])
    away = [60.0]
    monkeypatch.setattr(house.deference, "seconds_away", lambda: away.pop(0))
    house.send_thread()
    until(lambda: sleeps(house))
    with come(listener):
        until(lambda: not away and sleeps(house))
        house.acceptor.look_again()
        until(lambda: house.arrivals)
        os.close(house.arrivals[0].descriptor)
    house.close()


def test_who_has_just_let_somebody_in_overlooks_nobody(listener: socket.socket) -> None:
    house = House([listener])
    with come(listener), come(listener):
        house.acceptor._outside.relies_on_others = True
        arrival = house.acceptor.next()
        assert arrival is not None
        os.close(arrival.descriptor)
        house.acceptor.look_out()
        assert not select.select([house.acceptor._wakeup], [], [], 0)[0]  # it will look by itself
    house.close()


def test_clients_of_all_listeners_are_let_in_by_turns(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        listeners = []
        for name in ("a", "b"):
            listeners.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            listeners[-1].bind(str(tmp_path / name))
            listeners[-1].listen()
            listeners[-1].setblocking(False)
        for _ in range(2):
            for listener in listeners:
                stack.enter_context(come(listener))
        house = House(listeners)
        names = []
        for _ in range(4):
            arrival = house.acceptor.next()
            assert arrival is not None
            with socket.socket(fileno=arrival.descriptor) as remote:
                names.append(Path(remote.getsockname()).name)
        house.close()
    assert names == ["a", "b", "a", "b"]


def test_who_is_told_of_everybody_leaves_nobody_to_another_worker(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House([listener])
    house.may_be_held_up = True
    monkeypatch.setattr(house.deference, "seconds_away", lambda: 60.0)
    house.send_thread()
    until(lambda: sleeps(house))
    with come(listener):
        until(lambda: house.arrivals)
        os.close(house.arrivals[0].descriptor)
    assert house.shared.header.last_door == 0
    house.close()


class Both:
    """A client that waits outside and one that has rested, who come while nobody is awake.

    With `stays_away` the one outside is to be left to another worker, and the other one comes then.
    """

    def __init__(self, house: House, listener: socket.socket, *, stays_away: bool = False) -> None:
        self.house = house
        ours, self.rests = socket.socketpair()
        self.client = ClientSocket(ours.detach(), 0)
        self.outside: list[socket.socket] = []
        house.keep_alive.rest(self.client)
        wait = house.acceptor._outside.wait

        def come_then_wait(*, always: bool) -> Any:
            if not self.outside:
                self.outside.append(come(listener))
                if not stays_away:
                    self.rests.send(b"x")
            return wait(always=always)

        def come_then_stay_away() -> float:
            self.rests.send(b"x")
            return 60.0

        house.acceptor._outside.wait = come_then_wait  # type: ignore[method-assign]
        if stays_away:
            house.deference.seconds_away = come_then_stay_away  # type: ignore[method-assign]

    def close(self) -> None:
        for each in (*self.outside, self.rests):
            each.close()
        self.client.close()
        self.house.close()


@pytest.mark.parametrize("stays_away", [False, True])
def test_of_two_who_come_at_once_the_one_outside_is_let_in_first(
    listener: socket.socket, stays_away: bool
) -> None:
    both = Both(House([listener]), listener, stays_away=stays_away)
    first, second = both.house.acceptor.next(), both.house.acceptor.next()
    assert first is not None
    assert second is not None
    assert first.client is None
    assert second.client is both.client
    os.close(first.descriptor)
    both.house.acceptor.left()
    assert not both.house.others_are_told()  # nobody is left outside
    both.close()


@pytest.mark.parametrize("stays_away", [False, True])
@pytest.mark.parametrize("why", ["no room", "others first"])
def test_a_client_that_waits_outside_while_all_threads_are_busy_is_left_to_others(
    listener: socket.socket, why: str, stays_away: bool
) -> None:
    house = House([listener])
    both = Both(house, listener, stays_away=stays_away)
    if why == "no room":
        house.acceptor._reserve = lambda: not both.outside  # type: ignore[method-assign]
    else:
        house.acceptor._restraint.holds_back = lambda: bool(both.outside)  # type: ignore
    arrival = house.acceptor.next()
    assert arrival is not None
    assert arrival.client is both.client  # who waited inside
    assert not house.others_are_told()
    house.acceptor.left()
    assert house.others_are_told()
    house.acceptor.left()
    assert not house.others_are_told()
    both.close()


def test_a_client_that_cannot_be_let_in_for_want_of_descriptors_is_left_to_others(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House([listener])
    tries = 0

    def accept(_: int) -> int:
        nonlocal tries
        tries += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(syscalls, "accept", accept)
    house.send_thread()
    until(lambda: tries > 1)
    assert not house.others_are_told()  # nobody is there
    with come(listener):
        until(house.others_are_told)
        before = tries
        until(lambda: tries > before + 2)
        assert not house.others_are_told()  # not all the time
        house.close()


@pytest.mark.parametrize("read_first", [False, True], ids=["before", "after"])
def test_a_door_that_closes_while_the_bell_is_silenced_is_left(
    monkeypatch: pytest.MonkeyPatch, read_first: bool
) -> None:
    """The main thread shuts it, and closes it just when the other one reads that it was shut."""
    lonely = House().acceptor
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
    monkeypatch.setattr(acceptor, "os", cast(Any, fake))
    lonely.shut()
    left = threading.Thread(target=lonely.next, daemon=True)
    left.start()
    left.join(20)
    assert closed.is_set()
    assert not left.is_alive()
