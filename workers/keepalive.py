"""Connections that their clients keep, between two requests.

No thread waits for them: they rest in one epoll, and the thread at the door takes up those that
send something. So a kept connection costs a descriptor and some memory, however long it rests, and
one thread serves the quick calls of all of them in turn, without a change of threads.

A connection is watched from its first rest to its end, and the kernel tells once of each time that
something comes (EPOLLET). So putting one to rest costs no system call. What is told of a connection
that does not rest just then, as a thread serves it, is noted for its next rest. Who takes it out of
those at rest has it, and nobody else.
"""

import contextlib
import select
from collections import deque

from cpanbridge.workers import brief
from cpanbridge.workers.peer import Peer

MOST_AT_ONCE = 16  # taken up in one go, before somebody looks who waits elsewhere

_EVENTS = select.EPOLLIN | select.EPOLLET


class KeepAlive:
    """A worker's connections at rest. `descriptor` is readable when one of them has something."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready = brief.ReadySet(self._epoll, MOST_AT_ONCE)
        self._resting: dict[int, Peer] = {}
        self._told: set[int] = set()  # of these, while they did not rest
        self.awake: deque[Peer] = deque()  # told of, and not taken up yet
        self.descriptor = self._epoll.fileno()

    def rest(self, peer: Peer, *, drained: bool) -> None:
        """Put a connection to rest; from then on it is of whoever takes it out of `awake`.

        `drained` says that the last read has left nothing: the kernel told of that before, and does
        not tell again. Called in the thread that has served it. Raises OSError when there is no
        memory for it; it is the caller's still.
        """
        descriptor = peer.socket.fileno()
        self._resting[descriptor] = peer
        # Looked at after it rests, as `look` looks once more after it has noted something.
        if peer.rested and drained and descriptor not in self._told:
            return
        self._told.discard(descriptor)
        try:
            if peer.rested:
                brief.rearm(self.descriptor, descriptor, _EVENTS)  # tells of what is there already
            else:
                peer.rested = True
                self._begin(descriptor)
        except OSError:
            if self._resting.pop(descriptor, None) is None:
                return  # it is somebody else's already
            peer.rested = False
            raise

    def _begin(self, descriptor: int) -> None:
        try:
            self._epoll.register(descriptor, _EVENTS)
        except FileExistsError:  # another process has it too, and it was here before
            self._epoll.modify(descriptor, _EVENTS)

    def look(self) -> None:
        """See which have sent something, or have ended: they rest no longer, and are `awake`.

        Called by the thread at the door.
        """
        for descriptor in self._ready.look():
            peer = self._resting.pop(descriptor, None)
            if peer is None:
                self._told.add(descriptor)
                peer = self._resting.pop(descriptor, None)  # put to rest just now
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
            self._told.discard(peer.socket.fileno())
            with contextlib.suppress(OSError):
                self._epoll.unregister(peer.socket.fileno())
