"""The sockets that workers are to accept clients from, for workers that run already.

A worker inherits the listening sockets. When the master has bound one anew, it puts all of them
into this box: one message in a socket, which workers look at and leave there. So a worker that is
forked later, from a template that has not heard of it, finds them as well, and so does a worker of
the next master. The number of messages so far stands in the shared memory, 0 at first.
"""

import array
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cpanbridge.supervisor.memory import handoff_sockets

MOST_SOCKETS = 253  # SCM_MAX_FD, see unix(7)


class ListenerBox(NamedTuple):
    """The descriptors of the box: to put in, to look at."""

    put: int
    look: int

    @classmethod
    def create(cls) -> "ListenerBox":
        """Raises OSError when the process is out of descriptors."""
        put, look = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return cls(put.detach(), look.detach())

    def replace(self, sockets: Sequence[socket.socket]) -> None:
        """Put these into the box, in place of what is there. Raises OSError.

        Called in the master, which then counts up `Header.listener_changes`.
        """
        descriptors = [each.fileno() for each in sockets]
        with _end(self.look) as look, contextlib.suppress(BlockingIOError):
            while True:
                look.recv(1, socket.MSG_DONTWAIT)
        with _end(self.put) as put:
            count = str(len(descriptors)).encode()
            socket.send_fds(put, [count], descriptors, socket.MSG_DONTWAIT)

    def sockets(self) -> list[socket.socket] | None:
        """What is in the box; None: nothing at this moment. Raises OSError.

        Called in a worker. They are this process's own copies, for the caller to close.
        """
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        space = socket.CMSG_SPACE(MOST_SOCKETS * array.array("i").itemsize)
        with _end(self.look) as look:
            try:
                data, ancillary, *_ = look.recvmsg(16, space, flags)
            except BlockingIOError:
                return None
        received = handoff_sockets.descriptors_in(ancillary)
        if len(received) != int(data):  # this process is out of descriptors
            for descriptor in received:
                os.close(descriptor)
            return None
        return [socket.socket(fileno=descriptor) for descriptor in received]


@contextlib.contextmanager
def _end(descriptor: int) -> Iterator[socket.socket]:
    """One end as a socket; others use the descriptor as well, so it is not closed."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=descriptor)
    try:
        yield end
    finally:
        end.detach()
