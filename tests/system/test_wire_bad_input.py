"""Clients that send nonsense, too much, too slowly or nothing: refused, without harm to others."""

import contextlib
import json
import os
import re
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, read_to_end, request, send_one_shot, until

MEGABYTE = 1 << 20
CALL = json.dumps(request("probe", "two", [1])).encode()


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def at_rest(daemon: Daemon) -> bool:
    """Whether the asking client is the only one, and its request the only one that runs."""
    gate = daemon.metrics()["gate"]
    counts = ("connections", "running", "waiting_doors", "waiting_requests")
    return [gate[name] for name in counts] == [1, 1, 0, 0]


def assert_unharmed(daemon: Daemon, workers: list[int]) -> None:
    """It answers as before, with the same workers, and holds no room for anybody."""
    assert json.loads(send_one_shot(daemon.path, CALL))["result"] == [1, "default"]
    with Framed(daemon.path) as client:
        reply = client.call("probe", "two", [1])
        assert reply is not None
        assert reply["result"] == [1, "default"]
    until(lambda: at_rest(daemon), 20, "everybody's leaving")
    assert sorted(daemon.workers()) == sorted(workers)


@pytest.fixture(scope="module")
def workers(shared_daemon: Daemon) -> list[int]:
    return shared_daemon.workers()


@pytest.fixture
def daemon(shared_daemon: Daemon, workers: list[int]) -> Iterator[Daemon]:
    """One daemon for all, which after each test must be as it was."""
    yield shared_daemon
    assert_unharmed(shared_daemon, workers)


def refused(data: bytes) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(data)
    assert reply["success"] is False
    assert reply["error_type"] == "InvalidRequest"
    assert reply["error"].startswith("Invalid request: ")
    return reply


def framed_replies(data: bytes) -> list[Any]:
    """The replies in a framed stream; None for the frame of length 0."""
    replies = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        replies.append(json.loads(data[4 : 4 + length]) if length else None)
        assert len(data) >= 4 + length
        data = data[4 + length :]
    return replies


# -- nonsense --

