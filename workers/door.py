"""Where clients come in: accepting under the gate.

A client is accepted only while the gate has room for its connection and a request. Most clients
have sent their request by the time they are accepted, so it is read, checked and admitted while the
gate's lock is held anyway: a fast call takes the lock once.
"""

import contextlib
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

# More than nearly all requests; the rest of a larger one is read after the lock is released.
FIRST_READ = 65536
EXHAUSTED_MS = 100
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_EVERY = 60.0

C = TypeVar("C")


class Arrival(NamedTuple, Generic[C]):
    """A client that was let in, and charged as a connection."""

    client: socket.socket  # blocking
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the complete request in `data`, admitted to run


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
        # EPOLLEXCLUSIVE: the kernel wakes one waiting worker for a client, not all of them, and
        # of the threads that wait on one epoll it wakes one.
        self._arrivals = select.epoll()
        for listener in listeners:
            self._arrivals.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        self._arrivals.register(stop, select.EPOLLIN)

    def next(self) -> Arrival[C] | None:
        """Wait for a client and let it in; None when the worker is to accept no more."""
        while not self._shut:
            taken = self._gate.enter(self._take, self._stop, connection=True)
            if isinstance(taken, Arrival):
                return taken
            if taken is None:
                return None
            if taken is _Outside.NOBODY:
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
        """
        while time.monotonic() < until:
            with self._gate:
                if self._gate.connection_room():
                    client = self._accept()
                    return None if isinstance(client, _Outside) else Arrival(client, None, None)
            time.sleep(0.01)
        return None

    def _take(self) -> Arrival[C] | _Outside:
        """Called under the gate's lock, with room for a connection and a request."""
        client = self._accept()
        if isinstance(client, _Outside):
            return client
        try:
            data = client.recv(FIRST_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return Arrival(client, None, None)
        except OSError:
            return Arrival(client, b"", None)  # it has left already
        call = self._prepare(data)
        if call is not None:
            self._gate.admitted()
        return Arrival(client, data, call)

    def _accept(self) -> socket.socket | _Outside:
        for turn, listener in enumerate(self._listeners):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._complain(error)
                    return _Outside.EXHAUSTED
                if error.errno == errno.EINVAL:
                    continue  # shut down: the master is gone and this worker about to leave
                raise
            self._gate.opened()
            if len(self._listeners) > 1:  # the next look begins at another one
                self._listeners.append(self._listeners.pop(turn))
            return client
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

    def close(self) -> None:
        """Stop listening in this process."""
        self._arrivals.close()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.close()
