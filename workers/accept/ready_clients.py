"""Clients that have their connection's room already, and something to be served.

Those that another worker hands over, those that another worker has not taken and that are returned,
and those that have kept their connection and send the next request. They need no further room, so
they are served also while the gate has none, and by a worker that exits and accepts no others.
"""

import contextlib
import os
import select
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.keepalive import KeepAlive
from cpanbridge.workers.client.transfer import MovingClient
from cpanbridge.workers.handoff.incoming import Incoming
from cpanbridge.workers.handoff.outgoing import Outgoing

C = TypeVar("C")
# Turns the first bytes of a client into a call that can run at once, or None; the second argument
# is when they arrived, CLOCK_MONOTONIC seconds, if that was in another worker.
Prepare = Callable[[bytes, float | None], C | None]


class Arrival(msgspec.Struct, Generic[C]):
    """A client that a thread is to serve; its connection has room."""

    descriptor: int  # a blocking socket's
    number: int  # counts the clients of this worker's slot
    data: bytes | None  # what was there to read; None: nothing yet; empty: end of file
    call: C | None  # the first request in `data`, if it is all there; not admitted yet
    moving: MovingClient | None = None  # what another worker says of the client that it hands over
    client: ClientSocket | None = None  # of a client that was here before


class ReadyClients(Generic[C]):
    """Called by the leading thread, but for what says otherwise."""

    def __init__(
        self, incoming: Incoming, outgoing: Outgoing, keep_alive: KeepAlive, prepare: Prepare[C]
    ) -> None:
        self._incoming = incoming
        self.handoffs = outgoing
        self._keep_alive = keep_alive
        self._prepare = prepare
        self._receiver = syscalls.Receiver()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll = select.epoll()  # readable when there is one, or after `wake`
        watched = (
            *(self._wakeup, incoming.descriptor, outgoing.descriptor, keep_alive.descriptor),
        )
        for descriptor in watched:
            self.epoll.register(descriptor, select.EPOLLIN)
        self.was_woken = False  # and the acceptor has not tried to accept since
        self._ready = syscalls.ReadySet(self.epoll, len(watched))

    @property
    def pending(self) -> bool:
        """Whether there is one that no descriptor tells of any more."""
        return bool(self._keep_alive.ready or self._incoming.waiting)

    def wake(self) -> None:
        """Have the leading thread check everything. Called in any thread."""
        os.eventfd_write(self._wakeup, 1)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until `epoll` is readable."""
        self.epoll.poll(seconds)

    def next(self) -> Arrival[C] | None:
        """The next one, each kind in its turn. Raises OSError when no descriptor is left."""
        if (arrival := self._next_awake()) is not None:
            return arrival
        ready = self._ready.poll()
        if self._wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            self.was_woken = True
        if self._keep_alive.descriptor in ready:
            self._keep_alive.poll()
        if self.handoffs.descriptor in ready and (arrival := self._next_returned()) is not None:
            return arrival
        if self._incoming.waiting or self._incoming.descriptor in ready:
            arrival = self._next_handed_over()
        return arrival or self._next_awake()

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
            return Arrival(client.descriptor, 0, data, self._prepare(data, None), client=client)
        return None

    def _next_returned(self) -> Arrival[C] | None:
        """A client that the worker with its state has not taken."""
        if (client := self.handoffs.next_returned()) is None:
            return None
        assert client.transfer is not None
        moving = client.transfer.moving
        call = self._prepare(moving.data, moving.arrived)
        return Arrival(client.descriptor, 0, moving.data, call, client=client)

    def _next_handed_over(self) -> Arrival[C] | None:
        """The next client that another worker hands over."""
        found = self._incoming.next()
        if found is None:
            return None
        moving, number = found
        call = self._prepare(moving.data, moving.arrived)
        return Arrival(moving.descriptor, number, moving.data, call, moving)
