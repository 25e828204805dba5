"""Connections at rest: none is forgotten, and nobody is told again and again of one in use."""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest

from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive


class Pair:
    """A connection: the worker's end, and the client's."""

    def __init__(self) -> None:
        ours, self.remote = socket.socketpair()
        self.client = ClientSocket(ours.detach(), 0)

    def send(self) -> None:
        self.remote.send(b"x")

    def read(self) -> None:
        self.client.socket.recv(100)


@pytest.fixture
def keep_alive() -> Iterator[KeepAlive]:
    keep_alive = KeepAlive()
    yield keep_alive
    keep_alive._epoll.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    with contextlib.suppress(OSError):
        pair.client.close()
    pair.remote.close()


def is_told(keep_alive: KeepAlive) -> bool:
    """Whether the thread at the door would be woken."""
    return bool(select.select([keep_alive.descriptor], [], [], 0)[0])


def looked(keep_alive: KeepAlive) -> list[ClientSocket]:
    """Who is awake after a look."""
    keep_alive.look()
    awake = list(keep_alive.awake)
    keep_alive.awake.clear()
    return awake


def test_one_that_sends_something_wakes_each_time(keep_alive: KeepAlive, pair: Pair) -> None:
    for _ in range(3):
        keep_alive.rest(pair.client)
        assert looked(keep_alive) == []
        pair.send()
        assert is_told(keep_alive)
        assert looked(keep_alive) == [pair.client]
        pair.read()


def test_one_that_has_something_already_wakes_when_it_is_put_to_rest(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    for _ in range(2):
        pair.send()
        keep_alive.rest(pair.client)
        assert looked(keep_alive) == [pair.client]


@pytest.mark.parametrize("ends", [False, True])
def test_of_one_in_use_nobody_is_told_more_than_once(
    keep_alive: KeepAlive, pair: Pair, ends: bool
) -> None:
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]
    if ends:
        pair.remote.close()
    assert looked(keep_alive) == []
    assert not is_told(keep_alive)
    keep_alive.rest(pair.client)
    assert looked(keep_alive) == [pair.client]


def test_one_that_is_watched_is_put_to_rest_without_a_system_call(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]
    assert looked(keep_alive) == []  # it is left alone
    keep_alive.rest(pair.client)  # and watched again
    monkeypatch.setattr(syscalls, "watch", None)
    for _ in range(2):
        assert looked(keep_alive) == [pair.client]
        keep_alive.rest(pair.client)


def test_one_that_is_put_to_rest_just_when_it_is_to_be_left_alone_is_not_forgotten(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatch = syscalls.unwatch
    for comes_first in (True, False):

        def rest_meanwhile(epoll: int, descriptor: int, *, comes_first: bool = comes_first) -> None:
            if not comes_first:
                keep_alive.rest(pair.client)
            unwatch(epoll, descriptor)
            if comes_first:
                keep_alive.rest(pair.client)

        keep_alive.rest(pair.client)
        pair.send()
        assert looked(keep_alive) == [pair.client]
        monkeypatch.setattr(syscalls, "unwatch", rest_meanwhile)
        assert looked(keep_alive) == []
        monkeypatch.setattr(syscalls, "unwatch", unwatch)
        assert looked(keep_alive) == [pair.client]
        pair.read()


def test_without_memory_it_is_the_callers_still(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_epoll: int, _descriptor: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    watch = syscalls.watch
    monkeypatch.setattr(syscalls, "watch", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        keep_alive.rest(pair.client)
    assert keep_alive.wake_any() is None
    monkeypatch.setattr(syscalls, "watch", watch)
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]


def test_one_that_somebody_ends_while_it_is_put_to_rest_is_theirs(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_it_before(_epoll: int, _descriptor: int) -> None:
        assert keep_alive.wake_any() is pair.client
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(syscalls, "watch", end_it_before)
    keep_alive.rest(pair.client)
    assert keep_alive.wake_any() is None


def test_one_that_cannot_be_watched_again_is_awake(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]

    def fail(_epoll: int, _descriptor: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    unwatch = syscalls.unwatch

    def rest_meanwhile(epoll: int, descriptor: int) -> None:
        keep_alive._resting[descriptor] = pair.client
        unwatch(epoll, descriptor)

    monkeypatch.setattr(syscalls, "unwatch", rest_meanwhile)
    monkeypatch.setattr(syscalls, "watch", fail)
    assert looked(keep_alive) == [pair.client]
    with pytest.raises(OSError, match="Cannot allocate memory"):
        keep_alive.rest(pair.client)  # it is not taken to be watched


def test_of_one_that_is_forgotten_nobody_is_told_though_another_process_has_it(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]
    others = os.dup(pair.client.descriptor)
    keep_alive.forget(pair.client)
    pair.client.close()
    pair.send()
    pair.remote.close()
    assert not is_told(keep_alive)
    os.close(others)


def test_its_number_may_become_anothers(keep_alive: KeepAlive, pair: Pair) -> None:
    keep_alive.rest(pair.client)
    pair.send()
    assert looked(keep_alive) == [pair.client]
    assert looked(keep_alive) == []  # it is left alone
    number = pair.client.descriptor
    keep_alive.forget(pair.client)
    pair.client.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        other = ClientSocket(number, 0)
        keep_alive.rest(other)
        (theirs if ours.fileno() == number else ours).send(b"x")
        assert looked(keep_alive) == [other]


def test_all_can_be_woken_when_nobody_is_at_the_door(keep_alive: KeepAlive) -> None:
    pairs = [Pair() for _ in range(3)]
    for each in pairs:
        keep_alive.rest(each.client)
    pairs[0].send()
    keep_alive.look()
    woken = {id(keep_alive.wake_any()) for _ in pairs}
    assert woken == {id(each.client) for each in pairs}
    assert keep_alive.wake_any() is None
    for each in pairs:
        each.client.close()
        each.remote.close()
