"""Keep-alive connections between two requests.

They are all in one epoll, and the leader takes those that become readable. So an idle connection
costs a descriptor and some memory, and one thread serves the quick calls of all of them in turn,
without a thread switch.

The thread that takes a connection out of the idle ones owns it. The epoll reports each once
(EPOLLONESHOT): a connection that a thread serves stays in it, and is not reported until it is idle
again.
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
        # No longer idle, and not served yet. The leader takes them out.
        self.ready: deque[ClientSocket] = deque()
        self.descriptor = self._epoll.fileno()

    def add(self, client: ClientSocket) -> None:
        """Make a connection idle. The thread that takes it out of `ready` is its next owner.

        Called in the thread that has served it. Raises OSError when the kernel has no memory for
        another entry; then the caller still owns the connection.
        """
        descriptor, again = client.descriptor, client.in_keep_alive
        client.in_keep_alive = True
        self._idle[descriptor] = client
        try:
            syscalls.watch_once(self.descriptor, descriptor, again=again)
        except OSError:
            if self._idle.pop(descriptor, None) is not None:
                client.in_keep_alive = again
                raise
            # `pop_any` has passed it to another thread, which may have closed it.

    def poll(self) -> None:
        """Move connections that have sent something or ended to `ready`. Called in the leader."""
        for descriptor in self._events.poll():
            client = self._idle.pop(descriptor, None)
            if client is not None:
                self.ready.append(client)

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
        """Stop watching a connection. Called before its descriptor is closed.

        An epoll entry lasts as long as any process has the socket open, so the kernel might report
        it later under a number that is another client's, and only the descriptor can remove it.
        """
        if client.in_keep_alive:
            with contextlib.suppress(OSError):  # a module has closed it
                syscalls.unwatch(self.descriptor, client.descriptor)
