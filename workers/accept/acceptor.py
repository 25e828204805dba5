"""Accepting clients: what the leading thread of a worker does.

A client is accepted only while the gate has room for its connection: room is taken under the
gate's lock, and the client accepted into it. Most clients have sent their request by then, so it is
read at once, and the thread knows what it has before another thread is woken. Clients that have
room already (`ready_clients.py`) are served in turn with those that wait in the listen queue.

A worker that runs as many requests as it may leaves clients to the others, but accepts those that
none has accepted for a while: one of them may only want to know whether the daemon lives.

With `overload = "reject"` a client is accepted in any case, and handed to the rejecter when all
connections are taken.
"""

import logging
import socket
import time
from collections.abc import Callable
from enum import Enum
from socket import SocketType
from typing import Generic, TypeVar

from cpanbridge.supervisor.gate import LOST_WAKEUP_SECONDS, Gate
from cpanbridge.supervisor.system.exhaustion import is_exhausted
from cpanbridge.supervisor.wording import explain
from cpanbridge.workers.accept.listen_queue import ListenQueue
from cpanbridge.workers.accept.ready_clients import Arrival, Prepare, ReadyClients
from cpanbridge.workers.accept.rejecter import Rejecter
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.handoff.outgoing import FEW

LOGGER = logging.getLogger("cpanbridge.worker")

MOST_IN_A_ROW = 8  # clients from one side, before the other side is tried
# A client that was handed over lets its owner accept the next ones itself: this worker, which would
# hand them over as well, accepts none for so long while so many are on their way.
SOME_ON_THEIR_WAY = 2
HOLD_SECONDS = 0.001
EXHAUSTED_SECONDS = 0.1
CROWDED_SECONDS = 0.1  # between two looks at what other workers have not accepted
COMPLAIN_SECONDS = 60.0
# How often to try for a connection's room before the first client is rejected: a client that has
# read its reply may connect again before the worker that replied has given the room back.
TRIES_BEFORE_REJECTING = 50
TRY_SECONDS = 0.001

C = TypeVar("C")


class _Outcome(Enum):
    """Why no client was accepted."""

    NONE_WAITS = "none waits"
    AGAIN = "something else has to be done first, or the last one was rejected"
    HELD_BACK = "the last ones are on their way to other workers"
    FULL = "all connections are taken"
    CROWDED = "this worker has no thread for its request; another one may have"
    EXHAUSTED = "one waits, and there is no descriptor, memory or place for it"


