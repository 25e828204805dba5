"""Where clients come in: accepting under the gate.

A client is accepted only while the gate has room for its connection and a request: room is
reserved under the gate's lock, and the client accepted into it. Most clients have sent their
request by then, so it is read at once, and the thread knows what it has before anybody is woken.
"""

import errno
import logging
import select
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from cpanbridge.supervisor.gate import Gate

LOGGER = logging.getLogger("cpanbridge.worker")

# More than nearly all requests have.
FIRST_READ = 65536
EXHAUSTED_MS = 100
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_EVERY = 60.0

C = TypeVar("C")


class Arrival(NamedTuple, Generic[C]):
    """A client that was let in, and charged as a connection."""

    client: socket.socket  # blocking
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the complete request in `data`; not admitted yet


class _Outside(Enum):
    NOBODY = "nobody waits"
    EXHAUSTED = "somebody waits, but there is no descriptor or memory to let them in"


class Door(Generic[C]):
    """Lets clients in, one at a time. Called from the threads of one worker.

    `prepare` turns the first bytes into a call that can run at once, or None. `stop` is a
    descriptor that becomes readable when the worker is to accept no more.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        gate: Gate,
        prepare: Callable[[bytes], C | None],
        stop: int,
    ) -> None:
        self._listeners = list(listeners)
        self._shut = False
        self._gate = gate
        self._prepare = prepare
        self._stop = stop
        self._complained = -_COMPLAIN_EVERY
        # Not EPOLLEXCLUSIVE: the one worker that the kernel wakes may be one whose module keeps the
        # interpreter lock, and the client would wait for that while other workers are idle.
        self._arrivals = select.epoll()
        for listener in listeners:
            self._arrivals.register(listener, select.EPOLLIN)
        self._arrivals.register(stop, select.EPOLLIN)

    def next(self) -> Arrival[C] | None:
        """Wait for a client and let it in; None when the worker is to accept no more."""
        while not self._shut:
            if not self._gate.enter(self._gate.reserve, self._stop, connection=True):
                return None
            client = self._accept()
            if not isinstance(client, _Outside):
                return self._receive(client)
            if client is _Outside.NOBODY:
                ready = self._arrivals.poll()
            else:
                ready = self._wait_out_exhaustion()
            if any(fd == self._stop for fd, _ in ready):
                return None
        return None

    def shut(self) -> None:
        """Let nobody in any more: `next` returns None, at once once `stop` is readable."""
        self._shut = True

    def take_leftover(self, until: float) -> Arrival[C] | None:
        """When nothing is let in any more: a client left waiting, to be told so; None at the end.

        `until` (CLOCK_MONOTONIC seconds) is when to give up. Leftovers take connection room only.
        Called when no thread is at the door any more.
        """
        while time.monotonic() < until:
            with self._gate:
                reserved = self._gate.reserve_any()
            if reserved:
                client = self._accept()
                return None if isinstance(client, _Outside) else Arrival(client, None, None)
            time.sleep(0.01)
        return None

    def _receive(self, client: socket.socket) -> Arrival[C]:
        """What a client that was just accepted has sent already."""
        try:
            data = client.recv(FIRST_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return Arrival(client, None, None)
        except OSError:
            return Arrival(client, b"", None)  # it has left already
        return Arrival(client, data, self._prepare(data))

    def _accept(self) -> socket.socket | _Outside:
        """A waiting client, in the room that was reserved; which is given back if there is none."""
        try:
            for turn, listener in enumerate(self._listeners):
                try:
                    client, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                self._gate.opened()
                if client.gettimeout() is not None:
                    client.settimeout(None)  # a module has called socket.setdefaulttimeout
                if len(self._listeners) > 1:  # the next look begins at another one
                    self._listeners.append(self._listeners.pop(turn))
                return client
        except OSError as error:
            self._gate.nobody_came()
            if error.errno not in _EXHAUSTED:
                raise
            self._complain(error)
            return _Outside.EXHAUSTED
        self._gate.nobody_came()
        return _Outside.NOBODY

    def _wait_out_exhaustion(self) -> list[tuple[int, int]]:
        stop = select.poll()
        stop.register(self._stop, select.POLLIN)
        return stop.poll(EXHAUSTED_MS)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAIN_EVERY:
            self._complained = now
            LOGGER.error("Cannot accept clients, they wait: %s", error.strerror)
