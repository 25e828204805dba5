"""The two ways to talk, byte by byte: what a client may send and what it gets back."""

import fcntl
import json
import random
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, read_to_end, request, send_one_shot, until

SNOWMAN = {"text": "snowman \u2603 and \U0001f600", "\u00e4": [1, 2.5, None, True]}


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


def as_bytes(params: Any = None, function: str = "echo", **fields: Any) -> bytes:
    return json.dumps(request("probe", function, params, **fields), ensure_ascii=False).encode()


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def in_pieces(data: bytes, rng: random.Random, most: int) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = rng.randint(1, most)
        yield data[at : at + size]
        at += size


def let_the_daemon_read(client: socket.socket) -> None:
    """Wait until the daemon has taken all that was sent: pieces then really arrive as pieces."""
    end = time.monotonic() + 20
    while fcntl.ioctl(client, termios.TIOCOUTQ, b"\0" * 4) != b"\0" * 4:
        assert time.monotonic() < end
        time.sleep(0.0002)


# -- one-shot --


@pytest.mark.parametrize("shut_down", [True, False])
def test_one_shot_is_answered_whether_or_not_the_client_ends_its_side(
    daemon: Daemon, shut_down: bool
) -> None:
    reply = one_shot(daemon.path, "probe", "echo", SNOWMAN, shut_down=shut_down)
    assert reply["result"] == SNOWMAN


def test_one_shot_cut_into_single_bytes(daemon: Daemon) -> None:
    data = as_bytes({"brace": 'a } " \\ \u2603'})
    with connect(daemon.path) as client:
        for n in range(len(data)):
            client.sendall(data[n : n + 1])
            if n % 10 == 0:
                let_the_daemon_read(client)
        assert json.loads(read_to_end(client))["result"] == {"brace": 'a } " \\ \u2603'}


@pytest.mark.parametrize("seed", range(8))
def test_one_shot_cut_anywhere(daemon: Daemon, seed: int) -> None:
    params = {"text": '{"}\\"' * 40, "nested": [{"a": {"b": "}"}}] * 10, **SNOWMAN}
    with connect(daemon.path) as client:
        for piece in in_pieces(as_bytes(params), random.Random(seed), 200):
            client.sendall(piece)
            let_the_daemon_read(client)
        assert json.loads(read_to_end(client))["result"] == params


@pytest.mark.parametrize("before", [b" ", b"\n", b"\t\r\n  ", b" " * 70_000])
def test_one_shot_after_white_space(daemon: Daemon, before: bytes) -> None:
    reply = json.loads(send_one_shot(daemon.path, before + as_bytes({"a": 1})))
    assert reply["result"] == {"a": 1}


def test_white_space_may_come_long_before_the_object(daemon: Daemon) -> None:
    with connect(daemon.path) as client:
        client.sendall(b"\n")
        let_the_daemon_read(client)
        client.sendall(as_bytes({"a": 1}))
        assert json.loads(read_to_end(client))["result"] == {"a": 1}


@pytest.mark.parametrize("after", [b"\n", b"\r\n", b"  \n\n"])
@pytest.mark.parametrize("shut_down", [True, False])
def test_one_shot_with_a_trailing_newline(daemon: Daemon, after: bytes, shut_down: bool) -> None:
    data = as_bytes({"a": 1}) + after
    reply = json.loads(send_one_shot(daemon.path, data, shut_down=shut_down))
    assert reply["result"] == {"a": 1}


def test_a_newline_that_comes_while_the_call_runs_costs_no_reply(daemon: Daemon) -> None:
    with connect(daemon.path) as client:
        client.sendall(as_bytes([0.3], "nap"))
        until(lambda: daemon.metrics()["gate"]["running"] == 2)
        client.sendall(b"\n")
        # To the end, which must be an end of file and not a reset.
        assert json.loads(read_to_end(client))["success"]


def test_the_daemon_closes_after_a_one_shot_reply_without_a_newline(daemon: Daemon) -> None:
    reply = send_one_shot(daemon.path, as_bytes())
    assert reply.startswith(b"{")
    assert reply.endswith(b"}")


@pytest.mark.parametrize("cut", [None, 100_000])
def test_a_request_of_9_mb_one_shot(daemon: Daemon, cut: int | None) -> None:
    params = {"text": ("{x" * 40 + "\u2603") * 110_000}
    data = as_bytes(params)
    assert len(data) > 9_000_000
    with connect(daemon.path, 60) as client:
        for at in range(0, len(data), cut or len(data)):
            client.sendall(data[at : at + (cut or len(data))])
        reply = read_to_end(client)
    assert reply.isascii()
    assert json.loads(reply)["result"] == params


