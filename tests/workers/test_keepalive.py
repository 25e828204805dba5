"""No connection rests for ever that has sent something, whenever that came."""

import queue
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from cpanbridge.workers.keepalive import KeepAlive
from cpanbridge.workers.peer import Peer

CLIENTS = 8
TURNS = 2000


class Pair:
    """A client's end of a connection, and the worker's."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair()
        self.peer = Peer(near, 0)

    def close(self) -> None:
        self.far.close()
        self.peer.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def awake(keep_alive: KeepAlive) -> list[Peer]:
    """Those that the thread at the door finds awake now."""
    if select.select([keep_alive.descriptor], [], [], 0)[0]:
        keep_alive.look()
    found = list(keep_alive.awake)
    keep_alive.awake.clear()
    return found


def test_one_that_sends_something_wakes_once(pair: Pair) -> None:
    keep_alive = KeepAlive()
    for _ in range(3):
        keep_alive.rest(pair.peer, drained=True)
        assert awake(keep_alive) == []
        pair.far.send(b"x")
        assert awake(keep_alive) == [pair.peer]
        assert pair.peer.socket.recv(10) == b"x"
        assert awake(keep_alive) == []


def test_what_comes_while_it_is_served_is_told_when_it_rests(pair: Pair) -> None:
    keep_alive = KeepAlive()
    keep_alive.rest(pair.peer, drained=True)
    pair.far.send(b"x")
    assert awake(keep_alive) == [pair.peer]
    assert pair.peer.socket.recv(10) == b"x"
    pair.far.send(b"y")
    assert awake(keep_alive) == []  # somebody is serving it
    keep_alive.rest(pair.peer, drained=True)
    assert awake(keep_alive) == [pair.peer]


@pytest.mark.parametrize("looked", [True, False])
def test_what_was_left_unread_is_told_when_it_rests(pair: Pair, looked: bool) -> None:
    keep_alive = KeepAlive()
    keep_alive.rest(pair.peer, drained=True)
    pair.far.send(b"xy")
    assert awake(keep_alive) == [pair.peer]
    assert pair.peer.socket.recv(1) == b"x"
    if looked:
        assert awake(keep_alive) == []
    keep_alive.rest(pair.peer, drained=False)
    assert awake(keep_alive) == [pair.peer]


def test_what_is_there_before_its_first_rest_is_told(pair: Pair) -> None:
    keep_alive = KeepAlive()
    pair.far.send(b"x")
    keep_alive.rest(pair.peer, drained=True)
    assert awake(keep_alive) == [pair.peer]


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_its_end_is_told_while_it_is_served_or_not(how: int) -> None:
    for served in (True, False):
        pair = Pair()
        keep_alive = KeepAlive()
        if served:
            keep_alive.rest(pair.peer, drained=True)
            pair.far.send(b"x")
            assert awake(keep_alive) == [pair.peer]
            assert pair.peer.socket.recv(10) == b"x"
        else:
            keep_alive.rest(pair.peer, drained=True)
        pair.far.shutdown(how)
        if served:
            assert awake(keep_alive) == []
            keep_alive.rest(pair.peer, drained=True)
        assert awake(keep_alive) == [pair.peer]
        assert pair.peer.socket.recv(10) == b""
        pair.close()


def test_dismissing_one_wakes_it(pair: Pair) -> None:
    keep_alive = KeepAlive()
    keep_alive.rest(pair.peer, drained=True)
    pair.peer.dismiss()
    assert awake(keep_alive) == [pair.peer]


def test_no_client_is_forgotten_by_threads_that_serve_while_another_one_looks() -> None:
    """Each client sends the next message while its last one is being served."""
    keep_alive = KeepAlive()
    pairs = [Pair() for _ in range(CLIENTS)]
    calls: queue.SimpleQueue[Peer | None] = queue.SimpleQueue()
    over = threading.Event()

    def door() -> None:
        poll = select.poll()
        poll.register(keep_alive.descriptor, select.POLLIN)
        while not over.is_set():
            if poll.poll(50):
                keep_alive.look()
            while keep_alive.awake:
                calls.put(keep_alive.awake.popleft())

    def serve() -> None:
        while (peer := calls.get()) is not None:
            try:
                data = peer.socket.recv(100, socket.MSG_DONTWAIT)
            except BlockingIOError:
                data = b""
            peer.socket.send(data) if data else None
            keep_alive.rest(peer, drained=True)

    threads = [threading.Thread(target=door, daemon=True)]
    threads += [threading.Thread(target=serve, daemon=True) for _ in range(3)]
    for pair in pairs:
        keep_alive.rest(pair.peer, drained=True)
    for thread in threads:
        thread.start()
    for pair in pairs:
        pair.far.settimeout(30)
        pair.far.send(b"a")
    for _ in range(TURNS):
        for pair in pairs:
            pair.far.send(b"b")  # there are always one or two under way
            assert pair.far.recv(1)
    over.set()
    threads[0].join()
    for _ in threads[1:]:
        calls.put(None)
    for thread in threads[1:]:
        thread.join()
    for pair in pairs:
        pair.close()
