"""System calls made without releasing the interpreter lock: they do the same as the usual ones."""

import contextlib
import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpanbridge.workers.client import syscalls

FOR_GOOD = 1000.0  # seconds; no thread would be made to release the lock


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_receives_what_there_is(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = syscalls.Receiver()
    with pytest.raises(BlockingIOError):
        receiver.receive(ours.fileno())
    theirs.send(b"one\0two")
    assert syscalls.unread(ours.fileno()) == 7
    assert receiver.receive(ours.fileno()) == b"one\0two"
    assert syscalls.unread(ours.fileno()) == 0
    theirs.close()
    assert receiver.receive(ours.fileno()) == b""


def test_receives_no_more_than_its_most_at_a_time(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    data = os.urandom(syscalls.MOST + 1000)
    assert theirs.send(data) == len(data)
    receiver = syscalls.Receiver()
    received = b""
    while len(received) < len(data):
        piece = receiver.receive(ours.fileno())
        assert len(piece) <= syscalls.MOST
        received += piece
    assert received == data


def test_sends_what_there_is_room_for(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    data = os.urandom(syscalls.MOST)
    sent = b""
    with contextlib.suppress(BlockingIOError):
        while len(sent) < 1000 * len(data):  # more than any socket's buffer
            sent += data[: syscalls.send(ours.fileno(), data)]
    assert len(sent) < 1000 * len(data)
    ours.close()
    received = b""
    while piece := theirs.recv(1 << 20):
        received += piece
    assert received == sent


def test_sending_to_a_closed_socket_is_an_error_and_no_signal(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    assert not syscalls.has_hung_up(ours.fileno())
    theirs.close()
    assert syscalls.has_hung_up(ours.fileno())
    with pytest.raises(BrokenPipeError):
        syscalls.send(ours.fileno(), b"x")


def test_ending_only_the_sending_side_is_no_hang_up(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.shutdown(socket.SHUT_WR)
    assert not syscalls.has_hung_up(ours.fileno())


def test_accepts_clients_to_be_closed_on_exec(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            syscalls.accept(listener.fileno())
        client.connect(str(tmp_path / "s"))
        descriptor = syscalls.accept(listener.fileno())
        assert not os.get_inheritable(descriptor)
        client.send(b"hello")
        assert os.read(descriptor, 10) == b"hello"
        syscalls.close(descriptor)
        assert client.recv(1) == b""


def test_no_descriptor_is_an_error_with_its_number() -> None:
    closed = os.dup(0)
    syscalls.close(closed)
    receiver = syscalls.Receiver()
    attempts = (
        lambda: receiver.receive(-1),
        lambda: syscalls.send(-1, b"x"),
        lambda: syscalls.accept(-1),
        lambda: syscalls.close(-1),
        lambda: syscalls.unread(-1),
        lambda: syscalls.watch_once(-1, 0, again=False),
        lambda: syscalls.unwatch(-1, 0),
    )
    for attempt in attempts:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            attempt()
        assert caught.value.errno == errno.EBADF


def test_a_ready_set_has_the_watched_descriptors_that_are_readable() -> None:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(5)]
        for each in pairs:
            stack.enter_context(each[0])
            stack.enter_context(each[1])
        epoll = stack.enter_context(select.epoll())
        ready = syscalls.ReadySet(epoll, most=3)
        for ours, _ in pairs:
            syscalls.watch_once(epoll.fileno(), ours.fileno(), again=False)
        assert ready.poll() == []
        for _, theirs in pairs:
            theirs.send(b"x")
        first, second = ready.poll(), ready.poll()
        assert (len(first), len(second)) == (3, 2)
        assert set(first) | set(second) == {ours.fileno() for ours, _ in pairs}
        assert ready.poll() == []
        for ours, _ in pairs:
            syscalls.watch_once(epoll.fileno(), ours.fileno(), again=True)
        for ours, _ in pairs[1:]:
            syscalls.unwatch(epoll.fileno(), ours.fileno())
        assert ready.poll() == [pairs[0][0].fileno()]
        with pytest.raises(FileExistsError):
            syscalls.watch_once(epoll.fileno(), pairs[0][0].fileno(), again=False)
        with pytest.raises(FileNotFoundError):
            syscalls.unwatch(epoll.fileno(), pairs[1][0].fileno())


def test_no_other_thread_gets_the_interpreter_meanwhile(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    begun, over = threading.Event(), False
    turns = 0

    def count() -> None:
        nonlocal turns
        begun.set()
        while not over:
            turns += 1
            time.sleep(0)  # releases the interpreter lock

    counter = threading.Thread(target=count)
    before = sys.getswitchinterval()
    receiver = syscalls.Receiver()
    sender, taker = ours.fileno(), theirs.fileno()
    counter.start()
    begun.wait()
    sys.setswitchinterval(FOR_GOOD)
    try:
        seen = turns
        while turns < seen + 2:  # from its next turn on the counter requests the lock as rarely
            time.sleep(0)
        seen = turns
        for _ in range(1000):
            syscalls.send(sender, b"x")
            receiver.receive(taker)
            syscalls.unread(taker)
            syscalls.has_hung_up(taker)
        after = turns
    finally:
        over = True
        sys.setswitchinterval(before)
    counter.join()
    assert after == seen