def test_a_request_of_9_mb_framed(daemon: Daemon) -> None:
    params = {"text": ("{x" * 40 + "\u2603") * 110_000}
    with Framed(daemon.path, 60) as client:
        # Sent from a thread, so that neither side waits for the other to read.
        sender = threading.Thread(target=client.send, args=("probe", "echo", params))
        sender.start()
        reply = client.receive()
        sender.join()
    assert reply is not None
    assert reply["result"] == params


def test_one_shot_replies_are_ascii_and_framed_ones_utf_8(daemon: Daemon) -> None:
    data = as_bytes(SNOWMAN)
    reply = send_one_shot(daemon.path, data)
    assert reply.isascii()
    assert json.loads(reply)["result"] == SNOWMAN
    with connect(daemon.path) as client:
        client.sendall(frame(data))
        client.shutdown(socket.SHUT_WR)
        framed = read_to_end(client)
    assert "snowman \u2603 and \U0001f600".encode() in framed
    (length,) = struct.unpack(">I", framed[:4])
    assert len(framed) == 4 + length
    assert json.loads(framed[4:])["result"] == SNOWMAN


@pytest.mark.parametrize("function", ["echo", "fail", "nap"])
def test_what_is_there_before_the_accept_is_answered_the_same(
    daemon: Daemon, function: str
) -> None:
    params = {"echo": SNOWMAN, "fail": ["snowman \u2603"], "nap": [0.05]}[function]
    data = as_bytes(params, function, request_id="r")
    with daemon.held():
        clients = [connect(daemon.path) for _ in range(6)]
        for number, client in enumerate(clients):
            client.sendall(data if number % 2 else frame(data))
            if number % 3:
                client.shutdown(socket.SHUT_WR)
    for number, client in enumerate(clients):
        with client:
            if number % 2:
                reply = read_to_end(client)
                assert reply.isascii()
            else:
                client.shutdown(socket.SHUT_WR)
                reply = read_to_end(client)[4:]
        decoded = json.loads(reply)
        assert decoded["request_id"] == "r"
        if function == "echo":
            assert decoded["result"] == SNOWMAN
        assert decoded["success"] is (function != "fail")


def test_failures_are_ascii_in_one_shot_too(daemon: Daemon) -> None:
    for data in (as_bytes(["\u2603 \U0001f600"], "fail"), b'{"\xe2\x98\x83": 1}'):
        reply = send_one_shot(daemon.path, data)
        assert reply.isascii()
        assert "\u2603" in json.loads(reply)["error"]


# -- framed --


def test_fifty_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    frames = [frame(as_bytes({"n": n}, request_id=f"id {n}")) for n in range(50)]
    with Framed(daemon.path) as client:
        client.socket.sendall(b"".join(frames))
        for n in range(50):
            reply = client.receive()
            assert reply is not None
            assert (reply["request_id"], reply["result"]) == (f"id {n}", {"n": n})


@pytest.mark.parametrize(("seed", "most"), [(1, 1), (2, 5), (3, 50), (4, 500), (5, 5000)])
def test_pipelined_requests_cut_anywhere_are_answered_in_order(
    daemon: Daemon, seed: int, most: int
) -> None:
    count = 50 if most > 5 else 5
    sizes = random.Random(seed).choices((0, 10, 1000), k=count)
    data = b"".join(
        frame(as_bytes({"x": "\u2603" * size}, request_id=str(n))) for n, size in enumerate(sizes)
    )
    with Framed(daemon.path) as client:
        for number, piece in enumerate(in_pieces(data, random.Random(seed), most)):
            client.socket.sendall(piece)
            if number % 20 == 0:
                let_the_daemon_read(client.socket)
        for n, size in enumerate(sizes):
            reply = client.receive()
            assert reply is not None
            assert (reply["request_id"], reply["result"]) == (str(n), {"x": "\u2603" * size})


def test_a_slow_call_holds_back_those_behind_it_and_no_others(daemon: Daemon) -> None:
    with Framed(daemon.path) as first, Framed(daemon.path) as other:
        first.send("probe", "nap", [0.5], request_id="slow")
        first.send("probe", "echo", {}, request_id="quick")
        began = time.monotonic()
        reply = other.call("probe", "two", [1])
        assert reply is not None
        for name in ("slow", "quick"):
            reply = first.receive()
            assert reply is not None
            assert reply["request_id"] == name
        assert time.monotonic() - began >= 0.4


