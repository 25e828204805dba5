"""Ending connections from the daemon's side: stale and idle timeouts, and draining.

A worker ends the input of a client socket, and its client can send no further request. A thread
that waits for the client wakes. An idle connection becomes readable, and the leader tells its
client. A client on its way to another worker is left alone: either it belongs to that worker by
now, or it is returned and told then.

A worker drains when another one takes its slot over. Its keep-alive connections then stay as long
as their client has a session here. When the daemon ends, or the worker's time to exit is over, none
takes up a further request.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from cpanbridge.supervisor.config import Limits
from cpanbridge.workers.client.client_socket import ClientSocket


class Draining(Exception):
    """The worker takes up no further request of this connection: it is about to exit."""


class ConnectionDrainer:
    """One worker's connections, as far as the daemon may have to end them.

    `has_session` tells whether a client has a session in this worker. Called from all threads, but
    for what says otherwise. The public fields are written in the main thread.
    """

    def __init__(self, limits: Limits, has_session: Callable[[ClientSocket], bool]) -> None:
        self._limits = limits
        self._has_session = has_session
        self.exiting = False  # the worker drains; true with `stopping` as well
        self.stopping = False  # no connection takes up a further request
        self.daemon_ends = False  # why it is stopping, if so
        self._framed: set[ClientSocket] = set()
        self._one_shot: set[ClientSocket] = set()  # those whose thread may wait for the client
        self._lock = threading.Lock()
        self._next_idle = 0.0  # no idle timeout is over before that, CLOCK_MONOTONIC seconds
        # Eventfds. They are readable when kept connections without a session take up no further
        # request; when no connection does; when a client has left a worker that drains.
        self.drains, self.stops, self.one_left = (
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)
        )

    @property
    def kept(self) -> int:
        """How many keep-alive connections there are, idle or not."""
        return len(self._framed)

    def add_framed(self, client: ClientSocket) -> None:
        with self._lock:
            client.framed = True
            self._framed.add(client)
            # A client that was handed over has its call here; whether it stays is decided after it.
            if self.stopping or (self.exiting and not client.taken_over):
                client.end_input()

    def remove(self, client: ClientSocket) -> None:
        with self._lock:
            self._framed.discard(client)

    def has_left(self) -> None:
        """A client has, and its connection's room is given back."""
        if self.exiting:
            os.eventfd_write(self.one_left, 1)

    @contextlib.contextmanager
    def waiting_for(self, client: ClientSocket) -> Iterator[None]:
        """While a thread may wait for this one-shot client, its input can be ended."""
        with self._lock:
            self._one_shot.add(client)
            if self.stopping:
                client.end_input()
        try:
            yield
        finally:
            with self._lock:
                self._one_shot.discard(client)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the lock, so that no input is ended while a client is prepared for a hand-off."""
        with self._lock:
            yield

    def stays(self, client: ClientSocket) -> bool:
        """Whether a connection goes on in a worker that drains."""
        return not self.stopping and (not client.framed or self._has_session(client))

    # -- ending their input; called in the main thread --

    def drain(self) -> None:
        """End keep-alive connections after what they run; serve one-shot clients to their end.

        For a worker that another one replaces. Called again when sessions have ended.
        """
        with self._lock:
            self.exiting = True
            for client in self._framed | self._one_shot:
                if client.transfer is None and not client.waits and not self.stays(client):
                    client.end_input()
        os.eventfd_write(self.drains, 1)  # last: a thread that it wakes must find why

    def stop(self, *, daemon_ends: bool) -> None:
        """No connection takes up a further request.

        For a daemon that ends, or a worker whose time to exit is over.
        """
        self.daemon_ends = daemon_ends  # first: a thread that finds `stopping` reads why
        self.stopping = True
        self.drain()
        os.eventfd_write(self.stops, 1)

    def close_stale(self) -> None:
        """End connections whose clients have been silent for `stale_timeout`."""
        self._end_silent(self._limits.stale_timeout, stale=True)

    def close_idle(self) -> float:
        """End connections that have been idle for `idle_timeout`.

        Returns in how many seconds to call it again; called sooner, it costs little.
        """
        now = time.monotonic()
        if now >= self._next_idle:
            self._next_idle = self._end_silent(self._limits.idle_timeout, stale=False)
        return self._next_idle - now

    def _end_silent(self, seconds: float, *, stale: bool) -> float:
        """End connections of clients that have been silent for so long: if not `stale`, idle ones.

        Returns when the next one is due, CLOCK_MONOTONIC seconds.
        """
        with self._lock:
            clients = self._framed | self._one_shot
        now = time.monotonic()
        next_due = now + seconds  # of a client that falls silent now
        for client in clients:
            with self._lock:
                quiet_since = client.quiet_since / 1e9  # read once: its thread may reset it anytime
                if not quiet_since or client.input_ended or not (stale or client.idle):
                    continue
                if quiet_since + seconds > now:
                    next_due = min(next_due, quiet_since + seconds)
                elif client.transfer is None:
                    client.end_input(stale=stale)
        return next_due
