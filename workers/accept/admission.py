"""A worker's requests at the gate: admitted, or waiting on their connections, without a thread.

A request that finds no room is given a ticket by the gate and waits here, in the order of tickets.
The leading thread takes the first one up when its turn may have come: when it is woken, or when the
rate allows the next request. It takes up one at a time, and that keeps its place until it is
admitted. It takes a request up as well whose time is over, to be told so, and one whose client has
hung up, to be closed; neither is charged.

A request that another worker may run sooner, because this one exits or has no thread for it, is
taken up to be handed over, with its ticket.
"""

import contextlib
import math
import select
import threading
import time
from bisect import insort
from collections.abc import Callable
from typing import IO, Generic, TypeVar

import msgspec

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import (
    ADMITTED,
    REASON_OF,
    WAITS_FOR_THREAD,
    WAITS_FOR_TURN,
)
from cpanbridge.supervisor.memory.wakeups import wake
from cpanbridge.workers.client.client_socket import ClientSocket

C = TypeVar("C")


class MustWait(Exception):
    """There is no room for a request now: it is to be added to those that wait."""

    def __init__(self, waits_for: int) -> None:
        super().__init__(waits_for)
        self.waits_for = waits_for  # WAITS_FOR_...


class WaitingRequest(msgspec.Struct, Generic[C], eq=False):
    """A request that waits. Times are CLOCK_MONOTONIC seconds."""

    client: ClientSocket
    data: bytes  # what was read of the client, from this request on
    call: C | None
    file: IO[bytes] | None  # where a large request is, instead of `data` and `call`
    ticket: int  # 0: a new one
    since: float  # when it came
    until: float  # when its time is over; infinity: never
    is_movable: bool  # another worker may run it as well


