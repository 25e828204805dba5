"""How many clients wait in the listen queues, asked of the kernel about real sockets."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_client import connect, until

from cpanbridge.supervisor.listening.backlog import Backlog

NewListener = Callable[[], socket.socket]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def new_listener(tmp_path: Path, stack: contextlib.ExitStack) -> NewListener:
    def make() -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(tmp_path / f"{len(list(tmp_path.iterdir()))}.sock"))
        listener.listen(100)
        return stack.enter_context(listener)

    return make


def come(listener: socket.socket, clients: int, stack: contextlib.ExitStack) -> None:
    """Let so many clients connect, who stay until the test ends."""
    for _ in range(clients):
        stack.enter_context(connect(listener.getsockname()))


def test_nobody_waits_where_nobody_came(new_listener: NewListener) -> None:
    backlog = Backlog()
    assert backlog.waiting([]) == 0
    assert backlog.waiting([new_listener()]) == 0


def test_who_has_connected_waits_until_it_is_accepted(
    new_listener: NewListener, stack: contextlib.ExitStack
) -> None:
    backlog, listener = Backlog(), new_listener()
    for there in range(1, 6):
        come(listener, 1, stack)
        assert backlog.waiting([listener]) == there
    for left in range(4, -1, -1):
        stack.enter_context(listener.accept()[0])
        assert backlog.waiting([listener]) == left


def test_who_has_sent_its_request_and_gone_still_waits(
    new_listener: NewListener, stack: contextlib.ExitStack
) -> None:
    backlog, listener = Backlog(), new_listener()
    with connect(listener.getsockname()) as client:
        client.sendall(b'{"module": "m", "function": "f"}')
    assert backlog.waiting([listener]) == 1
    stack.enter_context(listener.accept()[0])
    assert backlog.waiting([listener]) == 0


def test_several_queues_are_added_and_each_can_be_asked_by_itself(
    new_listener: NewListener, stack: contextlib.ExitStack
) -> None:
    backlog = Backlog()
    listeners = [new_listener() for _ in range(3)]
    for clients, listener in zip((3, 0, 40), listeners, strict=True):
        come(listener, clients, stack)
    assert backlog.waiting(listeners) == 43
    assert [backlog.waiting([each]) for each in listeners] == [3, 0, 40]
    stack.enter_context(listeners[2].accept()[0])
    assert backlog.waiting(listeners) == 42


def test_another_process_that_accepts_is_seen(
    new_listener: NewListener, stack: contextlib.ExitStack
) -> None:
    backlog, listener = Backlog(), new_listener()
    come(listener, 2, stack)
    pid = os.fork()
    if pid == 0:
        listener.accept()
        os._exit(0)
    os.waitpid(pid, 0)
    until(lambda: backlog.waiting([listener]) == 1)


def test_of_a_listener_that_is_closed_nothing_is_told(new_listener: NewListener) -> None:
    listener = new_listener()
    listener.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        Backlog().waiting([listener])


def test_what_the_kernel_does_not_know_is_an_error_and_not_an_empty_queue() -> None:
    with open(os.devnull) as file, pytest.raises(OSError, match=r"No such file"):
        Backlog().waiting([file])  # type: ignore[list-item]
