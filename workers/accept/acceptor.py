"""Where clients come in: from outside, under the gate, from other workers, and from a rest.

A client is accepted only while the gate has room for its connection and a request: room is
reserved under the gate's lock, and the client accepted into it (`outside.py` says which worker
hears of it). Most clients have sent their request by then, so it is read at once, and the thread
knows what it has before anybody is woken.

A client that another worker hands over has its connection's room already, and so has one that keeps
its connection and sends another request. So these are let in while the gate has none, and while the
worker is about to leave and accepts nobody from outside.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum
from socket import SocketType
from typing import Generic, TypeVar

import msgspec

from cpanbridge.supervisor.gate import Gate, Obstacle
from cpanbridge.supervisor.memory.layout import WAITS_FOR_CONNECTION
from cpanbridge.workers.accept.deference import Deference
from cpanbridge.workers.accept.listen_queue import ListenQueue
from cpanbridge.workers.accept.rejecter import Rejecter
from cpanbridge.workers.accept.restraint import Restraint
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.transfer import MovingClient
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.outgoing import FEW, Outgoing

LOGGER = logging.getLogger("cpanbridge.worker")

A_LITTLE_SECONDS = 0.1
A_MOMENT = 0.001
LOOKS = 50  # before the first client is turned away
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_COMPLAIN_EVERY = 60.0
# While clients come in from one side without a pause, the other one is looked at after so many.
MOST_IN_A_ROW = 8

C = TypeVar("C")


class Arrival(msgspec.Struct, Generic[C]):
    """A client that was let in, and charged as a connection."""

    descriptor: int  # a blocking socket's
    number: int  # counts the clients of this worker's slot
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the first request in `data`, if it is all there; not admitted yet
    moving: MovingClient | None = None  # of one that another worker had before
    # Of one that was here before: it has rested, or comes back from its way to another worker.
    client: ClientSocket | None = None


class _Nobody(Enum):
    """Why nobody was let in."""

    OUTSIDE = "nobody waits there"
    FOR_NOW = "somebody waits, but is not to be had for want of a descriptor, memory, or a place"
    OTHERS_FIRST = "those that were let in are on their way to other workers"
    BUT_LOOK_AGAIN = "somebody was turned away"


class Acceptor(Generic[C]):
    """Lets clients in, one at a time. Called from the threads of one worker.

    `prepare` turns the first bytes into a call that can run at once, or None; it is told when they
    arrived, if that was in another worker. `may_be_held_up` says whether anything in this worker
    may keep the interpreter lock when a client comes.
    `incoming` has the clients that other workers put there, `outgoing` those on their way to them,
    `keep_alive` those at rest; `restraint` and `deference` say when who waits outside is left to
    other workers.
    With a `rejecter` nobody is left to wait there.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        gate: Gate,
        prepare: Callable[[bytes, float | None], C | None],
        may_be_held_up: Callable[[], bool],
        incoming: Incoming,
        outgoing: Outgoing,
        keep_alive: KeepAlive,
        restraint: Restraint,
        deference: Deference,
        rejecter: Rejecter | None = None,
    ) -> None:
        self._shut = self._closed = False
        self.is_shut = False  # nobody is about to let a client in from outside
        self._gate = gate
        self._prepare = prepare
        self._may_be_held_up = may_be_held_up
        self._incoming = incoming
        self._outgoing = outgoing
        self._keep_alive = keep_alive
        self._restraint = restraint
        # How many may be let in from there in a row, while somebody may wait on the other side.
        self._turns_inside = 0
        self._turns_outside = MOST_IN_A_ROW
        self._rejecter = rejecter
        self._receiver = syscalls.Receiver()
        self._turns_away = False  # since it last let somebody in
        self._complained = -_COMPLAIN_EVERY
        # What is looked at while there is no room as well; it is readable when one of these is.
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._interrupts = select.epoll()
        told = (incoming.descriptor, outgoing.descriptor, keep_alive.descriptor)
        inside = (self._wakeup, *told)
        for descriptor in inside:
            self._interrupts.register(descriptor, select.EPOLLIN)
        self._interrupted = syscalls.ReadySet(self._interrupts, len(inside))
        self._inside = {self._interrupts.fileno(), *inside}
        self._outside = ListenQueue(listeners, self._interrupts, gate, deference)
        self._looks_outside = True
        self._outside_first = False  # somebody came there just now

    def next(self) -> Arrival[C] | None:
        """Wait for a client and let it in; None when the door is closed."""
        self._looks_outside = True
        while not self._closed:
            self._outgoing.settle(FEW)
            if self._turns_inside > 0 and not self._outside_first:
                self._turns_inside -= 1
                arrival = self._look_inside()
                if arrival is not None:
                    return arrival
                self._turns_inside = 0
                if self._closed:
                    return None  # its bell was heard just now, and does not ring again
            outcome = _Nobody.OUTSIDE
            self._outside_first = False
            if self._shut:
                self.is_shut = True
            elif self._looks_outside and self._restraint.holds_back():
                outcome = _Nobody.OTHERS_FIRST
            elif self._looks_outside:
                found = self._accept_next()
                if isinstance(found, Arrival):
                    self._turns_outside -= 1
                    if self._turns_outside <= 0:
                        self._turns_outside = MOST_IN_A_ROW
                        self._turns_inside = 1
                    return found
                outcome = found
            self._looks_outside = outcome is _Nobody.BUT_LOOK_AGAIN or self._wait(outcome)
        return None

    def _wait(self, outcome: _Nobody) -> bool:
        """Wait until it is worth while to look again; returns whether it is outside."""
        if self._keep_alive.awake or self._incoming.waiting:  # nothing tells of these any more
            self._turns_inside = MOST_IN_A_ROW
            return outcome is not _Nobody.OUTSIDE
        if self._shut:
            ready = self._interrupts.poll()
        elif outcome is _Nobody.OUTSIDE:
            ready = self._outside.wait(always=self._may_be_held_up())
        elif outcome is _Nobody.OTHERS_FIRST:
            ready = self._interrupts.poll(A_MOMENT)
        else:
            self._outside.leave_to_others()
            ready = self._interrupts.poll(A_LITTLE_SECONDS)
        inside = self._inside.intersection(fd for fd, _ in ready)
        if inside:
            self._turns_inside = MOST_IN_A_ROW
            self._turns_outside = MOST_IN_A_ROW
        told = len(inside) < len(ready)
        # Not where there was no room for who waits there, who is told of again and again.
        self._outside_first = told and not self._outside.told
        self._outside.told = self._outside.told or told
        return told or outcome is not _Nobody.OUTSIDE

    def _accept_next(self) -> Arrival[C] | _Nobody:
        gate = self._gate
        self._outside.relies_on_others = False
        if self._rejecter is not None:
            obstacle = self._obstacle()
            if obstacle is not None:
                return self._reject(obstacle, self._rejecter)
        elif not self._reserve():
            return _Nobody.OUTSIDE  # interrupted, as a look at the descriptors will say
        client = self._accept()
        if isinstance(client, _Nobody):
            gate.nobody_came()
            return client
        number = gate.opened()
        try:
            data = self._receiver.receive(client)
        except BlockingIOError:
            return Arrival(client, number, None, None)
        except OSError:
            return Arrival(client, number, b"", None)  # it has left already
        return Arrival(client, number, data, self._prepare(data, None))

    def _reserve(self) -> bool:
        """Wait until there is room for a client; False when somebody inside is ready before."""
        gate = self._gate
        if gate.attempt(gate.reserve, connection=True) is True:
            return True
        # Clients that other workers have taken over may be what is in the way.
        with self._outgoing.receipts_awaited():
            stop = self._interrupts.fileno()
            return bool(gate.wait_and_take(gate.reserve, stop, connection=True))

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

    def _reject(self, obstacle: Obstacle, rejecter: Rejecter) -> _Nobody:
        if not rejecter.has_place:
            return _Nobody.FOR_NOW
        client = self._accept()
        if isinstance(client, _Nobody):
            return client
        made = SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, client)
        rejecter.take(made, obstacle)
        return _Nobody.BUT_LOOK_AGAIN

    def _look_inside(self) -> Arrival[C] | None:
        """Who needs no room: let one in, each kind in its turn.

        What the bell is rung for is to be looked at after this, which silences it.
        """
        if (arrival := self._take_up()) is not None:
            return arrival
        told = self._interrupted.look()
        if self._keep_alive.descriptor in told:
            self._keep_alive.look()
        if self._wakeup in told:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            self._looks_outside = self._outside.told = True
        if self._outgoing.descriptor in told:
            arrival = self._let_back_in()
        if arrival is None and (self._incoming.waiting or self._incoming.descriptor in told):
            arrival = self._take_over()
        return arrival or self._take_up()

    def _let_back_in(self) -> Arrival[C] | None:
        """A client that was not taken by the worker that it was to go to."""
        if (client := self._outgoing.next_back()) is None:
            return None
        assert client.transfer is not None
        moving = client.transfer.moving
        call = self._prepare(moving.data, moving.arrived)
        return Arrival(client.descriptor, 0, moving.data, call, client=client)

    def _take_up(self) -> Arrival[C] | None:
        """A connection that has rested and has sent something, or has ended."""
        awake = self._keep_alive.awake
        while awake:
            client = awake.popleft()
            try:
                try:
                    data = self._receiver.receive(client.descriptor)
                except BlockingIOError:
                    self._keep_alive.rest(client)  # it has nothing after all
                    continue
            except OSError:
                data = b""
            return Arrival(client.descriptor, 0, data, self._prepare(data, None), client=client)
        return None

    def _take_over(self) -> Arrival[C] | None:
        """The next client that another worker has put into the postbox."""
        try:
            found = self._incoming.next()
        except OSError as error:
            self._complain("Cannot take clients over from other workers for now: %s", error)
            return None
        if found is None:
            return None
        moving, number = found
        call = self._prepare(moving.data, moving.arrived)
        return Arrival(moving.descriptor, number, moving.data, call, moving)

    def look_again(self) -> None:
        """Somebody waits of whom no descriptor tells. Called in the main thread."""
        os.eventfd_write(self._wakeup, 1)

    def look_out(self) -> None:
        """See that nobody waits outside of whom only another worker was told.

        Called in the main thread, now and then, and when another worker asks for it.
        """
        if not self._shut and self._outside.is_overlooked():
            self.look_again()

    def queue_up_again(self) -> None:
        """Be the last of the workers that are woken in turn: this one has a client that stays.

        Called in the thread that serves it.
        """
        if not self._outside.queue_up_again():
            self.look_again()

    def left(self) -> None:
        """Nobody is at the door for now: all threads are busy. Called in whichever sees it."""
        self._outside.leave()

    def shut(self) -> None:
        """Let nobody in from outside any more."""
        self._shut = True
        os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        """Let nobody in any more: `next` returns None."""
        self._closed = True
        os.eventfd_write(self._wakeup, 1)

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

    def _accept(self) -> int | _Nobody:
        """A waiting client's descriptor."""
        try:
            client = self._outside.accept()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._complain("Cannot accept clients, they wait: %s", error)
            return _Nobody.FOR_NOW
        return client if client is not None else _Nobody.OUTSIDE

    def _complain(self, message: str, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAIN_EVERY:
            self._complained = now
            LOGGER.error(message, error.strerror)
