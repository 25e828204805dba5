"""Idle connections: none is forgotten, and one that a thread serves is not reported repeatedly."""

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
    """A connection: the worker's end and the client's."""

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


def is_readable(keep_alive: KeepAlive) -> bool:
    """Whether the leader would wake."""
    return bool(select.select([keep_alive.descriptor], [], [], 0)[0])


def polled(keep_alive: KeepAlive) -> list[ClientSocket]:
    """The connections that one poll finds ready."""
    keep_alive.poll()
    awake = list(keep_alive.ready)
    keep_alive.ready.clear()
    return awake


def test_one_that_sends_something_is_ready_each_time(keep_alive: KeepAlive, pair: Pair) -> None:
    for _ in range(3):
        keep_alive.add(pair.client)
        assert polled(keep_alive) == []
        pair.send()
        assert is_readable(keep_alive)
        assert polled(keep_alive) == [pair.client]
        pair.read()


def test_one_that_has_sent_something_already_is_ready_once_it_is_idle(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    for _ in range(2):
        pair.send()
        keep_alive.add(pair.client)
        assert polled(keep_alive) == [pair.client]


@pytest.mark.parametrize("ends", [False, True])
def test_one_that_a_thread_serves_is_reported_once_only(
    keep_alive: KeepAlive, pair: Pair, ends: bool
) -> None:
    keep_alive.add(pair.client)
    pair.send()
    assert polled(keep_alive) == [pair.client]
    if ends:
        pair.remote.close()
    assert polled(keep_alive) == []
    assert not is_readable(keep_alive)
    keep_alive.add(pair.client)
    assert polled(keep_alive) == [pair.client]


def test_without_memory_the_caller_still_owns_it(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_epoll: int, _descriptor: int, *, again: bool) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    watch = syscalls.watch_once
    monkeypatch.setattr(syscalls, "watch_once", fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        keep_alive.add(pair.client)
    assert keep_alive.pop_any() is None
    monkeypatch.setattr(syscalls, "watch_once", watch)
    keep_alive.add(pair.client)
    pair.send()
    assert polled(keep_alive) == [pair.client]


def test_one_that_another_thread_takes_while_it_becomes_idle_is_owned_by_that(
    keep_alive: KeepAlive, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_before(_epoll: int, _descriptor: int, *, again: bool) -> None:
        assert keep_alive.pop_any() is pair.client
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(syscalls, "watch_once", taken_before)
    keep_alive.add(pair.client)
    assert keep_alive.pop_any() is None


def test_one_that_is_forgotten_is_not_reported_though_another_process_has_it(
    keep_alive: KeepAlive, pair: Pair
) -> None:
    keep_alive.add(pair.client)
    pair.send()
    assert polled(keep_alive) == [pair.client]
    others = os.dup(pair.client.descriptor)
    keep_alive.forget(pair.client)
    pair.client.close()
    pair.send()
    pair.remote.close()
    assert not is_readable(keep_alive)
    os.close(others)


def test_its_descriptor_may_be_reused(keep_alive: KeepAlive, pair: Pair) -> None:
    keep_alive.add(pair.client)
    pair.send()
    assert polled(keep_alive) == [pair.client]
    assert polled(keep_alive) == []
    number = pair.client.descriptor
    keep_alive.forget(pair.client)
    pair.client.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert number in (ours.fileno(), theirs.fileno())
        other = ClientSocket(number, 0)
        keep_alive.add(other)
        (theirs if ours.fileno() == number else ours).send(b"x")
        assert polled(keep_alive) == [other]


def test_all_can_be_taken_out_when_there_is_no_leader(keep_alive: KeepAlive) -> None:
    pairs = [Pair() for _ in range(3)]
    for each in pairs:
        keep_alive.add(each.client)
    pairs[0].send()
    keep_alive.poll()
    taken = {id(keep_alive.pop_any()) for _ in pairs}
    assert taken == {id(each.client) for each in pairs}
    assert keep_alive.pop_any() is None
    for each in pairs:
        each.client.close()
        each.remote.close()
