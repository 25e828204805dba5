"""Each worker's hand-off queue: where other workers put a client whose state this one has.

A queue is a pair of sockets, made by the master for every slot before it forks, so that any worker
reaches any other. One message is one client. The message, and who answers for a client on its way,
are described in `workers/handoff/message.py`. Here is only what the master does with a queue: it
makes it, and empties it while its slot has no worker, without reading what it discards.
"""

import array
import contextlib
import os
import socket

_BUFFER = 1 << 20  # bytes of messages on their way; the system may allow less
MOST_DESCRIPTORS = 2  # in a message


def create() -> tuple[int, int]:
    """A queue's two descriptors: to put in, to take out. Raises OSError when there are none."""
    # Whole messages, as with datagrams, but without the system's limit on their number.
    put, take = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    put.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return put.detach(), take.detach()


def end_of(descriptor: int) -> socket.socket:
    """One end of a queue as a socket, to be detached, never closed: others use it as well."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)


def discard_all(take: int) -> None:
    """Empty the queue of a slot that has no worker.

    Each message in it is for a worker that has ended: whoever put a client in sees that, and goes
    on with it. Called in the master, which alone could start the next worker there.
    """
    queue = end_of(take)
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