def test_several_framed_clients_at_once(daemon: Daemon) -> None:
    failures: list[object] = []

    def talk(name: str) -> None:
        try:
            with Framed(daemon.path) as client:
                for n in range(50):
                    reply = client.call("probe", "two", [name, n], request_id=f"{name}.{n}")
                    assert reply is not None
                    assert reply["result"] == [name, n]
                    assert reply["request_id"] == f"{name}.{n}"
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(f"client {n}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"nonsense", "InvalidRequest"),
        (b"", "InvalidRequest"),
        (b"{}", "InvalidRequest"),
        (b'{"module": "no", "function": "f"}', "ModuleNotAllowed"),
        (b'{"module": "probe", "function": "no"}', "FunctionNotAllowed"),
        (b'{"module": "probe", "function": "fail"}', "ValueError"),
        (b'{"module": "probe", "function": "leave"}', "SystemExit"),
        (b'{"module": "probe", "function": "two"}', "InvalidParams"),
    ],
)
def test_an_error_in_one_frame_does_not_end_the_connection(
    daemon: Daemon, body: bytes, kind: str
) -> None:
    with Framed(daemon.path) as client:
        client.send("probe", "echo", {"n": 1})
        client.send_bytes(body)
        client.send("probe", "echo", {"n": 2})
        first, error, second = (client.receive() for _ in range(3))
    assert first is not None
    assert error is not None
    assert second is not None
    assert (first["result"], second["result"]) == ({"n": 1}, {"n": 2})
    assert (error["success"], error["error_type"]) == (False, kind)


def test_an_idle_framed_client_receives_that_nothing_more_will_be_read(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("limits.idle_timeout = 0.5").run()
    with Framed(daemon.path) as client:
        for _ in range(2):
            assert client.call("probe", "echo", {})
        assert client.receive() is None  # the frame of length 0
        assert client.socket.recv(1) == b""


def test_a_framed_client_may_end_its_side_after_its_last_request(daemon: Daemon) -> None:
    with Framed(daemon.path) as client:
        for n in range(5):
            client.send("probe", "two", [n])
        client.socket.shutdown(socket.SHUT_WR)
        for n in range(5):
            reply = client.receive()
            assert reply is not None
            assert reply["result"] == [n, "default"]
        assert client.socket.recv(1) == b""


# -- the fields of replies --

SUCCESS = {"success", "result", "module", "function", "request_id", "execution_info"}
FAILURE = {"success", "error", "error_type", "request_id", "daemon_info"}
FAILURES = [
    ("probe", "fail", ["why"]),
    ("probe", "two", None),
    ("probe", "no", None),
    ("no", "no", None),
    ("probe", "results", ["cycle"]),
    ("system", "info", [1]),
]


def both_replies(daemon: Daemon, *arguments: Any, **fields: Any) -> list[dict[str, Any]]:
    with Framed(daemon.path) as client:
        framed = client.call(*arguments, **fields)
    assert framed is not None
    return [framed, one_shot(daemon.path, *arguments, **fields)]


def test_the_fields_of_a_success(daemon: Daemon) -> None:
    for reply in both_replies(daemon, "probe", "two", [1], request_id="r1"):
        assert set(reply) == SUCCESS
        assert reply["success"] is True
        assert (reply["module"], reply["function"], reply["request_id"]) == ("probe", "two", "r1")
        info = reply["execution_info"]
        assert set(info) == {
            *("daemon_version", "python_version", "timestamp", "duration_ms", "worker"),
        }
        assert abs(info["timestamp"] - time.time()) < 60
        assert 0 <= info["duration_ms"] < 60_000
        assert info["worker"] in (0, 1)


@pytest.mark.parametrize(("module", "function", "params"), FAILURES)
def test_the_fields_of_a_failure(daemon: Daemon, module: str, function: str, params: Any) -> None:
    for reply in both_replies(daemon, module, function, params, request_id="r2"):
        assert set(reply) == FAILURE
        assert reply["success"] is False
        assert reply["request_id"] == "r2"
        assert set(reply["daemon_info"]) == {"version", "python_version"}


def test_the_fields_of_a_failure_to_understand(daemon: Daemon) -> None:
    reply = json.loads(send_one_shot(daemon.path, b"{}"))
    assert set(reply) == FAILURE
    assert reply["request_id"] is None


def test_without_a_request_id_it_is_null(daemon: Daemon) -> None:
    for reply in both_replies(daemon, "probe", "two", [1]):
        assert reply["request_id"] is None


def test_the_duration_is_that_of_the_call(daemon: Daemon) -> None:
    reply = one_shot(daemon.path, "probe", "nap", [0.2])
    assert 200 <= reply["execution_info"]["duration_ms"] < 20_000


def test_with_debug_a_functions_failure_has_a_traceback(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("debug = true").run()
    for reply in both_replies(daemon, "probe", "fail", ["why"], request_id="r3"):
        assert set(reply) == FAILURE | {"traceback"}
        assert reply["traceback"].startswith("Traceback (most recent call last):")
        assert 'probe.py", line ' in reply["traceback"]
        assert reply["traceback"].endswith("ValueError: why\n")
    for reply in both_replies(daemon, "no", "no"):
        assert set(reply) == FAILURE
    for reply in both_replies(daemon, "probe", "two", [1]):
        assert set(reply) == SUCCESS
