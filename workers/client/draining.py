"""Whom a worker sends away, and when: clients that are silent for too long, and all when it leaves.

A client that is dismissed may not send anything further (Peer.dismiss): a thread that waits for it
wakes, and who is at rest is taken up by the door, to be told. One that is on its way to another
worker is not touched: it is that one's by now, or comes back and is told then.

A worker leaves because another one takes its place, and then kept connections stay as long as their
client has a session here; or because the daemon ends, or its own time is over, and then nothing
further is taken up of anybody.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from cpanbridge.supervisor.config import Limits
from cpanbridge.workers.client.client_socket import ClientSocket


class Draining(Exception):
    """The worker is about to leave and takes up no further request of this connection."""


class ConnectionDrainer:
    """Who is connected to one worker, as far as somebody may have to be sent away.

    `has_session` tells whether a client has a session here. Called from all threads, but for what
    says otherwise.
    """

    def __init__(self, limits: Limits, has_session: Callable[[ClientSocket], bool]) -> None:
        self._limits = limits
        self._has_session = has_session
        self.exiting = False
        self.stopping = False
        self.daemon_ends = False
        self._framed: set[ClientSocket] = set()
        self._one_shot: set[ClientSocket] = set()  # those whose thread may wait for the client
        self._lock = threading.Lock()
        self._next_idle = 0.0  # when one may have rested for long enough, CLOCK_MONOTONIC
        # Readable when the last framed connection of a worker that leaves has ended.
        self.none_kept = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # -- who is there --

    @property
    def kept(self) -> int:
        """How many connections are kept by their clients, at rest or not."""
        return len(self._framed)

    def keep(self, client: ClientSocket) -> None:
        """From now on, until `keep_no_longer`, the connection is kept by its client."""
        with self._lock:
            client.framed = True
            self._framed.add(client)
            # One that was handed over has its call here; whether it stays is seen after that.
            if self.stopping or (self.exiting and not client.taken_over):
                client.end_input()

    def keep_no_longer(self, client: ClientSocket) -> None:
        """It ends, or goes to another worker."""
        with self._lock:
            self._framed.discard(client)
            if self.exiting and not self._framed:
                os.eventfd_write(self.none_kept, 1)

    @contextlib.contextmanager
    def waiting_for(self, client: ClientSocket) -> Iterator[None]:
        """While a thread may wait for this one-shot client, it can be dismissed."""
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
    def held_off(self, client: ClientSocket) -> Iterator[bool]:
        """Nobody is dismissed during this; whether `peer` was not, and the worker does not leave.

        For whoever sends it on its way to another worker.
        """
        with self._lock:
            yield not (self.exiting or client.input_ended)

    def stays(self, client: ClientSocket) -> bool:
        """Whether a kept connection goes on in a worker that leaves."""
        return not self.stopping and self._has_session(client)

    # -- sending them away; called in the main thread --

    def leave(self) -> None:
        """Kept connections end after what they run; one-shot clients are served to their end.

        For a worker whose place another one takes. Called before `Stops.door` is written, and when
        sessions have ended.
        """
        with self._lock:
            self.exiting = True
            for client in self._framed:
                if client.transfer is None and not self.stays(client):
                    client.end_input()

    def stop(self, *, daemon_ends: bool) -> None:
        """No connection takes up a further request.

        For a daemon that ends, or a worker whose time to leave is over. Called before `Stops.all`
        is written.
        """
        with self._lock:
            self.exiting = self.stopping = True
            self.daemon_ends = daemon_ends
            for client in self._framed | self._one_shot:
                if client.transfer is None:
                    client.end_input()

    def close_stale(self) -> None:
        """Those whose clients have been silent for `stale_timeout`, now."""
        with self._lock:
            clients = self._framed | self._one_shot
        now, limit = time.monotonic_ns(), self._limits.stale_timeout * 1e9
        for client in clients:
            with self._lock:
                quiet_since = client.quiet_since  # read once: it may send something just now
                if quiet_since and now - quiet_since > limit and client.transfer is None:
                    client.end_input(stale=True)

    def close_idle(self) -> float:
        """Those that have rested for `idle_timeout`; returns in how many seconds to look again.

        Called then or sooner: it costs little when it is not time yet.
        """
        now, limit = time.monotonic(), self._limits.idle_timeout
        if now >= self._next_idle:
            self._next_idle = now + limit  # no other can be due before that
            with self._lock:
                resting = [each for each in self._framed if each.idle and not each.input_ended]
            for client in resting:
                with self._lock:
                    quiet_since = client.quiet_since  # read once: it may send something just now
                    ends = quiet_since / 1e9 + limit
                    is_due = ends <= now and quiet_since and client.idle and client.transfer is None
                    if is_due:
                        client.end_input()
                if quiet_since and not is_due:
                    self._next_idle = min(self._next_idle, ends)
        return self._next_idle - now
