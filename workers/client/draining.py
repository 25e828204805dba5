"""Ending connections from the daemon's side: stale and idle timeouts, and draining.

A worker ends the input of a client socket (`ClientSocket.end_input`), and its client can send no
further request. A thread that waits for the client wakes. An idle connection becomes readable, and
the leader takes it up and tells its client. A client on its way to another worker is left alone:
either it belongs to that worker by now, or it is returned and told then.

A worker drains when another one takes its slot over. Its keep-alive connections then stay as long
as their client has a session here. When the daemon ends, or the worker's time to exit is over, no
connection takes up a further request.
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
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        # Readable when kept connections without a session take up no further request.
        self.drains = os.eventfd(0, flags)
        # Readable when no connection takes up a further request.
        self.stops = os.eventfd(0, flags)
        # Readable when the last framed connection of a worker that drains has ended.
        self.none_kept = os.eventfd(0, flags)

    # -- the connections --

    @property
    def kept(self) -> int:
        """How many keep-alive connections there are, idle or not."""
        return len(self._framed)

    def add_framed(self, client: ClientSocket) -> None:
        """Add a keep-alive connection, until `remove`."""
        with self._lock:
            client.framed = True
            self._framed.add(client)
            # A client that was handed over has its call here; whether it stays is decided after it.
            if self.stopping or (self.exiting and not client.taken_over):
                client.end_input()

    def remove(self, client: ClientSocket) -> None:
        """Remove a connection that ends, or was taken by another worker."""
        with self._lock:
            self._framed.discard(client)
            if self.exiting and not self._framed:
                os.eventfd_write(self.none_kept, 1)

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
    def paused(self, client: ClientSocket) -> Iterator[bool]:
        """Hold the lock, so that no input is ended while a client is prepared for a hand-off.

        Yields whether that may be: its input has not ended, and the worker does not drain.
        """
        with self._lock:
            yield not (self.exiting or client.input_ended)

    def stays(self, client: ClientSocket) -> bool:
        """Whether a keep-alive connection goes on in a worker that drains."""
        return not self.stopping and self._has_session(client)

    # -- ending their input; called in the main thread --

    def drain(self) -> None:
        """End keep-alive connections after what they run; serve one-shot clients to their end.

        For a worker whose slot another one takes over. Called again when sessions have ended.
        """
        with self._lock:
            self.exiting = True
            for client in self._framed:
                if client.transfer is None and not self.stays(client):
                    client.end_input()
        os.eventfd_write(self.drains, 1)  # at last: a thread that it wakes must find why

    def stop(self, *, daemon_ends: bool) -> None:
        """No connection takes up a further request.

        For a daemon that ends, or a worker whose time to exit is over.
        """
        with self._lock:
            self.exiting = self.stopping = True
            self.daemon_ends = daemon_ends
            for client in self._framed | self._one_shot:
                if client.transfer is None:
                    client.end_input()
        os.eventfd_write(self.drains, 1)
        os.eventfd_write(self.stops, 1)

    def close_stale(self) -> None:
        """End connections whose clients have been silent for `stale_timeout`."""
        with self._lock:
            clients = self._framed | self._one_shot
        now, limit = time.monotonic_ns(), self._limits.stale_timeout * 1e9
        for client in clients:
            with self._lock:
                quiet_since = client.quiet_since  # read once: its thread may reset it at any time
                if quiet_since and now - quiet_since > limit and client.transfer is None:
                    client.end_input(stale=True)

    def close_idle(self) -> float:
        """End connections that have been idle for `idle_timeout`.

        Returns in how many seconds to call it again; called sooner, it costs little.
        """
        now, limit = time.monotonic(), self._limits.idle_timeout
        if now >= self._next_idle:
            self._next_idle = now + limit  # a connection that becomes idle now is due then
            with self._lock:
                idle = [each for each in self._framed if each.idle and not each.input_ended]
            for client in idle:
                with self._lock:
                    quiet_since = client.quiet_since  # read once, as above
                    ends = quiet_since / 1e9 + limit
                    is_due = ends <= now and quiet_since and client.idle and client.transfer is None
                    if is_due:
                        client.end_input()
                if quiet_since and not is_due:
                    self._next_idle = min(self._next_idle, ends)
        return self._next_idle - now
