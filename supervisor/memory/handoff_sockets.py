"""Each worker's postbox: where other workers put a client that this one has the state of.

A postbox is a pair of sockets, made by the master for every slot before it forks, so that any
worker reaches any other. One message is one client. What a message is, and who answers for a client
that is on its way, stands in `workers/handover.py`; here is only what the master has to do with it:
make it, and empty it when its worker has ended. It does not look at what it throws away.
"""

import array
import contextlib
import os
import socket

_BUFFER = 1 << 20  # bytes of messages on their way; the system may allow less
MOST_DESCRIPTORS = 2  # in a message


def hang() -> tuple[int, int]:
    """A postbox's two descriptors: to put in, to take out. Raises OSError when there are none."""
    # Messages as a whole, as with datagrams, but without the system's limit on their number.
    put, take = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    put.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return put.detach(), take.detach()


def opened(descriptor: int) -> socket.socket:
    """One end of a postbox as a socket, to be detached, never closed: others use it as well."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)


def throw_away(take: int) -> None:
    """Empty a postbox whose worker has ended.

    Who has put a client in sees that it was not taken, and goes on with it. May be called in any
    process, at any time: a client that is thrown away is put in again.
    """
    queue = opened(take)
    try:
        space = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        with contextlib.suppress(BlockingIOError):
            while True:
                _, ancillary, _, _ = queue.recvmsg(1, space, flags)
                for descriptor in descriptors_in(ancillary):
                    os.close(descriptor)
    finally:
        queue.detach()


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message."""
    received = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return list(received)
