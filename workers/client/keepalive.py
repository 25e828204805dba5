"""Connections that their clients keep, between two requests.

No thread waits for them: they rest in one epoll, and the thread at the door takes up those that
send something. So a kept connection costs a descriptor and some memory, however long it rests, and
one thread serves the quick calls of all of them in turn, without a change of threads.

A connection is in one pair of hands at a time: it belongs to whoever takes it out of those that
rest. The epoll goes on watching it, which spares a system call for each request. One that has
something while a thread has it is watched no longer, until it is put to rest again.
"""

import contextlib
import select
from collections import deque

from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket

MOST_AT_ONCE = 16  # taken up in one go, before somebody looks who waits elsewhere


class KeepAlive:
    """A worker's connections at rest. `descriptor` is readable when one of them has something."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready = syscalls.ReadySet(self._epoll, MOST_AT_ONCE)
        self._resting: dict[int, ClientSocket] = {}
        self._unwatched: set[int] = set()  # in the hands of a thread, and have something
        self.awake: deque[ClientSocket] = deque()  # told of, and not taken up yet
        self.descriptor = self._epoll.fileno()

    def rest(self, client: ClientSocket) -> None:
        """Put a connection to rest; from then on it is of whoever takes it out of `awake`.

        Called in the thread that has served it. Raises OSError when there is no memory for it; it
        is the caller's still.
        """
        descriptor = client.descriptor
        self._resting[descriptor] = client
        if client.rested and descriptor not in self._unwatched:
            return
        client.rested = True
        try:
            self._watch(descriptor)
        except OSError:
            if self._resting.pop(descriptor, None) is not None:
                raise
            # `wake_any` has given it to somebody already, who may have closed it.

    def _watch(self, descriptor: int) -> None:
        self._unwatched.discard(descriptor)
        try:
            syscalls.watch(self.descriptor, descriptor)
        except FileExistsError:
            pass  # `_leave_alone` is about to come, and looks again after that
        except OSError:
            self._unwatched.add(descriptor)
            raise

    def look(self) -> None:
        """See which have sent something, or have ended: they rest no longer, and are `awake`.

        Called by the thread at the door.
        """
        for descriptor in self._ready.look():
            if not self._wake(descriptor):
                self._leave_alone(descriptor)

    def _wake(self, descriptor: int) -> bool:
        """Whether it has rested."""
        client = self._resting.pop(descriptor, None)
        if client is not None:
            self.awake.append(client)
        return client is not None

    def _leave_alone(self, descriptor: int) -> None:
        """A thread has it, so there is no use in being told of it again and again."""
        self._unwatched.add(descriptor)
        with contextlib.suppress(OSError):  # it is closed by now
            syscalls.unwatch(self.descriptor, descriptor)
        # It may have been put to rest just now, by a thread that took it to be watched.
        if descriptor in self._resting:
            try:
                self._watch(descriptor)
            except OSError:
                self._wake(descriptor)

    def wake_any(self) -> ClientSocket | None:
        """One that rests, whether it has sent something or not; None when there is none.

        Called when nobody is at the door any more.
        """
        if self.awake:
            return self.awake.popleft()
        with contextlib.suppress(KeyError):
            return self._resting.popitem()[1]
        return None

    def forget(self, client: ClientSocket) -> None:
        """Watch a connection no longer that is closed here, or goes to another process.

        Before its descriptor is closed: as long as another process has the connection as well, the
        kernel would go on telling of it, and nothing could be done about that any more.
        """
        if client.rested:
            client.rested = False
            with contextlib.suppress(OSError):
                syscalls.unwatch(self.descriptor, client.descriptor)
