"""Clients that call without a pause and record each call: none may be lost or run twice."""

import contextlib
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from plain_client import Framed, one_shot

# The outcome of a call, as its client knows it. BEGUN: it got no answer.
BEGUN, ANSWERED, NOT_RUN = range(3)
NOT_SENT = (FileNotFoundError, ConnectionRefusedError)  # by connect(2), and by nothing else here


class NotRunError(Exception):
    """The daemon has replied that it has not run the call."""


class Hammer:
    """One-shot and framed clients that call again and again, through one daemon's changes.

    Each pauses for `pause` seconds between two calls.

    A framed client that receives the frame of length 0 sends its request again on another
    connection, as the wire format allows. Everything else that is not the right reply is recorded
    as an error, and the client continues with its next call.

    With a `journal`, a file, the daemon records there which calls it runs: see `disagreements`.
    """

    def __init__(
        self,
        path: str,
        one_shots: int,
        framed: int,
        pause: float = 0.0,
        journal: Path | None = None,
    ) -> None:
        self._path = path
        self._journal = journal
        self._pause = pause
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.answered = 0
        self.moved = 0
        self.errors: list[str] = []
        self.times = array("f")  # seconds that each answered call took
        self._outcomes = bytearray()  # of each call, by its number
        lives = [self._one_shot] * one_shots + [self._framed] * framed
        self._clients = [threading.Thread(target=self._live, args=(life,)) for life in lives]
        for client in self._clients:
            client.start()

    def stop(self) -> None:
        """End the clients, each after its reply."""
        self._over.set()
        for client in self._clients:
            client.join(60)

    def disagreements(self) -> list[str]:
        """Differences between the clients' records and the journal; to be called at the end.

        A call that was answered has run once, one that was refused has not, and one that got no
        answer may have run, but not twice.
        """
        assert self._journal is not None
        ran = bytearray(len(self._outcomes))
        wrong = []
        with self._journal.open() as journal:
            for number in map(int, journal):
                if ran[number]:
                    wrong.append(f"call {number} has run twice")
                ran[number] = 1
        for number, (outcome, has_run) in enumerate(zip(self._outcomes, ran, strict=True)):
            if outcome == ANSWERED and not has_run:
                wrong.append(f"call {number} was answered, but has not run")
            if outcome == NOT_RUN and has_run:
                wrong.append(f"call {number} has run, but its client received that it has not")
        return wrong

    def _next(self) -> int:
        """A new call's number."""
        with self._lock:
            self._outcomes.append(BEGUN)
            return len(self._outcomes) - 1

    def _not_run(self, number: int) -> None:
        with self._lock:
            self._outcomes[number] = NOT_RUN

    def _live(self, life: Any) -> None:
        while not self._over.is_set():
            number = self._next()
            try:
                life(number)
                self._over.wait(self._pause)
            except Exception as error:
                with self._lock:
                    self.errors.append(f"{life.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.05)

    def _request(self, number: int) -> tuple[str, dict[str, Any]]:
        if self._journal is None:
            return "echo", {"number": number}
        return "record", {"number": number, "file": str(self._journal)}

    def _check(self, number: int, reply: dict[str, Any], began: float) -> None:
        if reply.get("error", "").endswith("not run"):
            self._not_run(number)
            raise NotRunError(reply["error_type"])
        assert reply["success"], reply
        assert reply["result"] == {"number": number}
        assert reply.get("request_id") == f"r{number}"
        with self._lock:
            self._outcomes[number] = ANSWERED
            self.answered += 1
            self.times.append(time.monotonic() - began)

    def _one_shot(self, number: int) -> None:
        began = time.monotonic()
        function, params = self._request(number)
        try:
            reply = one_shot(self._path, "probe", function, params, request_id=f"r{number}")
        except NOT_SENT:
            self._not_run(number)
            raise
        self._check(number, reply, began)

    def _framed(self, number: int) -> None:
        while not self._over.is_set():
            with Framed(self._path) as client:
                while not self._over.is_set():
                    began = time.monotonic()
                    function, params = self._request(number)
                    # The daemon may have stopped reading by now; its last frame can still be read.
                    with contextlib.suppress(BrokenPipeError):
                        client.send("probe", function, params, request_id=f"r{number}")
                    reply = client.receive()
                    if reply is None:
                        self.moved += 1
                        break
                    self._check(number, reply, began)
                    self._over.wait(self._pause)
                    number = self._next()
