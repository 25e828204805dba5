"""Clients of plain sockets and the standard library's json; they share no code with the daemon."""

import json
import socket
import struct
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def connect(path: str, timeout: float = 30.0) -> socket.socket:
    """A connected socket; every operation on it ends within `timeout` seconds."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout)
    client.connect(path)
    return client


def request(module: str, function: str, params: Any = None, **fields: Any) -> dict[str, Any]:
    """A request as an object."""
    return {"module": module, "function": function, "params": params, **fields}


def read_to_end(client: socket.socket) -> bytes:
    """All bytes until the daemon closes."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def send_one_shot(
    path: str, data: bytes, *, shut_down: bool = False, timeout: float = 30.0
) -> bytes:
    """Send bytes on a connection of their own and return the reply's bytes."""
    with connect(path, timeout) as client:
        client.sendall(data)
        if shut_down:
            client.shutdown(socket.SHUT_WR)
        return read_to_end(client)


def one_shot(
    path: str,
    module: str,
    function: str,
    params: Any = None,
    *,
    shut_down: bool = False,
    timeout: float = 30.0,
    **fields: Any,
) -> dict[str, Any]:
    """One call on a connection of its own; the whole reply."""
    data = json.dumps(request(module, function, params, **fields)).encode()
    reply = send_one_shot(path, data, shut_down=shut_down, timeout=timeout)
    decoded: dict[str, Any] = json.loads(reply)
    return decoded


class Framed:
    """A kept connection of length-prefixed messages."""

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.socket = connect(path, timeout)

    def __enter__(self) -> "Framed":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send_bytes(self, body: bytes) -> None:
        """Send one message."""
        self.socket.sendall(struct.pack(">I", len(body)) + body)

    def send(self, module: str, function: str, params: Any = None, **fields: Any) -> None:
        """Send one request."""
        body = json.dumps(request(module, function, params, **fields), ensure_ascii=False)
        self.send_bytes(body.encode())

    def receive(self) -> dict[str, Any] | None:
        """The next reply; None for the frame of length 0 that ends a connection."""
        (length,) = struct.unpack(">I", self._exactly(4))
        if length == 0:
            return None
        reply: dict[str, Any] = json.loads(self._exactly(length).decode())
        return reply

    def call(
        self, module: str, function: str, params: Any = None, **fields: Any
    ) -> dict[str, Any] | None:
        """One request and its reply."""
        self.send(module, function, params, **fields)
        return self.receive()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError(f"closed after {len(data)} of {size} bytes")
            data += piece
        return data


def until(condition: Any, seconds: float = 20.0, what: str = "condition") -> Any:
    """Wait until `condition()` is true and return its value; fail after `seconds`.

    The pause between two attempts grows from 10 to 50 ms: what takes seconds costs few attempts.
    """
    end = time.monotonic() + seconds
    pause = 0.01
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {seconds} s")
        time.sleep(pause)
        pause = min(0.05, 1.2 * pause)


def most_at_once(spans: Sequence[Sequence[float]]) -> int:
    """The most of these (began, ended) that overlapped at one instant."""
    changes = [(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans]
    return max(accumulate(change for _, change in sorted(changes)))