NOT_REQUESTS = {
    "words": b"hello daemon",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "array": b"[1, 2]",
    "null": b"null",
    "text": b'"text"',
    "number": b"17",
    "empty object": b"{}",
    "two objects": CALL + CALL,
    "trailing words": CALL + b" and more",
    "wrong brackets": b"{]}",
    "single quotes": b"{'module': 'probe'}",
    "no function": b'{"module": "probe"}',
    "no module": b'{"function": "echo"}',
    "unknown field": b'{"module": "probe", "function": "echo", "extra": 1}',
    "mistyped": b'{"module": 5, "function": "echo"}',
    "null name": b'{"module": "probe", "function": null}',
    "overlong name": b'{"module": "%s", "function": "echo"}' % (b"m" * 51),
    "overlong id": b'{"module": "probe", "function": "echo", "request_id": "%s"}' % (b"r" * 101),
    "negative timeout": b'{"module": "probe", "function": "echo", "timeout": -1}',
    "depth 65": b'{"module": "probe", "function": "echo", "params": '
    + b"[" * 65
    + b"]" * 65
    + b"}",
    "depth 100000": b'{"module": "probe", "function": "echo", "params": '
    + (b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "object depth 100000": b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    "invalid utf-8": b'{"module": "probe", "function": "echo", "params": {"a": "\xff\xfe"}}',
    "cut utf-8": b'{"module": "probe", "function": "echo", "params": {"a": "\xe2\x98"}}',
    "lone surrogate": b'{"module": "probe", "function": "echo", "params": {"a": "\\ud800"}}',
    "lone low surrogate": b'{"module": "probe", "function": "echo", "params": {"\\udc00": 1}}',
    "control character": b'{"module": "probe", "function": "echo", "params": {"a": "\n"}}',
    "nan": b'{"module": "probe", "function": "echo", "params": [NaN]}',
    "huge integer": b'{"module": "probe", "function": "echo", "params": {"a": %s}}' % (b"9" * 5000),
    "huge float": b'{"module": "probe", "function": "echo", "params": {"a": 1e999}}',
}


@pytest.mark.parametrize("data", NOT_REQUESTS.values(), ids=NOT_REQUESTS.keys())
def test_what_is_not_a_request_is_refused_in_both_forms(daemon: Daemon, data: bytes) -> None:
    if data[:1] in (b"{", b" "):  # a one-shot client's first byte
        refused(send_one_shot(daemon.path, data))
    with Framed(daemon.path) as client:
        client.send_bytes(data)
        client.send("probe", "two", [1])
        refused(json.dumps(client.receive()).encode())
        reply = client.receive()
        assert reply is not None
        assert reply["result"] == [1, "default"]


def test_what_is_there_before_the_accept_is_refused_the_same(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        with daemon.held():
            clients = [stack.enter_context(connect(daemon.path)) for _ in NOT_REQUESTS]
            for client, data in zip(clients, NOT_REQUESTS.values(), strict=True):
                # Not more than a socket holds while nobody reads.
                client.sendall(data[:65_536])
                client.shutdown(socket.SHUT_WR)
        for client in clients:
            refused(read_to_end(client))


@pytest.mark.parametrize("data", [b'{"module": "probe"', b"{", b" \n", b'{"a": "}'])
def test_an_object_that_ends_early_is_refused(daemon: Daemon, data: bytes) -> None:
    refused(send_one_shot(daemon.path, data, shut_down=True))


@pytest.mark.parametrize("first", [b"x", b"[", b"\xff", b"\x0b", b"\x09x", b"}", b'"', b"\x7f"])
@pytest.mark.parametrize("shut_down", [True, False])
def test_a_first_byte_that_begins_nothing_is_refused(
    daemon: Daemon, first: bytes, shut_down: bool
) -> None:
    refused(send_one_shot(daemon.path, first + b"xyz", shut_down=shut_down))


def test_an_empty_frame_is_refused_and_the_connection_goes_on(daemon: Daemon) -> None:
    with Framed(daemon.path) as client:
        client.send_bytes(b"")
        reply = client.receive()
        assert reply is not None
        refused(json.dumps(reply).encode())
        assert client.call("probe", "two", [1])


def test_of_duplicate_keys_the_last_one_counts(daemon: Daemon) -> None:
    data = b'{"module": "no", "module": "probe", "function": "echo", "params": {"a": 1, "a": 2}}'
    assert json.loads(send_one_shot(daemon.path, data))["result"] == {"a": 2}


def test_a_null_character_is_a_character(daemon: Daemon) -> None:
    data = json.dumps(request("probe", "echo", {"a\0": "\0"})).encode()
    assert json.loads(send_one_shot(daemon.path, data))["result"] == {"a\0": "\0"}


# -- too much --


@pytest.mark.parametrize("prefix", [b"\xff\xff\xff\xff", b"\x80\x00\x00\x00", b"\x09\x00\x00\x00"])
def test_an_impossible_length_in_the_first_frame_is_refused(daemon: Daemon, prefix: bytes) -> None:
    refused(send_one_shot(daemon.path, prefix + CALL))


@pytest.mark.parametrize("length", [10 * MEGABYTE + 1, 11 * MEGABYTE, 0x08FFFFFF])
def test_a_first_frame_over_the_limit_is_refused_and_closed(daemon: Daemon, length: int) -> None:
    with connect(daemon.path) as client:
        client.sendall(struct.pack(">I", length) + b"{")
        error, end = framed_replies(read_to_end(client))
    assert (
        f"{length} bytes; at most 10485760 are allowed"
        in refused(json.dumps(error).encode())["error"]
    )
    assert end is None


@pytest.mark.parametrize("length", [10 * MEGABYTE + 1, 2**31, 2**32 - 1])
def test_a_later_frame_over_the_limit_is_refused_and_closed(daemon: Daemon, length: int) -> None:
    with connect(daemon.path) as client:
        client.sendall(frame(CALL) + struct.pack(">I", length) + frame(CALL))
        reply, error, end = framed_replies(read_to_end(client))
    assert reply["result"] == [1, "default"]
    assert "limits.max_request_size" in refused(json.dumps(error).encode())["error"]
    assert end is None


def oversized(megabytes: int) -> bytes:
    return json.dumps(request("probe", "echo", {"x": "y" * (megabytes * MEGABYTE)})).encode()


def test_a_client_that_sends_11_mb_and_then_reads_gets_the_refusal(daemon: Daemon) -> None:
    reply = refused(send_one_shot(daemon.path, oversized(11)))
    assert "at most 10485760 are allowed (limits.max_request_size)" in reply["error"]


def test_a_framed_client_that_sends_11_mb_and_then_reads_gets_the_refusal(daemon: Daemon) -> None:
    with connect(daemon.path) as client:
        client.sendall(frame(oversized(11)))
        error, end = framed_replies(read_to_end(client))
    refused(json.dumps(error).encode())
    assert end is None


@pytest.mark.parametrize("white_space", [True, False])
@pytest.mark.parametrize("limit", [200_000, 500])
def test_the_limit_is_met_exactly(new_daemon: NewDaemon, limit: int, white_space: bool) -> None:
    daemon = new_daemon(f"limits.max_request_size = {limit}").run()
    small = json.dumps(request("probe", "echo", {"x": ""})).encode()
    room = limit - len(small)

    def padded(size: int) -> bytes:
        if white_space:
            return b" " * size + small
        return small.replace(b'"x": ""', b'"x": "%s"' % (b"y" * size))

    assert json.loads(send_one_shot(daemon.path, padded(room)))["success"]
    refused(send_one_shot(daemon.path, padded(room + 1)))
    with Framed(daemon.path) as client:
        client.send_bytes(padded(room))
        assert (client.receive() or {})["success"]
        client.send_bytes(padded(room + 1))
        refused(json.dumps(client.receive()).encode())
        assert client.receive() is None


def test_white_space_without_end_is_refused(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("limits.max_request_size = 200000").run()
    refused(send_one_shot(daemon.path, b" " * 300_000))


def test_a_request_that_is_costly_to_check_costs_no_memory(daemon: Daemon) -> None:
    """A long key over many values, and enough brackets to have them all looked at."""
    values: list[Any] = [[]] * 65
    params = {"k" * 30_000: values + [1] * 10_000}
    data = json.dumps(request("test", "echo", params), separators=(",", ":")).encode()
    assert len(data) < 65_536  # small enough to be checked while the gate is held

    def peak() -> int:
        return max(_peak_memory(pid) for pid in daemon.workers())

    before = peak()
    assert json.loads(send_one_shot(daemon.path, data))["result"] == params
    assert peak() - before < 50 * MEGABYTE


def _peak_memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# -- too slow --

READ_TIMEOUT = 1.0


@pytest.fixture
def syscalls(new_daemon: NewDaemon) -> Iterator[Daemon]:
    """A daemon with a short read_timeout, which after the test must be as it was."""
    daemon = new_daemon(
        "workers = 2\nlimits.max_requests_per_minute = 0\n"
        f"limits.read_timeout = {READ_TIMEOUT}\nlimits.idle_timeout = 60"
    ).run()
    workers = daemon.workers()
    yield daemon
    assert_unharmed(daemon, workers)


def test_a_client_that_says_nothing_is_closed(syscalls: Daemon) -> None:
    began = time.monotonic()
    with connect(syscalls.path) as client:
        assert read_to_end(client) == b""
    assert time.monotonic() - began >= READ_TIMEOUT - 0.1


@pytest.mark.parametrize(
    "data", [CALL, frame(CALL), b" " * 200], ids=["one-shot", "framed", "space"]
)
def test_a_client_that_sends_byte_by_byte_gets_the_error_that_it_is_too_slow(
    syscalls: Daemon, data: bytes
) -> None:
    began = time.monotonic()
    with connect(syscalls.path) as client:
        client.setblocking(False)
        received = b""
        with contextlib.suppress(BrokenPipeError):
            for n in range(len(data) - 1):
                client.send(data[n : n + 1])
                time.sleep(0.05)  # not for the test's sake: this is what the client does
                with contextlib.suppress(BlockingIOError):
                    if not (piece := client.recv(65536)):
                        break
                    received += piece
    assert time.monotonic() - began >= READ_TIMEOUT - 0.1
    replies = framed_replies(received) if data[0] == 0 else [json.loads(received)]
    assert "limits.read_timeout" in refused(json.dumps(replies[0]).encode())["error"]


def test_a_later_frame_that_is_begun_and_not_finished_gets_an_error(syscalls: Daemon) -> None:
    with connect(syscalls.path) as client:
        client.sendall(frame(CALL))
        client.sendall(frame(CALL)[:20])
        reply, error, end = framed_replies(read_to_end(client))
    assert reply["success"]
    assert "limits.read_timeout" in refused(json.dumps(error).encode())["error"]
    assert end is None


def test_a_framed_client_may_rest_between_requests_for_longer(syscalls: Daemon) -> None:
    with Framed(syscalls.path) as client:
        assert client.call("probe", "two", [1])
        client.socket.settimeout(2 * READ_TIMEOUT)
        with pytest.raises(TimeoutError):
            client.receive()
        client.socket.settimeout(30)
        assert client.call("probe", "two", [1])


def test_a_call_may_take_longer_than_reading(syscalls: Daemon) -> None:
    reply = json.loads(
        send_one_shot(syscalls.path, json.dumps(request("probe", "nap", [1.5])).encode())
    )
    assert reply["success"]


@pytest.mark.parametrize("framed", [False, True])
def test_a_reply_that_nobody_reads_holds_a_connection_for_read_timeout_only(
    syscalls: Daemon, framed: bool
) -> None:
    body = json.dumps(request("probe", "big", [20 * MEGABYTE])).encode()
    with connect(syscalls.path) as client:
        client.sendall(frame(body) if framed else body)
        # The request's place is free once the function has returned, though nobody reads.
        gate = until(
            lambda: (
                (g := syscalls.metrics()["gate"])["admitted_last_minute"] >= 2
                and g["running"] == 1
                and g
            )
        )
        assert gate["running"] == 1
        until(lambda: at_rest(syscalls), 20, "closing the connection")
        assert len(read_to_end_of_anything(client)) < 20 * MEGABYTE


def read_to_end_of_anything(client: socket.socket) -> bytes:
    """What had been sent before the connection was closed, in whatever way."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            data += piece
    return data


def test_a_reader_that_is_slow_but_reads_gets_it_all(syscalls: Daemon) -> None:
    with connect(syscalls.path) as client:
        client.sendall(json.dumps(request("probe", "big", [3 * MEGABYTE])).encode())
        data = b""
        while piece := client.recv(MEGABYTE // 4):
            data += piece
            time.sleep(0.1)  # what a slow reader does: longer than read_timeout in all
    assert json.loads(data)["result"] == "x" * (3 * MEGABYTE)


# -- leaving --


def leave_in_the_middle(client: socket.socket) -> None:
    client.sendall(CALL[:20])


def leave_in_a_frame(client: socket.socket) -> None:
    client.sendall(frame(CALL)[:20])


def leave_in_a_length(client: socket.socket) -> None:
    client.sendall(b"\0\0")


def leave_before_the_reply(client: socket.socket) -> None:
    client.sendall(json.dumps(request("probe", "nap", [0.2])).encode())


def leave_before_the_framed_replies(client: socket.socket) -> None:
    nap = frame(json.dumps(request("probe", "nap", [0.02])).encode())
    client.sendall(nap * 5)


def leave_while_the_reply_is_sent(client: socket.socket) -> None:
    client.sendall(json.dumps(request("probe", "big", [5 * MEGABYTE])).encode())
    client.recv(1)


def leave_at_once(_: socket.socket) -> None:
    pass


def reset(client: socket.socket) -> None:
    client.sendall(CALL[:10])
    client.shutdown(socket.SHUT_RDWR)


LEAVERS: list[Callable[[socket.socket], None]] = [
    *(leave_in_the_middle, leave_in_a_frame, leave_in_a_length, leave_before_the_reply),
    *(leave_before_the_framed_replies, leave_while_the_reply_is_sent, leave_at_once, reset),
]


@pytest.mark.parametrize("leave", LEAVERS, ids=lambda leave: leave.__name__)
def test_clients_that_leave_cost_nothing(
    daemon: Daemon, leave: Callable[[socket.socket], None]
) -> None:
    for _ in range(20):
        with connect(daemon.path) as client:
            leave(client)


def test_the_log_has_no_traceback_of_them(daemon: Daemon) -> None:
    for leave in LEAVERS:
        with connect(daemon.path) as client:
            leave(client)
    until(lambda: at_rest(daemon))
    assert "Traceback" not in daemon.log()


# -- too many --


@pytest.fixture
def _many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_descriptors")
@pytest.mark.parametrize("silent", [0, 60])
def test_a_thousand_connections_at_once_are_all_served(new_daemon: NewDaemon, silent: int) -> None:
    """They wait in the backlog, 100 are accepted at a time; silent ones stay for a while."""
    daemon = new_daemon(
        "workers = 2\nlimits.max_requests_per_minute = 0\nlimits.max_connections = 100\n"
        "limits.read_timeout = 2.0"
    ).run()
    workers = daemon.workers()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(silent):
            stack.enter_context(connect(daemon.path))
        clients = [stack.enter_context(connect(daemon.path)) for _ in range(1000)]
        for number, client in enumerate(clients):
            client.sendall(json.dumps(request("probe", "two", [number])).encode())
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ, [number, b""])
        answered = set()
        end = time.monotonic() + 60
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                if piece := key.fileobj.recv(65536):
                    key.data[1] += piece
                    continue
                selector.unregister(key.fileobj)
                assert json.loads(key.data[1])["result"] == [key.data[0], "default"]
                answered.add(key.data[0])
        assert answered == set(range(1000))
    assert_unharmed(daemon, workers)
    assert daemon.metrics()["connection_summary"]["peak_connections"] <= 100


def test_many_bad_clients_at_once_do_not_keep_a_good_one_waiting(syscalls: Daemon) -> None:
    data = [b"nonsense", CALL[:20], b"", frame(CALL)[:9], struct.pack(">I", 2**27), b"{}"]
    stop = threading.Event()

    def annoy(number: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), connect(syscalls.path) as client:
                client.sendall(data[number % len(data)])
                stop.wait(0.02)

    threads = [threading.Thread(target=annoy, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert json.loads(send_one_shot(syscalls.path, CALL))["success"]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def test_descriptors_do_not_leak(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_requests_per_minute = 0").run()
    (pid,) = daemon.workers()

    def misbehave() -> None:
        for leave in LEAVERS:
            with connect(daemon.path) as client:
                leave(client)
        for data in (b"nonsense", b"{}", frame(b""), struct.pack(">I", 2**27)):
            with connect(daemon.path) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                read_to_end(client)
        until(lambda: at_rest(daemon))

    misbehave()
    before = psutil.Process(pid).num_fds()
    for _ in range(5):
        misbehave()
    until(lambda: psutil.Process(pid).num_fds() <= before + 1)
    assert os.path.exists(daemon.path)


def test_descriptors_that_a_client_passes_along_are_refused(daemon: Daemon) -> None:
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 16):
        pytest.skip("this kernel cannot refuse them")
    with connect(daemon.path) as client, pytest.raises(PermissionError):
        socket.send_fds(client, [b"{"], [client.fileno()])
    assert daemon.call("test", "ping")["message"] == "pong"
