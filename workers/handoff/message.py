"""Handing a client over: its socket, and all that was read of it, go to another worker.

The message goes into the other worker's queue, with the client's socket (SCM_RIGHTS) and the name
of a claim (`supervisor/memory/handoff_claims.py`). The sender answers for the client until it is
taken:

- Taken: the receiver says so in the claim. From then on the client is its own.
- Refused: the receiver has no descriptor left for the client.
- Withdrawn: the sender takes the claim back, because the client does not wait any longer, or
  because the receiver has ended. The first of them decides, so a call never runs twice.

A client is counted by the receiver before it is taken, and by the sender until it has seen that it
is: see `Gate.take_handed_off`. Its socket is open in both for a moment, so the receiver shuts it
down when it has replied, and the client sees its end at once.

What was read goes along in the message, or in a memfd of its own when it is large. Here is the
message; `outgoing.py` is the sender's side, `incoming.py` the receiver's.
"""

import array
import mmap
import os
import socket
import struct
from typing import NamedTuple

from cpanbridge.supervisor.memory.handoff_claims import Claim
from cpanbridge.workers.client.transfer import MovingClient

# A message must be smaller than the least buffer that a system gives a socket.
MOST_INLINE = 16384
# The receiver's incarnation, the sender's slot and claim, when the client was accepted, its
# requests so far, when this one arrived, and the flags below.
HEADER = struct.Struct("=qqqqqqdB")
IN_MEMORY = 1  # what was read is in a memfd
INPUT_ENDED = 2  # perhaps: see MovingClient


class HandoffMessage(NamedTuple):
    """A client that was taken out of a queue, and is its sender's still: see incoming.py."""

    moving: MovingClient
    sender: int  # its slot
    claim: Claim


def post(queue: socket.socket, message: list[bytes], *descriptors: int) -> None:
    """Put a message into a queue. Raises OSError when there is no room."""
    rights = array.array("i", descriptors)
    queue.sendmsg(message, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)


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
    """What a memfd holds; it is closed."""
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
            return memory[:]
    finally:
        os.close(descriptor)
