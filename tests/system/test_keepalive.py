"""Connections that clients keep: no thread waits for them, and none is forgotten."""

import fcntl
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, most_at_once, one_shot, until

CLIENTS = 60  # more than are taken up in one go

Crowd = tuple[Daemon, list[Framed]]


@pytest.fixture
def clients(new_daemon: NewDaemon) -> Iterator[Crowd]:
    """A daemon with one worker of few threads, and many clients that keep their connections."""
    daemon = new_daemon(f"workers = 1\nthreads = 2\nlimits.max_connections = {CLIENTS + 5}").run()
    with ExitStack() as stack:
        clients = [stack.enter_context(Framed(daemon.path)) for _ in range(CLIENTS)]
        yield daemon, clients


def result(client: Framed) -> Any:
    """What a call has returned."""
    reply = client.receive()
    assert reply is not None
    return reply["result"]


def threads(daemon: Daemon) -> int:
    (worker,) = daemon.workers()
    return len(os.listdir(f"/proc/{worker}/task"))


def test_many_at_rest_take_no_threads_and_keep_nobody_out(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(f"workers = 1\nlimits.max_connections = {CLIENTS + 5}").run()
    with ExitStack() as stack:
        for number in range(CLIENTS):
            client = stack.enter_context(Framed(daemon.path))
            client.send("probe", "echo", {"number": number})
            assert result(client) == {"number": number}
        assert threads(daemon) <= 4
        assert one_shot(daemon.path, "test", "ping")["success"]
        statuses = daemon.call("system", "connections")["connections"]
        assert [each["status"] for each in statuses].count("idle") == CLIENTS


def test_all_that_send_at_once_are_answered(clients: Crowd) -> None:
    _, framed = clients
    for turn in range(20):
        for number, client in enumerate(framed):
            client.send("probe", "echo", {"turn": turn, "number": number})
        for number, client in enumerate(framed):
            assert result(client) == {"turn": turn, "number": number}


def test_no_more_slow_calls_run_than_a_worker_has_threads(clients: Crowd) -> None:
    _, framed = clients
    for client in framed:
        client.send("probe", "span", [0.02])
    assert most_at_once([result(client) for client in framed]) == 2


def test_idle_clients_are_closed_when_the_daemon_stops(
    clients: Crowd,
) -> None:
    daemon, framed = clients
    for client in framed:
        client.call("test", "ping")
    assert daemon.stop() == 0
    assert [client.receive() for client in framed] == [None] * CLIENTS


def test_idle_clients_are_closed_when_their_worker_is_replaced(
    clients: Crowd,
) -> None:
    daemon, framed = clients
    for client in framed:
        client.call("test", "ping")
    old = daemon.workers()
    os.kill(daemon.pid, signal.SIGHUP)
    assert [client.receive() for client in framed] == [None] * CLIENTS
    until(lambda: not set(old) & set(daemon.workers()))


def unread(client: Framed) -> int:
    """How many bytes of replies wait for the client."""
    return int.from_bytes(fcntl.ioctl(client.socket, termios.FIONREAD, bytes(4)), sys.byteorder)


def has_come(client: Framed, size: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while unread(client) < size and time.monotonic() < end:
        time.sleep(0.001)
    return unread(client) >= size


def replies_without_a_reader(daemon: Daemon, size: int) -> int:
    """How many replies of this size the system keeps for a client that reads none."""
    with Framed(daemon.path) as client:
        for number in range(1000):
            client.send("probe", "big", [size])
            if not has_come(client, (number + 1) * size, 1):
                return number
    raise AssertionError("there is no limit")


def test_clients_that_read_nothing_do_not_hold_up_a_stop(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.graceful_timeout = 20").run()
    size = 20000
    room = replies_without_a_reader(daemon, size)
    with ExitStack() as stack:
        clients = [stack.enter_context(Framed(daemon.path)) for _ in range(3)]
        for client in clients:
            for number in range(room):
                client.send("probe", "big", [size])
                assert has_come(client, (number + 1) * size, 20)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10
    assert "killed" not in daemon.log()


def test_clients_that_are_idle_for_too_long_are_closed(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.idle_timeout = 2").run()
    with ExitStack() as stack:
        idle = [stack.enter_context(Framed(daemon.path)) for _ in range(5)]
        busy = stack.enter_context(Framed(daemon.path))
        for client in idle:
            client.call("test", "ping")
        ended = 0
        while ended < len(idle):
            busy.send("test", "ping")
            assert result(busy)
            ended = sum(bool(has_something(client)) for client in idle)
        assert [client.receive() for client in idle] == [None] * len(idle)
        busy.send("test", "ping")
        assert result(busy)


def has_something(client: Framed) -> bool:
    return bool(select.select([client.socket], [], [], 0.01)[0])
