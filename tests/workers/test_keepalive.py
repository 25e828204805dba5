"""Connections at rest: none is forgotten, and nobody is told again and again of one in use."""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest

from cpanbridge.workers import brief
from cpanbridge.workers.keepalive import KeepAlive
from cpanbridge.workers.peer import Peer


class Pair:
    """A connection: the worker's end, and the client's."""

    def __init__(self) -> None:
        ours, self.client = socket.socketpair()
        self.peer = Peer(ours.detach(), 0)

    def send(self) -> None:
        self.client.send(b"x")

    def read(self) -> None:
        self.peer.socket.recv(100)


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
        pair.peer.close()
    pair.client.close()


def is_told(keep_alive: KeepAlive) -> bool:
    """Whether the thread at the door would be woken."""
    return bool(select.select([keep_alive.descriptor], [], [], 0)[0])


def looked(keep_alive: KeepAlive) -> list[Peer]:
    """Who is awake after a look."""
    keep_alive.look()
    awake = list(keep_alive.awake)
    keep_alive.awake.clear()
    return awake


def test_one_that_sends_something_wakes_each_time(keep_alive: KeepAlive, pair: Pair) -> None:
    for _ in range(3):
        keep_alive.rest(pair.peer)
        assert looked(keep_alive) == []
        pair.send()
        assert is_told(keep_alive)
        assert looked(keep_alive) == [pair.peer]
        pair.read()


def test_one_that_has_something_already_wakes_when_it_is_put_to_rest(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    for _ in range(2):
        pair.send()
        keep_alive.rest(pair.peer)
        assert looked(keep_alive) == [pair.peer]


@pytest.mark.parametrize("ends", [False, True])
def test_of_one_in_use_nobody_is_told_more_than_once(
    keep_alive: KeepAlive, pair: Pair, ends: bool
) -> None:
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]
    if ends:
        pair.client.close()
    assert looked(keep_alive) == []
    assert not is_told(keep_alive)
    keep_alive.rest(pair.peer)
    assert looked(keep_alive) == [pair.peer]


def test_one_that_is_watched_is_put_to_rest_without_a_system_call(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]
    assert looked(keep_alive) == []  # it is left alone
    keep_alive.rest(pair.peer)  # and watched again
    monkeypatch.setattr(brief, "watch", None)
    for _ in range(2):
        assert looked(keep_alive) == [pair.peer]
        keep_alive.rest(pair.peer)


def test_one_that_is_put_to_rest_just_when_it_is_to_be_left_alone_is_not_forgotten(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatch = brief.unwatch
    for comes_first in (True, False):

        def rest_meanwhile(epoll: int, descriptor: int, *, comes_first: bool = comes_first) -> None:
            if not comes_first:
                keep_alive.rest(pair.peer)
            unwatch(epoll, descriptor)
            if comes_first:
                keep_alive.rest(pair.peer)

        keep_alive.rest(pair.peer)
        pair.send()
        assert looked(keep_alive) == [pair.peer]
        monkeypatch.setattr(brief, "unwatch", rest_meanwhile)
        assert looked(keep_alive) == []
        monkeypatch.setattr(brief, "unwatch", unwatch)
        assert looked(keep_alive) == [pair.peer]
        pair.read()


def test_without_memory_it_is_the_callers_still(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_epoll: int, _descriptor: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    watch = brief.watch
    monkeypatch.setattr(brief, "watch", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        keep_alive.rest(pair.peer)
    assert keep_alive.wake_any() is None
    monkeypatch.setattr(brief, "watch", watch)
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]


def test_one_that_somebody_ends_while_it_is_put_to_rest_is_theirs(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_it_before(_epoll: int, _descriptor: int) -> None:
        assert keep_alive.wake_any() is pair.peer
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(brief, "watch", end_it_before)
    keep_alive.rest(pair.peer)
    assert keep_alive.wake_any() is None


def test_one_that_cannot_be_watched_again_is_awake(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]

    def fail(_epoll: int, _descriptor: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    unwatch = brief.unwatch

    def rest_meanwhile(epoll: int, descriptor: int) -> None:
        keep_alive._resting[descriptor] = pair.peer
        unwatch(epoll, descriptor)

    monkeypatch.setattr(brief, "unwatch", rest_meanwhile)
    monkeypatch.setattr(brief, "watch", fail)
    assert looked(keep_alive) == [pair.peer]
    with pytest.raises(OSError, match="Cannot allocate memory"):
        keep_alive.rest(pair.peer)  # it is not taken to be watched


def test_of_one_that_is_forgotten_nobody_is_told_though_another_process_has_it(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]
    others = os.dup(pair.peer.descriptor)
    keep_alive.forget(pair.peer)
    pair.peer.close()
    pair.send()
    pair.client.close()
    assert not is_told(keep_alive)
    os.close(others)


def test_its_number_may_become_anothers(keep_alive: KeepAlive, pair: Pair) -> None:
    keep_alive.rest(pair.peer)
    pair.send()
    assert looked(keep_alive) == [pair.peer]
    assert looked(keep_alive) == []  # it is left alone
    number = pair.peer.descriptor
    keep_alive.forget(pair.peer)
    pair.peer.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        other = Peer(number, 0)
        keep_alive.rest(other)
        (theirs if ours.fileno() == number else ours).send(b"x")
        assert looked(keep_alive) == [other]


def test_all_can_be_woken_when_nobody_is_at_the_door(keep_alive: KeepAlive) -> None:
    pairs = [Pair() for _ in range(3)]
    for each in pairs:
        keep_alive.rest(each.peer)
    pairs[0].send()
    keep_alive.look()
    woken = {id(keep_alive.wake_any()) for _ in pairs}
    assert woken == {id(each.peer) for each in pairs}
    assert keep_alive.wake_any() is None
    for each in pairs:
        each.peer.close()
        each.client.close()
