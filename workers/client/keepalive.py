"""Keep-alive connections between two requests.

No thread waits for an idle connection. They are all in one epoll, and the leader takes those that
become readable. So a keep-alive connection costs a descriptor and some memory, however long it is
idle, and one thread serves the quick calls of all of them in turn, without a thread switch.

One thread at a time owns a connection: the one that takes it out of the idle ones. Its descriptor
stays in the epoll while it is served, which saves a system call for each request. If it becomes
readable meanwhile, it is taken out of the epoll until it is idle again.
"""

import contextlib
import select
from collections import deque

from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket

MOST_AT_ONCE = 16  # are taken by one poll, before the leader checks its other sources of clients


class KeepAlive:
    """A worker's idle connections. `descriptor` is readable when one of them is."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._events = syscalls.ReadySet(self._epoll, MOST_AT_ONCE)
        self._idle: dict[int, ClientSocket] = {}
        self._unwatched: set[int] = set()  # readable while a thread serves them
        # No longer idle, and not served yet. The leader takes them out.
        self.ready: deque[ClientSocket] = deque()
        self.descriptor = self._epoll.fileno()

    def add(self, client: ClientSocket) -> None:
        """Make a connection idle. The thread that takes it out of `ready` is its next owner.

        Called in the thread that has served it. Raises OSError when the kernel has no memory for
        another entry; then the caller still owns the connection.
        """
        descriptor = client.descriptor
        self._idle[descriptor] = client
        if client.in_keep_alive and descriptor not in self._unwatched:
            return
        client.in_keep_alive = True
        try:
            self._watch(descriptor)
        except OSError:
            if self._idle.pop(descriptor, None) is not None:
                raise
            # `pop_any` has passed it to another thread, which may have closed it.

    def _watch(self, descriptor: int) -> None:
        self._unwatched.discard(descriptor)
        try:
            syscalls.watch(self.descriptor, descriptor)
        except FileExistsError:
            pass  # `_stop_watching` is about to remove it, and checks again after that
        except OSError:
            self._unwatched.add(descriptor)
            raise

    def poll(self) -> None:
        """Move connections that have sent something, or have ended, to `ready`.

        Called in the leader.
        """
        for descriptor in self._events.poll():
            if not self._make_ready(descriptor):
                self._stop_watching(descriptor)

    def _make_ready(self, descriptor: int) -> bool:
        """Move a connection to `ready`; False when it was not idle."""
        client = self._idle.pop(descriptor, None)
        if client is not None:
            self.ready.append(client)
        return client is not None

    def _stop_watching(self, descriptor: int) -> None:
        """A thread serves it: take it out of the epoll, which would report it on every poll."""
        self._unwatched.add(descriptor)
        with contextlib.suppress(OSError):  # it is closed by now
            syscalls.unwatch(self.descriptor, descriptor)
        # A thread that found it watched may have made it idle just now.
        if descriptor in self._idle:
            try:
                self._watch(descriptor)
            except OSError:
                self._make_ready(descriptor)

    def pop_any(self) -> ClientSocket | None:
        """An idle connection, whether it has sent something or not; None when there is none.

        Called in the main thread, when there is no leader any more.
        """
        if self.ready:
            return self.ready.popleft()
        with contextlib.suppress(KeyError):
            return self._idle.popitem()[1]
        return None

    def forget(self, client: ClientSocket) -> None:
        """Stop watching a connection that is about to be closed, or was handed to another worker.

        Called before its descriptor is closed. An epoll entry lasts as long as any process has the
        socket open, so the kernel would report it for ever, and only the descriptor can remove it.
        """
        if client.in_keep_alive:
            client.in_keep_alive = False
            with contextlib.suppress(OSError):
                syscalls.unwatch(self.descriptor, client.descriptor)
