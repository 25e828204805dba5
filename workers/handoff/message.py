"""Handing a client over: its socket, and all that was read of it, go to another worker.

The message goes into the other worker's queue, with the client's socket (SCM_RIGHTS) and the name
of a claim (`supervisor/memory/handoff_claims.py`). The sender answers for the client until it is
taken:

- Taken: the receiver says so in the claim. From then on the client is its own.
- Refused: the receiver has no descriptor left for the client.
- Withdrawn: the sender takes the claim back, because the client does not wait any longer, or
  because the receiver has ended. The first of them decides, so a call never runs twice.

A worker takes messages out of its own queue alone, and each that it has taken out ends in a claim
that is decided: taken, refused, or the sender's again because this worker has ended.

A client is counted by the receiver before it is taken, and by the sender until it has seen that it
is: see `Gate.take_handed_off`. Its socket is open in both for a moment, so the receiver shuts it
down when it has replied, and the client sees its end at once.

What was read goes along in the message, or in a memfd of its own when it is large. Here is the
message; `outgoing.py` is the sender's side, `incoming.py` the receiver's.
"""

import array
import os
import socket
import struct
from typing import NamedTuple

from cpanbridge.supervisor.memory.handoff_claims import Claim
from cpanbridge.supervisor.memory.handoff_sockets import MOST_DESCRIPTORS, descriptors_in
from cpanbridge.workers.client.transfer import MovingClient

# A message must be smaller than the least buffer that a system gives a socket.
MOST_INLINE = 16384
# The receiver's incarnation, the sender's slot and claim, when the client was accepted, its
# requests so far, when this one arrived, its ticket, and the flags below.
HEADER = struct.Struct("=qqqqqqdqB")
IN_MEMORY = 1  # what was read is in a memfd
INPUT_ENDED = 2  # perhaps: see MovingClient
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_SPACE = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)


class RawMessage(NamedTuple):
    """A message as it was taken out of a queue."""

    descriptors: list[int]
    complete: bool  # False: there were not enough descriptors left for it
    incarnation: int  # of the worker that it is meant for
    sender: int  # its slot
    claim: Claim
    history: tuple[int, int, float, int]  # see HEADER
    flags: int
    data: bytes  # what was read of the client, if it is not in a memfd

    def close(self) -> None:
        """Close what came with it."""
        while self.descriptors:
            os.close(self.descriptors.pop())


class HandoffMessage(NamedTuple):
    """A client that was taken out of a queue, and is its sender's still: see incoming.py."""

    moving: MovingClient
    sender: int  # its slot
    claim: Claim


def post(queue: socket.socket, message: list[bytes], *descriptors: int) -> None:
    """Put a message into a queue. Raises OSError when there is no room."""
    rights = array.array("i", descriptors)
    queue.sendmsg(message, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)


def receive(queue: socket.socket) -> RawMessage | None:
    """Take a message out of a queue; None when there is none. Raises OSError, and none is gone."""
    try:
        data, ancillary, told, _ = queue.recvmsg(HEADER.size + MOST_INLINE, _SPACE, _RECEIVE_FLAGS)
    except BlockingIOError:
        return None
    descriptors = descriptors_in(ancillary)
    incarnation, sender, position, number, accepted_at, requests, arrived, ticket, flags = (
        HEADER.unpack_from(data)
    )
    expected = 2 if flags & IN_MEMORY else 1
    return RawMessage(
        descriptors,
        complete=len(descriptors) == expected and not told & socket.MSG_CTRUNC,
        incarnation=incarnation,
        sender=sender,
        claim=Claim(position, number),
        history=(accepted_at, requests, arrived, ticket),
        flags=flags,
        data=data[HEADER.size :],
    )


def in_memory(data: bytes) -> int:
    """A memfd that holds the data. Raises OSError."""
    descriptor = os.memfd_create("cpanbridged-request", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def from_memory(descriptor: int) -> bytes:
    """What a memfd holds. Raises OSError."""
    size = os.fstat(descriptor).st_size
    data = b""
    while piece := os.pread(descriptor, size, len(data)):
        data += piece
    return data
