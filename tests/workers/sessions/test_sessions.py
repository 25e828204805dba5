"""A session begins as a whole or not at all, and nobody is mistaken for want of a descriptor."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
from running_out import no_descriptors, no_threads

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import ClientProcess
from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.sessions.affinity import Affinity
from cpanbridge.workers.sessions.ownership import Ownership
from cpanbridge.workers.sessions.sessions import Sessions


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared.create(2, Limits())
    yield shared
    os.close(shared.fd)


@pytest.fixture
def sessions(shared: Shared) -> Iterator[Sessions]:
    sessions = Sessions(shared.slots[0], 60.0, lambda process: None)
    yield sessions
    for session in list(sessions._sessions.values()):
        sessions.end(session)


@pytest.fixture
def client() -> Iterator[ClientSocket]:
    near, far = socket.socketpair()
    with near, far:
        yield ClientSocket(near.fileno(), 0, _socket=near)


def me() -> ClientProcess:
    start = start_time(os.getpid())
    assert start is not None
    return ClientProcess(os.getpid(), start, os.getuid())


@pytest.mark.parametrize("lacking", ["watches", "threads", "descriptors"])
def test_a_session_whose_end_would_not_be_seen_does_not_begin(
    sessions: Sessions, client: ClientSocket, lacking: str
) -> None:
    process, ends = me(), sessions._ends
    before = set(os.listdir("/proc/self/fd"))
    if lacking == "threads":
        with no_threads(), pytest.raises(OSError, match="can't start new thread"):
            sessions.enter(process, client.descriptor)
    elif lacking == "descriptors":
        with no_descriptors(1), pytest.raises(OSError, match="Too many open files"):
            sessions.enter(process, client.descriptor)
    else:
        sessions._watch = threading.current_thread()
        sessions._ends = Mock(wraps=ends)
        sessions._ends.register.side_effect = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            sessions.enter(process, client.descriptor)
        sessions._ends = ends
    assert sessions.live == 0
    assert sessions.of_process(process.pid, process.uid) is None
    assert set(os.listdir("/proc/self/fd")) <= before
    assert sessions.enter(process, client.descriptor).process == process
    assert sessions.live == 1


def test_without_a_descriptor_left_a_client_is_refused_and_nobody_elses(
    shared: Shared, sessions: Sessions, client: ClientSocket
) -> None:
    ownership = Ownership(shared, 0)
    affinity = Affinity(ownership, sessions, Mock(), 60.0)
    shared.sessions.insert(me(), 1, shared.owner(1).number)
    shared.clear(shared.slots[1])  # the worker with its state has ended, which it is to be told
    with no_descriptors():
        with pytest.raises(Refusal, match="cannot be watched: Too many open files") as refusal:
            affinity._recognise(Mock(), client)
        assert refusal.value.kind == "Overloaded"
        assert not ownership.sweep()
    assert affinity._recognise(Mock(), client) == me()
    assert ownership.find(me(), 1, may_move=False).lost
