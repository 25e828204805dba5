"""Clients that have their connection's room already, and something to be served.

Those whose requests have waited, those that another worker hands over, those that another worker
has not taken and that are returned, and those that have kept their connection and send the next
request. They are served also by a worker that exits and accepts no others.
"""

import contextlib
import logging
import os
import select
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from cpanbridge.supervisor.wording import explain
from cpanbridge.workers.accept.admission import Admission
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.spool import unspool
from cpanbridge.workers.client.transfer import MovingClient
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.outgoing import Outgoing

LOGGER = logging.getLogger("cpanbridge.worker")

C = TypeVar("C")
# Turns the first bytes of a client into a call that can run at once, or None. If another worker
# has read them: when they arrived there (CLOCK_MONOTONIC seconds), and the ticket with which the
# request has waited there (0: it has not).
Prepare = Callable[[bytes, float | None, int], C | None]


class Arrival(msgspec.Struct, Generic[C]):
    """A client that a thread is to serve; its connection has room."""

    descriptor: int  # a blocking socket's
    number: int  # counts the clients of this worker's slot
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the first request in `data`, if it is all there; not admitted yet
    moving: MovingClient | None = None  # what another worker says of the client that it hands over
    client: ClientSocket | None = None  # of a client that was here before
    ticket: int = 0  # of a request that has waited: `Admission.ended` must follow


class ReadyClients(Generic[C]):
    """Called by the leading thread, but for what says otherwise."""

    def __init__(
        self,
        incoming: Incoming,
        outgoing: Outgoing,
        keep_alive: KeepAlive,
        admission: Admission[C],
        prepare: Prepare[C],
    ) -> None:
        self._incoming = incoming
        self.handoffs = outgoing
        self._keep_alive = keep_alive
        self._admission = admission
        self._room = admission.wakeup
        self._prepare = prepare
        self._receiver = syscalls.Receiver()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll = select.epoll()  # readable when there is one, or after `wake`
        watched = (
            *(self._wakeup, self._room, admission.descriptor),
            *(incoming.descriptor, outgoing.descriptor, keep_alive.descriptor),
        )
        for descriptor in watched:
            self.epoll.register(descriptor, select.EPOLLIN)
        self.was_woken = False  # and the acceptor has not tried to accept since
        self._ready = syscalls.ReadySet(self.epoll, len(watched))
        self._waiting_first = True

    @property
    def pending(self) -> bool:
        """Whether there is one that no descriptor tells of any more."""
        return bool(self._keep_alive.ready or self._incoming.waiting)

    def wake(self) -> None:
        """Have the leading thread check everything. Called in any thread."""
        os.eventfd_write(self._wakeup, 1)

    def seconds(self, most: float | None = None) -> float | None:
        """For how long the leading thread may wait for `epoll`, at most `most`; None: for ever."""
        seconds = self._admission.seconds()
        return most if seconds is None else seconds if most is None else min(seconds, most)

    def wait(self, most: float | None = None) -> None:
        """Wait until `epoll` is readable, or something is due."""
        self.epoll.poll(self.seconds(most))

    def next(self) -> Arrival[C] | None:
        """The next one, each kind in its turn. Raises OSError when no descriptor is left."""
        if self._admission.tickets:
            # Not each time: with room for all, those that come would wait for all that waited.
            self._waiting_first = not self._waiting_first
            if self._waiting_first and (arrival := self._next_waiting()) is not None:
                return arrival
        if self._keep_alive.ready and (arrival := self._next_awake()) is not None:
            return arrival
        ready = self._ready.poll()
        if not ready and not self._incoming.waiting:
            return self._next_waiting() if self._admission.tickets else None
        arrival = None
        for wakeup in (self._wakeup, self._room):
            if wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(wakeup)
                self.was_woken = True
        if self._room in ready:
            self._admission.try_now()
        if self._admission.descriptor in ready:
            client = self._admission.next_hung_up()
            if client is not None:
                return Arrival(client.descriptor, 0, b"", None, client=client)
        if self._keep_alive.descriptor in ready:
            self._keep_alive.poll()
        if self.handoffs.descriptor in ready and (arrival := self._next_returned()) is not None:
            return arrival
        if self._incoming.waiting or self._incoming.descriptor in ready:
            arrival = self._next_handed_over()
        return arrival or self._next_awake() or self._next_waiting()

    def _next_waiting(self) -> Arrival[C] | None:
        """A request that has waited, and may have room or is late."""
        found = self._admission.next()
        if found is None:
            return None
        client, data, call = found.client, found.data, found.call
        if found.file is not None:
            try:
                data = unspool(found.file)
            except OSError as error:
                LOGGER.error("A request that waited is lost: %s", explain(error))
            call = self._prepare(data, found.since, found.ticket)
        return Arrival(client.descriptor, 0, data, call, client=client, ticket=found.ticket)

    def _next_awake(self) -> Arrival[C] | None:
        """A kept connection on which something was sent, or that has ended."""
        awake = self._keep_alive.ready
        while awake:
            client = awake.popleft()
            try:
                data = self._receiver.receive(client.descriptor)
            except BlockingIOError:
                try:
                    self._keep_alive.add(client)  # nothing was sent after all
                    continue
                except OSError:
                    data = b""
            except OSError:
                data = b""
            return Arrival(client.descriptor, 0, data, self._prepare(data, None, 0), client=client)
        return None

    def _next_returned(self) -> Arrival[C] | None:
        """A client that the worker with its state has not taken."""
        if (client := self.handoffs.next_returned()) is None:
            return None
        assert client.transfer is not None
        moving = client.transfer.moving
        call = self._prepare(moving.data, moving.arrived, moving.ticket)
        return Arrival(client.descriptor, 0, moving.data, call, client=client)

    def _next_handed_over(self) -> Arrival[C] | None:
        """The next client that another worker hands over."""
        found = self._incoming.next()
        if found is None:
            return None
        moving, number = found
        call = self._prepare(moving.data, moving.arrived, moving.ticket)
        return Arrival(moving.descriptor, number, moving.data, call, moving)