class Admission(Generic[C]):
    """One worker's. `wakeup` is the eventfd by which others say that there may be room.

    `waited` is told of each request that waits no longer: the reason (of `fields.REASONS`), and
    for how many nanoseconds. `can_pass_on` tells whether there is a worker to hand one to.
    """

    def __init__(
        self,
        gate: Gate,
        wakeup: int,
        waited: Callable[[str, int], None],
        can_pass_on: Callable[[], bool],
    ) -> None:
        self.gate = gate
        self.wakeup = wakeup
        self._can_pass_on = can_pass_on
        self._waited = waited
        self._lock = threading.Lock()  # over all that follows
        self._requests: dict[int, WaitingRequest[C]] = {}  # by their tickets
        self.tickets: list[int] = []  # of the requests that wait, the oldest first
        self._taken_up = 0  # the ticket of the one that a thread tries to run
        self._next_try = 0.0  # CLOCK_MONOTONIC seconds
        self._next_late = math.inf  # no request's time is over before that, the same
        self._waits_for = WAITS_FOR_TURN  # what the first one waits for, as far as is known
        self._exiting = False
        self._hangups = select.epoll()
        self._by_descriptor: dict[int, int] = {}  # of their sockets -> the tickets
        self.descriptor = self._hangups.fileno()  # readable when a client has hung up

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self.tickets)

    @property
    def reason(self) -> str | None:
        """What the requests wait for: one of `fields.REASONS`; None: not known yet."""
        return REASON_OF.get(self._waits_for)

    def retry_after(self, waits_for: int) -> float:
        """In how many seconds another try is worth while."""
        return self.gate.retry_after(waits_for)

    # -- called in the threads that serve clients --

    def admit(self, ticket: int) -> int:
        """As `Gate.admit`, for a request that has waited."""
        with self._lock:
            if ticket not in self._requests:
                return WAITS_FOR_TURN  # it has waited in another worker, and keeps its place
            code = self.gate.admit(ticket, self._first_after(ticket))
            if code == ADMITTED:
                self._has_waited(ticket)
                self._remove(ticket)
            else:
                self._must_wait(code)
        if code == ADMITTED and self.tickets:
            wake(self.wakeup)
        return code

    def add(self, request: WaitingRequest[C], waits_for: int) -> None:
        """Let a request wait. From now on its client is the leading thread's."""
        with self._lock:
            ticket = request.ticket
            request.client.waits = True
            if ticket not in self._requests:
                ticket = request.ticket = self.gate.enqueue(waits_for, ticket)
                insort(self.tickets, ticket)
                if self.tickets[0] == ticket:
                    self._waits_for = waits_for
                    self._next_try = 0.0  # room that came before it was enqueued has woken nobody
            elif ticket == self._taken_up:
                self._taken_up = 0
            self._requests[ticket] = request
            self._next_late = min(self._next_late, request.until)
            self._watch(request)
        wake(self.wakeup)

    def ended(self, ticket: int) -> None:
        """The thread that has taken a request up is done with it, whatever has become of it."""
        with self._lock:
            if ticket != self._taken_up:
                return  # admitted, or it waits again
            self.gate.dequeue(self._first_after(ticket))
            self._remove(ticket)
        if self.tickets:
            wake(self.wakeup)

    # -- called in the leading thread --

    def try_now(self) -> None:
        """There may be room by now."""
        with self._lock:  # else a thread that has found none a moment ago would put it off
            self._next_try = 0.0

    def seconds(self) -> float | None:
        """Until `next` is to be called again; None: when `descriptor` or the wake-up says so."""
        if not self.tickets:
            return None
        with self._lock:
            due = self._next_late
            if not self._taken_up:
                due = min(due, self._next_try)
        if due == math.inf:
            return None
        left = max(0.0, due - time.monotonic())
        # epoll_wait(2) may be late by a thousandth of what it is asked for: so it is asked twice.
        return left * 0.998 if left > 0.01 else left

    def next(self) -> WaitingRequest[C] | None:
        """The next one to try to run, or to be told that it is late. Its client is the caller's."""
        if not self.tickets:
            return None
        now = time.monotonic()
        with self._lock:
            request = self._next_late_one(now) or self._next_in_turn(now)
            if request is not None:
                self._unwatch(request)
                request.client.waits = False
        return request

    def next_hung_up(self) -> ClientSocket | None:
        """A client that has hung up; its request waits no longer."""
        with self._lock:
            for descriptor, _ in self._hangups.poll(0, 1):
                request = self._requests[self._by_descriptor[descriptor]]
                self._leave(request.ticket)
                request.client.waits = False
                return request.client
        return None

    def _next_late_one(self, now: float) -> WaitingRequest[C] | None:
        if now < self._next_late:
            return None
        waiting = [each for each in self._requests.values() if each.ticket != self._taken_up]
        late = next((each for each in waiting if each.until <= now), None)
        if late is None:
            self._next_late = min((each.until for each in waiting), default=math.inf)
            return None
        self._leave(late.ticket)
        return late

    def _next_in_turn(self, now: float) -> WaitingRequest[C] | None:
        if self._taken_up or now < self._next_try or not self.tickets:
            return None
        first = self._requests[self.tickets[0]]
        code = self.gate.look(first.ticket)
        if code == ADMITTED:
            return self._take_up(first)
        self._must_wait(code)
        if (self._exiting or code == WAITS_FOR_THREAD) and self._can_pass_on():
            for ticket in self.tickets:
                if self._requests[ticket].is_movable:
                    return self._take_up(self._requests[ticket])
        return None

    def _take_up(self, request: WaitingRequest[C]) -> WaitingRequest[C]:
        self._taken_up = request.ticket
        return request

    # -- called in the main thread --

    def exits(self) -> None:
        """The worker exits: others are to run what waits here."""
        self._exiting = True
        wake(self.wakeup)

    def pop_all(self) -> list[ClientSocket]:
        """The clients whose requests wait; they do no longer. Called when no thread leads."""
        with self._lock:
            clients = [self._requests[t].client for t in self.tickets if t != self._taken_up]
            for ticket in [each for each in self.tickets if each != self._taken_up]:
                self._leave(ticket)
            return clients

    # -- called under the lock --

    def _must_wait(self, waits_for: int) -> None:
        if waits_for != WAITS_FOR_TURN:
            self._waits_for = waits_for
        self._next_try = time.monotonic() + self.gate.retry_after(waits_for)

    def _first_after(self, ticket: int) -> int:
        """The oldest ticket besides this one; 0: there is none."""
        return next((each for each in self.tickets[:2] if each != ticket), 0)

    def _leave(self, ticket: int) -> None:
        """A request waits no longer, and was not admitted."""
        self.gate.dequeue(self._first_after(ticket))
        self._has_waited(ticket)
        self._remove(ticket)

    def _has_waited(self, ticket: int) -> None:
        if self.reason is not None:
            seconds = time.monotonic() - self._requests[ticket].since
            self._waited(self.reason, int(seconds * 1e9))

    def _remove(self, ticket: int) -> None:
        request = self._requests.pop(ticket)
        self.tickets.remove(ticket)
        self._unwatch(request)
        if self._taken_up == ticket:
            self._taken_up = 0
        self._next_try = 0.0

    def _watch(self, request: WaitingRequest[C]) -> None:
        descriptor = request.client.descriptor
        # No memory for it: then its end is seen when its turn comes.
        with contextlib.suppress(OSError):
            self._hangups.register(descriptor, 0)  # a hang-up is told unasked
            self._by_descriptor[descriptor] = request.ticket

    def _unwatch(self, request: WaitingRequest[C]) -> None:
        descriptor = request.client.descriptor
        if self._by_descriptor.pop(descriptor, None) is not None:
            with contextlib.suppress(OSError):  # a module has closed it
                self._hangups.unregister(descriptor)
