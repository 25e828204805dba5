"""Handing a client over: its socket, and all that was read of it, go to another worker.

The message goes into the other worker's postbox with two descriptors (SCM_RIGHTS): the client's
socket, and one end of a pair of sockets, the ticket. Who has put the client in answers for it until
it is taken:

- Taken: the receiver writes a byte to its end of the ticket. From then on the client is its own.
- Not taken: all copies of that end are closed without a byte. The receiver has ended, or had no
  descriptor left for the client; the kernel tells in both cases.
- Withdrawn: the sender shuts its end down, and the receiver's byte finds no reader. The kernel
  decides which of the two was first, so a call never runs twice.

A client is counted by the receiver before it is taken, and by the sender until it knows that it is:
see `Gate.took_over`. Its socket is open in both for a moment, so the receiver shuts it down when it
has replied, and the client sees its end at once.

What was read goes along in the message, or in a memfd of its own when it is large.
"""

import array
import contextlib
import errno
import math
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cpanbridge.supervisor.owners import Owner
from cpanbridge.supervisor.postbox import MOST_DESCRIPTORS, descriptors_in
from cpanbridge.workers.journey import Fate, Journey, Passenger
from cpanbridge.workers.peer import Peer

# A message must be smaller than the least buffer that a system gives a socket.
MOST_INLINE = 16384
LOOK_SECONDS = 0.1
# The receiver's incarnation, when the client was accepted, its requests so far, data in a memfd.
_HEADER = struct.Struct("=qqq?")
_BUSY = (
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ETOOMANYREFS,  # so many clients are on their way
)
_TAKEN = b"t"


class Parcel(NamedTuple):
    """A client that was taken out of a postbox, and is not accepted yet: see `accept`."""

    passenger: Passenger
    incarnation: int  # of the worker that it is meant for
    ticket: socket.socket

    def accept(self) -> bool:
        """Make the client ours; False when its sender has withdrawn it, or is dead."""
        try:
            self.ticket.send(_TAKEN, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        finally:
            self.ticket.close()
        return True

    def refuse(self) -> None:
        """Leave the client to its sender."""
        self.ticket.close()
        self.passenger.client.close()


class Outgoing:
    """A worker's clients that are on their way to other workers.

    Nobody waits for them: the thread at the door is told by `descriptor`, which is readable when
    something has become of one, and calls `settle`. `taken` ends what this worker has of a client.
    """

    def __init__(self, taken: Callable[[Peer], None], is_there: Callable[[Owner], bool]) -> None:
        self._taken = taken
        self._is_there = is_there
        self._lock = threading.Lock()
        self._away: dict[int, tuple[socket.socket, Peer, Journey]] = {}
        self._back: deque[Peer] = deque()
        self._ends = select.epoll()
        self.descriptor = self._ends.fileno()

    @property
    def count(self) -> int:
        """How many are on their way, or back and not looked after yet."""
        return len(self._away) + len(self._back)

    def put(self, put: int, peer: Peer) -> bool:
        """Put a client into a postbox, as `peer.journey` says; False when that is full.

        From then on its socket is not to be used. Called in the thread that serves the client.
        Raises OSError when this worker has no descriptor left.
        """
        journey = peer.journey
        assert journey is not None
        ours, theirs = socket.socketpair()
        with theirs:
            # Before it can be taken, so that nothing becomes of a client that is not known.
            with self._lock:
                self._away[ours.fileno()] = ours, peer, journey
                self._ends.register(ours, select.EPOLLIN)
            try:
                _put(put, journey, theirs)
            except OSError as error:
                with self._lock:
                    if self._away.pop(ours.fileno(), None) is None:
                        return True  # it was withdrawn meanwhile, and has come back already
                    self._ends.unregister(ours)
                ours.close()
                if error.errno not in _BUSY:
                    raise
                return False
        return True

    def settle(self) -> Peer | None:
        """Let go of the clients that were taken; returns one that has come back."""
        with self._lock:
            ready = [self._away.pop(fd) for fd, _ in self._ends.poll(0) if fd in self._away]
            for ticket, *_ in ready:
                self._ends.unregister(ticket)
        for ticket, peer, _ in ready:
            taken = ticket.recv(1)
            ticket.close()
            if taken:
                self._taken(peer)
            else:
                self._back.append(peer)
        with contextlib.suppress(IndexError):
            return self._back.popleft()
        return None

    def look_after(self) -> float:
        """Withdraw those that need not wait any longer; returns in how many seconds to look again.

        Called in the worker's main thread. The kernel tells of an owner that has ended, but not
        when a child of it has the ticket as well.
        """
        now = time.monotonic()
        with self._lock:
            away = list(self._away.values())
        # From here on another thread may settle one of them, and its client begin another journey.
        for ticket, _, journey in away:
            if now >= journey.until:
                journey.fate = Fate.TOO_LATE
            elif self._is_there(journey.owner):
                continue
            _withdraw(ticket)
        return LOOK_SECONDS if away else math.inf

    def withdraw_all(self) -> list[Peer]:
        """Take back what was not taken. Called when nobody is at the door any more."""
        with self._lock:
            for ticket, *_ in self._away.values():
                _withdraw(ticket)
        back = []
        while (peer := self.settle()) is not None:
            back.append(peer)
        return back


def _put(put: int, journey: Journey, ticket: socket.socket) -> None:
    client, data, opened_at, requests = journey.passenger
    box = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=put)
    try:
        with contextlib.ExitStack() as sent:
            descriptors = array.array("i", (client.fileno(), ticket.fileno()))
            in_memory = len(data) > MOST_INLINE
            message = _HEADER.pack(journey.owner.incarnation, opened_at, requests, in_memory)
            if in_memory:
                descriptors.append(_in_memory(data))
                sent.callback(os.close, descriptors[-1])
            else:
                message += data
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)
            box.sendmsg([message], [rights], socket.MSG_DONTWAIT)
    finally:
        box.detach()


def _withdraw(ticket: socket.socket) -> None:
    # After this no byte comes in any more; one that is there was first. The ticket is readable.
    with contextlib.suppress(OSError):  # settled meanwhile
        ticket.shutdown(socket.SHUT_RD)


def _in_memory(data: bytes) -> int:
    descriptor = os.memfd_create("cpanbridged-request", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def take_out(take: socket.socket) -> Parcel | None:
    """The next client in a worker's own postbox; None when there is none.

    Called by the thread at the door. Raises OSError (EMFILE) when there was no descriptor left for
    it; it is its sender's still.
    """
    space = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        message, ancillary, told, _ = take.recvmsg(_HEADER.size + MOST_INLINE, space, flags)
    except BlockingIOError:
        return None
    descriptors = descriptors_in(ancillary)
    if told & socket.MSG_CTRUNC or len(descriptors) < 2:
        for each in descriptors:
            os.close(each)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    incarnation, opened_at, requests, in_memory = _HEADER.unpack_from(message)
    client, ticket = (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=each)
        for each in descriptors[:2]
    )
    if client.gettimeout() is not None:
        client.settimeout(None)  # a module has called socket.setdefaulttimeout
    data = _from_memory(descriptors[2]) if in_memory else message[_HEADER.size :]
    return Parcel(Passenger(client, data, opened_at, requests), incarnation, ticket)


def _from_memory(descriptor: int) -> bytes:
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
            return memory[:]
    finally:
        os.close(descriptor)
