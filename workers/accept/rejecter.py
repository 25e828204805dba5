"""Rejecting clients with an answer, with `overload = "reject"`.

A client that finds all connections taken is accepted all the same, only to be told `Overloaded` in
the form that it speaks, and closed. The gate does not count it as a connection: it never has a
request, its time is short, and a worker has `MOST_REJECTED` of them at most. Further ones wait in
the listen queue; while there are any, a client that sends nothing is closed sooner.

One thread serves all of them and never waits for one.
"""

import contextlib
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from socket import SocketType

from cpanbridge.supervisor.gate import MOST_REJECTED
from cpanbridge.supervisor.wording import explain
from cpanbridge.workers.accept.own_threads import OwnThread
from cpanbridge.workers.protocol.framing import NO_MORE_REQUESTS, is_framed, to_frame, whole_frame
from cpanbridge.workers.protocol.replies import to_ascii
from cpanbridge.workers.protocol.requests import request_id_in

FIRST_BYTES_SECONDS = 5.0  # for a client to send something, and so to say which form it speaks
CROWDED_SECONDS = 0.5  # the same when all places are taken
LINGER_SECONDS = 2.0  # for it to read the answer, and to end what it was sending
READ_SIZE = 65536

LOGGER = logging.getLogger("cpanbridge.worker")

Answer = Callable[[str | None], bytes]


class _RejectedClient:
    """A client that is to be answered and closed."""

    def __init__(self, client: SocketType) -> None:
        client.setblocking(False)
        self.socket = client
        self._since = time.monotonic()
        self._answered = False

    def until(self, crowded: bool) -> float:
        """When it is to be closed at the latest."""
        if self._answered:
            return self._since + LINGER_SECONDS
        return self._since + (CROWDED_SECONDS if crowded else FIRST_BYTES_SECONDS)

    def is_done(self, answer: Answer) -> bool:
        """It has sent something, or its end: answer it; returns whether it can be closed."""
        try:
            data = self.socket.recv(READ_SIZE)
            if not data:
                return True
            if not self._answered:
                self._answered = True
                # A socket's buffer takes so short an answer at once.
                self.socket.send(self._reply(data, answer))
                self.socket.shutdown(socket.SHUT_WR)
                self._since = time.monotonic()
        except BlockingIOError:
            return False
        except OSError:
            return True
        except Exception:
            LOGGER.exception("A client could not be rejected by a fault of the daemon's own")
            return True
        return False

    def _reply(self, data: bytes, answer: Answer) -> bytes:
        if not is_framed(data):
            return to_ascii(answer(request_id_in(data)))
        reply = answer(request_id_in(whole_frame(data) or b""))
        return to_frame(reply) + NO_MORE_REQUESTS


class Rejecter:
    """Takes clients from the leading thread. `answer` makes the reply to a request's id."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._arrivals: queue.SimpleQueue[_RejectedClient] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._rejected = 0
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def can_take(self) -> bool:
        """Whether one more client can be taken: there is a place for it, and a thread."""
        if self._thread is None:
            thread = OwnThread(target=self._run, name="rejecter", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return not self._is_crowded

    @property
    def _is_crowded(self) -> bool:
        return self._rejected >= MOST_REJECTED

    def take(self, client: SocketType) -> None:
        """Answer a client and close it. `can_take` was true."""
        with self._lock:
            self._rejected += 1
        self._arrivals.put(_RejectedClient(client))
        os.eventfd_write(self._wake, 1)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until all that were taken are closed."""
        with self._lock:
            self._empty.wait_for(lambda: not self._rejected, timeout=max(0.0, seconds))

    def _run(self) -> None:
        while True:
            taken = [key.data for key in self._selector.get_map().values() if key.data]
            now, crowded = time.monotonic(), self._is_crowded
            timeout = min((rejected.until(crowded) - now for rejected in taken), default=None)
            for key, _ in self._selector.select(timeout):
                if key.data is None:
                    os.eventfd_read(self._wake)
                    self._take_arrivals()
                elif key.data.is_done(self._answer):
                    self._close(key.data)
                    taken.remove(key.data)
            now, crowded = time.monotonic(), self._is_crowded
            for rejected in taken:
                if rejected.until(crowded) <= now:
                    self._close(rejected)

    def _take_arrivals(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                rejected = self._arrivals.get_nowait()
                try:
                    self._selector.register(rejected.socket, selectors.EVENT_READ, rejected)
                except OSError as error:  # no memory, or the kernel's limit of watched files
                    LOGGER.error("A client could not be rejected: %s", explain(error))
                    self._end(rejected)

    def _close(self, rejected: _RejectedClient) -> None:
        self._selector.unregister(rejected.socket)
        self._end(rejected)

    def _end(self, rejected: _RejectedClient) -> None:
        rejected.socket.close()
        with self._lock:
            self._rejected -= 1
            if not self._rejected:
                self._empty.notify_all()
