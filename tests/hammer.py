"""Clients that call without a pause and know each of their calls: none may be lost or doubled."""

import contextlib
import itertools
import threading
import time
from typing import Any

from plain_client import Framed, one_shot


class Hammer:
    """One-shot and framed clients at full speed, through one daemon's changes.

    A framed client that is told to go elsewhere (the frame of length 0) sends its request again on
    another connection, as the wire allows. Everything else that is not the right reply is an error.
    """

    def __init__(self, path: str, one_shots: int, framed: int) -> None:
        self._path = path
        self._over = threading.Event()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.answered = 0
        self.moved = 0
        self.errors: list[str] = []
        self.slowest = 0.0
        self.times: list[float] = []
        lives = [self._one_shot] * one_shots + [self._framed] * framed
        self._clients = [threading.Thread(target=self._live, args=(life,)) for life in lives]
        for client in self._clients:
            client.start()

    def stop(self) -> None:
        """End the clients, each after its reply."""
        self._over.set()
        for client in self._clients:
            client.join(60)

    def _live(self, life: Any) -> None:
        while not self._over.is_set():
            try:
                life()
            except Exception as error:
                with self._lock:
                    self.errors.append(f"{life.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.05)

    def _check(self, number: int, reply: dict[str, Any], began: float) -> None:
        assert reply["success"], reply
        assert reply["result"] == {"number": number}
        assert reply["request_id"] == f"r{number}"
        with self._lock:
            self.answered += 1
            self.times.append(time.monotonic() - began)

    def _one_shot(self) -> None:
        number = next(self._numbers)
        began = time.monotonic()
        params = {"number": number}
        reply = one_shot(self._path, "probe", "echo", params, request_id=f"r{number}")
        self._check(number, reply, began)

    def _framed(self) -> None:
        number = next(self._numbers)
        while not self._over.is_set():
            with Framed(self._path) as client:
                while not self._over.is_set():
                    began = time.monotonic()
                    # It may have stopped reading by now; its last word is there to read.
                    with contextlib.suppress(BrokenPipeError):
                        client.send("probe", "echo", {"number": number}, request_id=f"r{number}")
                    reply = client.receive()
                    if reply is None:
                        self.moved += 1
                        break
                    self._check(number, reply, began)
                    number = next(self._numbers)
