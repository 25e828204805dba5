"""Turning clients away with an answer, where the daemon is told not to let them wait.

A client that finds no room is accepted all the same, only to be told `Overloaded` in the form that
it speaks, and closed. It is no connection in the gate's sense: it never has a request, its time is
short, and there are few of them at a time. Those that come beyond wait in the listen queue; while
there are any, who is silent has to go sooner.

One thread serves all of them, without ever waiting for one.
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

from cpanbridge.supervisor.gate import MOST_REJECTED, Obstacle
from cpanbridge.workers.accept.own_threads import OwnThread
from cpanbridge.workers.protocol import messages

FIRST_BYTES_SECONDS = 5.0  # for a client to send something, and so to say which form it speaks
CROWDED_SECONDS = 0.5  # the same when all places are taken
LINGER_SECONDS = 2.0  # for it to read the answer, and to end what it was sending
READ_SIZE = 65536

LOGGER = logging.getLogger("cpanbridge.worker")

Answer = Callable[[Obstacle, str | None], bytes]


class _RejectedClient:
    """A client on its way out."""

    def __init__(self, client: SocketType, obstacle: Obstacle) -> None:
        client.setblocking(False)
        self.socket = client
        self._since = time.monotonic()
        self._obstacle = obstacle
        self._answered = False

    def until(self, crowded: bool) -> float:
        """When it is to be gone at last."""
        if self._answered:
            return self._since + LINGER_SECONDS
        return self._since + (CROWDED_SECONDS if crowded else FIRST_BYTES_SECONDS)

    def has_gone(self, answer: Answer) -> bool:
        """It has sent something, or its end: answer it, and tell whether that was all."""
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
            LOGGER.exception("A client could not be turned away by a fault of the daemon's own")
            return True
        return False

    def _reply(self, data: bytes, answer: Answer) -> bytes:
        if not messages.is_framed(data):
            return messages.to_ascii(answer(self._obstacle, messages.identity(data)))
        reply = answer(self._obstacle, messages.identity(messages.first_frame(data)))
        return messages.to_frame(reply) + messages.NO_MORE_REQUESTS


class Rejecter:
    """Takes clients from the thread at the door. `answer` is what makes the reply."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._arrivals: queue.SimpleQueue[_RejectedClient] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rejected = 0
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    @property
    def has_place(self) -> bool:
        """Whether one more can be taken."""
        return self._rejected < MOST_REJECTED

    def take(self, client: SocketType, obstacle: Obstacle) -> None:
        """Answer a client and see it out. Called by the thread at the door."""
        with self._lock:
            self._rejected += 1
            if self._thread is None:
                self._thread = OwnThread(target=self._run, name="turnstile", daemon=True)
                self._thread.start()
        self._arrivals.put(_RejectedClient(client, obstacle))
        os.eventfd_write(self._wake, 1)

    def wait_until_empty(self, seconds: float) -> None:
        """Let those that were taken be seen out."""
        with self._lock:
            self._empty.wait_for(lambda: not self._rejected, timeout=max(0.0, seconds))

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                inside = [key.data for key in selector.get_map().values() if key.data]
                now, crowded = time.monotonic(), not self.has_place
                timeout = min((rejected.until(crowded) - now for rejected in inside), default=None)
                for key, _ in selector.select(timeout):
                    if key.data is None:
                        os.eventfd_read(self._wake)
                        self._let_arrive(selector)
                    elif key.data.has_gone(self._answer):
                        self._see_out(selector, key.data)
                        inside.remove(key.data)
                now, crowded = time.monotonic(), not self.has_place
                for rejected in inside:
                    if rejected.until(crowded) <= now:
                        self._see_out(selector, rejected)

    def _let_arrive(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                rejected = self._arrivals.get_nowait()
                selector.register(rejected.socket, selectors.EVENT_READ, rejected)

    def _see_out(self, selector: selectors.BaseSelector, rejected: _RejectedClient) -> None:
        selector.unregister(rejected.socket)
        rejected.socket.close()
        with self._lock:
            self._rejected -= 1
            if not self._rejected:
                self._empty.notify_all()
