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

from cpanbridge.supervisor.gate import Gate, Obstacle
from cpanbridge.supervisor.shared import WAITS_FOR_CONNECTION
from cpanbridge.workers.turnstile import Turnstile

LOGGER = logging.getLogger("cpanbridge.worker")

# More than nearly all requests have.
FIRST_READ = 65536
A_LITTLE_MS = 100
A_MOMENT = 0.001
LOOKS = 50  # before the first client is turned away
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_EVERY = 60.0

C = TypeVar("C")


class Arrival(NamedTuple, Generic[C]):
    """A client that was let in, and charged as a connection."""

    client: socket.socket  # blocking
    number: int  # counts the clients of this worker's slot
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the complete request in `data`; not admitted yet


class _Nobody(Enum):
    """Why nobody was let in."""

    OUTSIDE = "nobody waits there"
    FOR_NOW = "somebody waits, but is not to be had for want of a descriptor, memory, or a place"
    BUT_LOOK_AGAIN = "somebody was turned away"


class Door(Generic[C]):
    """Lets clients in, one at a time. Called from the threads of one worker.

    `prepare` turns the first bytes into a call that can run at once, or None. `stop` is a
    descriptor that becomes readable when the worker is to accept no more. With a `turnstile` nobody
    is left to wait outside.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        gate: Gate,
        prepare: Callable[[bytes], C | None],
        stop: int,
        turnstile: Turnstile | None = None,
    ) -> None:
        self._listeners = list(listeners)
        self._shut = False
        self._gate = gate
        self._prepare = prepare
        self._stop = stop
        self._turnstile = turnstile
        self._turns_away = False  # since it last let somebody in
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
            outcome = self._let_in()
            if isinstance(outcome, Arrival):
                return outcome
            if outcome is _Nobody.BUT_LOOK_AGAIN:
                continue
            ready = self._arrivals.poll() if outcome is _Nobody.OUTSIDE else self._wait_a_little()
            if any(fd == self._stop for fd, _ in ready):
                return None
        return None

    def _let_in(self) -> Arrival[C] | _Nobody:
        gate = self._gate
        if self._turnstile is not None:
            obstacle = self._obstacle()
            if obstacle is not None:
                return self._turn_away(obstacle, self._turnstile)
        elif not gate.enter(gate.reserve, self._stop, connection=True):
            return _Nobody.OUTSIDE  # told to stop, as a look at the descriptors will say
        client = self._accept()
        if isinstance(client, _Nobody):
            gate.nobody_came()
            return client
        number = gate.opened()
        try:
            data = client.recv(FIRST_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return Arrival(client, number, None, None)
        except OSError:
            return Arrival(client, number, b"", None)  # it has left already
        return Arrival(client, number, data, self._prepare(data))

    def _obstacle(self) -> Obstacle | None:
        """What keeps a client out for more than a moment; None: room is reserved for it.

        Another worker may have reserved the last room only to find that nobody came, or have a
        connection whose client has left but which is not counted as closed yet.
        """
        gate = self._gate
        for _ in range(LOOKS):
            outcome = gate.attempt(gate.reserve, connection=True)
            if not isinstance(outcome, Obstacle):
                self._turns_away = False
                return None
            obstacle = outcome
            if self._turns_away or obstacle.waits_for != WAITS_FOR_CONNECTION:
                break
            time.sleep(A_MOMENT)
        self._turns_away = True
        return obstacle

    def _turn_away(self, obstacle: Obstacle, turnstile: Turnstile) -> _Nobody:
        if not turnstile.has_place:
            return _Nobody.FOR_NOW
        client = self._accept()
        if isinstance(client, _Nobody):
            return client
        turnstile.take(client, obstacle)
        return _Nobody.BUT_LOOK_AGAIN

    def shut(self) -> None:
        """Let nobody in any more: `next` returns None, at once once `stop` is readable."""
        self._shut = True

    def take_leftover(self, until: float) -> Arrival[C] | None:
        """When nothing is let in any more: a client left waiting, to be told so; None at the end.

        `until` (CLOCK_MONOTONIC seconds) is when to give up. Leftovers take connection room only.
        Called when no thread is at the door any more.
        """
        while time.monotonic() < until:
            if self._gate.reserve_any():
                client = self._accept()
                if not isinstance(client, _Nobody):
                    return Arrival(client, self._gate.opened(), None, None)
                self._gate.nobody_came()
                return None
            time.sleep(0.01)
        return None

    def _accept(self) -> socket.socket | _Nobody:
        """A waiting client."""
        try:
            for turn, listener in enumerate(self._listeners):
                try:
                    client, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                if client.gettimeout() is not None:
                    client.settimeout(None)  # a module has called socket.setdefaulttimeout
                if len(self._listeners) > 1:  # the next look begins at another one
                    self._listeners.append(self._listeners.pop(turn))
                return client
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._complain(error)
            return _Nobody.FOR_NOW
        return _Nobody.OUTSIDE

    def _wait_a_little(self) -> list[tuple[int, int]]:
        stop = select.poll()
        stop.register(self._stop, select.POLLIN)
        return stop.poll(A_LITTLE_MS)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAIN_EVERY:
            self._complained = now
            LOGGER.error("Cannot accept clients, they wait: %s", error.strerror)
