"""Connections at rest: those that their clients keep, between two requests, and new ones that have
sent nothing yet.

No thread waits for them: they rest in one epoll, and the thread at the door takes up those that
send something. So a kept connection costs a descriptor and some memory, however long it rests, and
one thread serves the quick calls of all of them in turn, without a change of threads.

A connection is in one pair of hands at a time. It is watched for one event (EPOLLONESHOT) each time
that it is put to rest, and belongs to whoever is told of that event.
"""

import contextlib
import select
from collections import deque

from cpanbridge.workers import brief
from cpanbridge.workers.peer import Peer

MOST_AT_ONCE = 16  # taken up in one go, before somebody looks who waits elsewhere

_ONCE = select.EPOLLIN | select.EPOLLONESHOT


class KeepAlive:
    """A worker's connections at rest. `descriptor` is readable when one of them has something."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready = brief.ReadySet(self._epoll, MOST_AT_ONCE)
        self._resting: dict[int, Peer] = {}
        self.awake: deque[Peer] = deque()  # told of, and not taken up yet
        self.descriptor = self._epoll.fileno()

    def rest(self, peer: Peer) -> None:
        """Put a connection to rest; from then on it is of whoever takes it out of `awake`.

        Called in the thread that has served it. Raises OSError when there is no memory for it; it
        is the caller's still.
        """
        descriptor = peer.socket.fileno()
        self._resting[descriptor] = peer
        try:
            if peer.rested:
                brief.rearm(self.descriptor, descriptor, _ONCE)
            else:
                peer.rested = True
                self._begin(descriptor)
        except OSError:
            peer.rested = False
            self._resting.pop(descriptor, None)
            raise

    def _begin(self, descriptor: int) -> None:
        try:
            self._epoll.register(descriptor, _ONCE)
        except FileExistsError:  # another process has it too, and it was here before
            self._epoll.modify(descriptor, _ONCE)

    def look(self) -> None:
        """See which have sent something, or have ended: they rest no longer, and are `awake`.

        Called by the thread at the door.
        """
        for descriptor in self._ready.look():
            peer = self._resting.pop(descriptor, None)
            if peer is not None:
                self.awake.append(peer)

    def wake_any(self) -> Peer | None:
        """One that rests, whether it has sent something or not; None when there is none.

        Called when nobody is at the door any more.
        """
        if self.awake:
            return self.awake.popleft()
        with contextlib.suppress(KeyError):
            return self._resting.popitem()[1]
        return None

    def forget(self, peer: Peer) -> None:
        """A connection goes to another process: watch it no longer. Before it is closed here."""
        if peer.rested:
            peer.rested = False
            with contextlib.suppress(OSError):
                self._epoll.unregister(peer.socket.fileno())
