"""Which process a client is: as the kernel says, and never mistaken for a later one."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_out import no_descriptors

from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess
from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.workers.client import identity
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.identity import has_connected, has_ended

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); input()"


@pytest.fixture(params=["pidfd", "start time"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the kernel tells the process: as of Linux 6.5, or before."""
    if request.param == "start time":
        monkeypatch.setattr(identity, "SO_PEERPIDFD", 9999)
    return str(request.param)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], ClientSocket]]:
    """A process that has connected, and its client."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        program = ["python3", "-S", "-c", CONNECT, path]
        with subprocess.Popen(program, stdin=subprocess.PIPE) as process:
            near, _ = listener.accept()
            with near:
                yield process, ClientSocket(near.fileno(), 0, time.monotonic_ns(), _socket=near)
            process.kill()


def test_a_process_keeps_its_start_time_and_has_none_once_it_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        start = start_time(process.pid)
        assert start is not None
        assert start >= (start_time(os.getpid()) or 0)
        assert start_time(process.pid) == start
        process.kill()
    assert start_time(process.pid) is None


def test_the_process_that_connected_is_known_as_long_as_it_lives(
    remote: tuple[subprocess.Popen[bytes], ClientSocket], way: str
) -> None:
    process, client = remote
    start = start_time(client.credentials().pid)
    assert start is not None
    assert has_connected(client, start)
    process.kill()
    process.wait()
    if way == "pidfd":
        assert not has_connected(client, start)
    # By its start time alone a process that has the number now is another one.
    long_after = start + 100 * 3600
    assert not has_connected(client, long_after)


def test_without_a_descriptor_left_nobody_is_taken_for_ended(
    remote: tuple[subprocess.Popen[bytes], ClientSocket],
) -> None:
    me = ClientProcess(os.getpid(), start_time(os.getpid()) or 0)
    _, client = remote
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            start_time(me.pid)
        with pytest.raises(OSError, match="Too many open files"):
            has_connected(client, me.start)
        assert not has_ended(me)
    assert not has_ended(me)
    assert has_ended(me._replace(start=me.start + 1))
    assert has_ended(ClientProcess(BY_CONNECTION, 1))