class Acceptor(Generic[C]):
    """Finds the next client to serve. Called by the leading thread, but for what says otherwise.

    `may_be_held_up` says whether module code in this worker may keep the interpreter lock when a
    client comes. With a `rejecter` no client waits for room.
    """

    def __init__(
        self,
        listen_queue: ListenQueue,
        ready: ReadyClients[C],
        gate: Gate,
        prepare: Prepare[C],
        may_be_held_up: Callable[[], bool],
        rejecter: Rejecter | None = None,
    ) -> None:
        self._listen_queue = listen_queue
        self._ready = ready
        self._handoffs = ready.handoffs
        self._gate = gate
        self._prepare = prepare
        self._may_be_held_up = may_be_held_up
        self._rejecter = rejecter
        self._receiver = syscalls.Receiver()
        self._accepting_first = self._accept, self._next_ready
        self._ready_first = self._next_ready, self._accept
        self._accepts_first = True  # before ready clients are served
        self._in_a_row = 0
        self._outcome = _Outcome.AGAIN
        self._claimed = -1  # how many clients had been claimed when accepting was last held back
        self._rejects = False  # since there was room last
        self._left_until = 0.0  # clients are left to others, CLOCK_MONOTONIC seconds
        self._complained = -COMPLAIN_SECONDS
        self._is_told_to_shut = self._is_closed = False
        self.is_shut = False  # no thread is about to accept a client

    def next(self) -> Arrival[C] | None:
        """Wait for a client to serve; None when the acceptor is closed."""
        while not self._is_closed:
            if self._handoffs.on_their_way:
                self._handoffs.settle(FEW)
            if self._in_a_row >= MOST_IN_A_ROW:
                self._change_turn()
            # Both sides, the one first that the last client came from, but not for ever.
            for find in self._accepting_first if self._accepts_first else self._ready_first:
                if (arrival := find()) is not None:
                    self._in_a_row += 1
                    return arrival
                self._change_turn()
            self._wait()
        return None

    def _change_turn(self) -> None:
        self._accepts_first = not self._accepts_first
        self._in_a_row = 0

    def _wait(self) -> None:
        """Wait until there may be a client."""
        ready = self._ready
        if ready.pending or ready.was_woken or self._outcome is _Outcome.AGAIN or self._is_closed:
            return
        if self._is_told_to_shut:
            self._has_shut()
            ready.wait()
        elif self._outcome is _Outcome.NONE_WAITS and not self._gate.has_no_thread:
            exclusive = not self._may_be_held_up()
            seconds = ready.seconds()
            self._accepts_first = self._listen_queue.wait(seconds, exclusive=exclusive)
        elif self._outcome is _Outcome.HELD_BACK:
            ready.wait(HOLD_SECONDS)
        elif self._outcome is _Outcome.FULL:
            ready.wait(LOST_WAKEUP_SECONDS)
        elif self._outcome is _Outcome.EXHAUSTED:
            self._listen_queue.leave_to_others()
            ready.wait(EXHAUSTED_SECONDS)
        else:
            if self._listen_queue.woken:
                self.leave_to_others()
            self._gate.accept_waits_for_thread = True
            if self._gate.has_no_thread:  # still
                ready.wait(CROWDED_SECONDS)
            self._gate.accept_waits_for_thread = False

    def _next_ready(self) -> Arrival[C] | None:
        try:
            return self._ready.next()
        except OSError as error:
            self._complain("Cannot take clients over from other workers for now: %s", error)
            return None

    # -- from the listen queue --

    def _accept(self) -> Arrival[C] | None:
        """Accept a client, as soon as there is room; None: see `_outcome`."""
        self._outcome = _Outcome.AGAIN
        self._ready.was_woken = False
        if self._is_told_to_shut:
            self._gate.stop_waiting_for_connection()
            self._has_shut()
            self._outcome = _Outcome.NONE_WAITS
            return None
        if self._holds_back():
            self._outcome = _Outcome.HELD_BACK
            return None
        if self._gate.threads and self._leaves_to_others():
            self._outcome = _Outcome.CROWDED
            return None
        descriptor = self._accept_or_reject() if self._rejecter else self._accept_when_room()
        if descriptor is None:
            return None
        number = self._gate.accepted()
        try:
            data = self._receiver.receive(descriptor)
        except BlockingIOError:
            return Arrival(descriptor, number, None, None)
        except OSError:
            return Arrival(descriptor, number, b"", None)  # it has left already
        return Arrival(descriptor, number, data, self._prepare(data, None, 0))

    def _has_shut(self) -> None:
        if not self.is_shut:
            self.is_shut = True
            self._gate.wake_other_workers()  # and the main thread of this one

    def _holds_back(self) -> bool:
        """Whether to wait a moment for the owners of the clients that are on their way.

        Not again before one of them has claimed a client: it may be stopped.
        """
        handoffs = self._handoffs
        if handoffs.on_their_way < SOME_ON_THEIR_WAY or handoffs.claimed == self._claimed:
            return False
        self._claimed = handoffs.claimed
        return True

    def _leaves_to_others(self) -> bool:
        """Whether clients are left to other workers, because this one has no thread for them."""
        if not self._gate.has_no_thread:
            self._left_until = 0.0
            return False
        now = time.monotonic()
        if not self._left_until:
            self._left_until = now + CROWDED_SECONDS
        return now < self._left_until

    def _accept_when_room(self) -> int | None:
        if not self._gate.take_connection():
            self._handoffs.settle()  # clients that others have claimed may be what takes the room
            if not self._gate.take_connection(wait=True):
                self._outcome = _Outcome.FULL
                return None
        return self._accept_into_room()

    def _accept_into_room(self) -> int | None:
        """A waiting client's descriptor; its room is taken already, and given back for None."""
        descriptor = None
        try:
            descriptor = self._accept_one()
        finally:
            if descriptor is None:
                self._gate.release_connection()
        return descriptor

    def _accept_or_reject(self) -> int | None:
        assert self._rejecter is not None
        if not self._rejecter.can_take():
            return self._accept_when_room()
        descriptor = self._accept_one()
        if descriptor is None or self._takes_room_soon():
            return descriptor
        self._rejecter.take(SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor))
        return None

    def _takes_room_soon(self) -> bool:
        """Take room for a client; False when there is none for more than a moment."""
        tries = 1 if self._rejects else TRIES_BEFORE_REJECTING
        while not self._gate.take_connection():
            tries -= 1
            if not tries:
                self._rejects = True
                return False
            time.sleep(TRY_SECONDS)
        self._rejects = False
        return True

    def _accept_one(self) -> int | None:
        """A waiting client's descriptor."""
        try:
            descriptor = self._listen_queue.accept()
            if descriptor is None:
                self._outcome = _Outcome.NONE_WAITS
                self._left_until = 0.0
            return descriptor
        except OSError as error:
            if not is_exhausted(error):
                raise
            self._complain("Cannot accept clients, they wait: %s", error)
            self._outcome = _Outcome.EXHAUSTED
            return None

    def _complain(self, message: str, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            LOGGER.error(message, explain(error))

    # -- from other threads --

    def check_listen_queue(self) -> None:
        """See that no client waits for whom only another worker was woken.

        Called in the main thread, once a second, and when another worker asks for it.
        """
        if not self._is_told_to_shut and self._listen_queue.has_clients():
            self._ready.wake()

    def wake(self) -> None:
        """A ready client is there of whom no descriptor tells. Called in the main thread."""
        self._ready.wake()

    def leave_to_others(self) -> None:
        """This worker does not accept for now: wake the others if only this one was woken.

        Called in the leading thread; in the thread that begins to serve, or the main thread, when
        no thread leads.
        """
        self._listen_queue.will_not_accept()
        if self._listen_queue.woken:
            self._listen_queue.woken = False
            self._gate.wake_other_workers()

    def shut(self) -> None:
        """Accept no more; clients that have room are served on. Called in the main thread."""
        self._is_told_to_shut = True
        self._ready.wake()

    def close(self) -> None:
        """Serve no further client: `next` returns None. Called in the main thread."""
        self._is_closed = True
        self._ready.wake()

    def take_leftover(self, until: float) -> Arrival[C] | None:
        """A client left in the listen queue, to be told that the daemon stops; None: none is left.

        `until` (CLOCK_MONOTONIC seconds) is when to give up. Takes connection room only. Called in
        the main thread, when no thread leads any more.
        """
        while time.monotonic() < until:
            if self._gate.take_connection():
                descriptor = self._accept_into_room()
                if descriptor is None:
                    return None
                return Arrival(descriptor, self._gate.accepted(), None, None)
            time.sleep(0.01)
        return None
