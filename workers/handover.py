"""Handing a client over: its socket, and all that was read of it, go to another worker.

The message goes into the other worker's postbox, with the client's socket (SCM_RIGHTS) and the name
of a ticket (`supervisor/tickets.py`). Who has put the client in answers for it until it is taken:

- Taken: the receiver says so on the ticket. From then on the client is its own.
- Refused: the receiver has no descriptor left for the client.
- Withdrawn: the sender takes the ticket back, because the client does not wait any longer, or
  because the receiver has ended. Who is first decides, so a call never runs twice.

A client is counted by the receiver before it is taken, and by the sender until it has seen that it
is: see `Gate.took_over`. Its socket is open in both for a moment, so the receiver shuts it down
when it has replied, and the client sees its end at once.

What was read goes along in the message, or in a memfd of its own when it is large.
"""

import array
import contextlib
import errno
import math
import mmap
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from socket import SocketType
from typing import NamedTuple

from cpanbridge.supervisor import postbox
from cpanbridge.supervisor.gate import Bells, Gate, ring
from cpanbridge.supervisor.postbox import MOST_DESCRIPTORS, descriptors_in
from cpanbridge.supervisor.shared import Shared
from cpanbridge.supervisor.tickets import Ticket, TicketWriter
from cpanbridge.workers.journey import Fate, Journey, Passenger
from cpanbridge.workers.peer import Peer

# A message must be smaller than the least buffer that a system gives a socket.
MOST_INLINE = 16384
LOOK_SECONDS = 0.02
# Of these the thread at the door looks at so many each time that it comes by.
FEW = 8
# The receiver's incarnation, the sender's slot and ticket, when the client was accepted, its
# requests so far, when this one arrived, data in a memfd.
_HEADER = struct.Struct("=qqqqqqd?")
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SPACE = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)
_BUSY = (
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ETOOMANYREFS,  # so many clients are on their way
)


class Outgoing:
    """A worker's clients that are on their way to other workers.

    Nobody waits for them: the thread at the door looks what has become of them when it comes by,
    and the main thread for as long as there are any. `taken` ends what this worker has of a client
    that another one has taken. `descriptor` is readable when one has come back.
    """

    def __init__(
        self, shared: Shared, slot: int, bells: Sequence[Bells], taken: Callable[[Peer], None]
    ) -> None:
        self._shared = shared
        self._tickets = shared.tickets[slot]
        self._writer = TicketWriter(self._tickets)
        self._slot = slot
        self._bells = bells
        self._boxes: dict[int, socket.socket] = {}
        self._taken = taken
        self._lock = threading.Lock()
        self._away: dict[Ticket, tuple[Peer, Journey]] = {}
        self._waiting: dict[int, deque[Peer]] = {}  # by their owners' slots: there was no room
        self._back: deque[Peer] = deque()
        self._watched = False  # by the main thread
        self._sent = False  # since the main thread looked
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def count(self) -> int:
        """How many are on their way, or wait for that, or are back and not looked after yet."""
        waiting = sum(map(len, list(self._waiting.values())))
        return waiting + len(self._away) + len(self._back)

    def put(self, peer: Peer) -> None:
        """Put a client into its owner's postbox, as `peer.journey` says.

        Where there is no room for it, the main thread puts it in later: a thread that waited here
        would not empty its own postbox, and two workers might wait for each other for ever. From
        then on its socket is not to be used. Called in the thread that serves the client. Raises
        OSError when this worker has no descriptor left.
        """
        journey = peer.journey
        assert journey is not None
        with self._lock:
            self._sent = True
            watched, self._watched = self._watched, True
            line = self._waiting.setdefault(journey.owner.slot, deque())
        try:
            if line or not self._offer(peer, journey):
                line.append(peer)
        finally:
            if not watched:
                ring(self._bells[self._slot].watch)

    def _offer(self, peer: Peer, journey: Journey) -> bool:
        """Put a client in now; False when there is no room, or no ticket. Raises OSError."""
        ticket = self._writer.issue()
        if ticket is None:
            return False
        # Before it can be taken, so that nothing becomes of a client that is not known.
        with self._lock:
            self._away[ticket] = peer, journey
        try:
            self._send(journey, ticket)
        except OSError as error:
            if not self._forget(ticket):
                return True  # it was withdrawn meanwhile, and has come back already
            if error.errno not in _BUSY:
                raise
            return False
        return True

    def _offer_who_waits(self) -> None:
        """Put in those that there is room for now. Called in the main thread."""
        for line in list(self._waiting.values()):
            is_full = False
            for _ in range(len(line)):
                peer = line.popleft()
                journey = peer.journey
                assert journey is not None
                if self._need_not_wait(journey):
                    self.comes_back(peer)
                    continue
                try:
                    is_full = is_full or not self._offer(peer, journey)
                except OSError:
                    self.comes_back(peer)  # whoever sees to it meets the same, and says so
                    continue
                if is_full:
                    line.append(peer)

    def _need_not_wait(self, journey: Journey) -> bool:
        """Whether a client's time is over, or its owner has ended."""
        if time.monotonic() >= journey.until:
            journey.fate = Fate.TOO_LATE
            return True
        return not self._shared.is_there(journey.owner)

    def _send(self, journey: Journey, ticket: Ticket) -> None:
        client, data, opened_at, requests, arrived = journey.passenger
        owner = journey.owner
        in_memory = len(data) > MOST_INLINE
        head = _HEADER.pack(
            *(owner.incarnation, self._slot, *ticket), *(opened_at, requests, arrived, in_memory)
        )
        box = self._box(owner.slot)
        if not in_memory:
            _put(box, [head, data], client.fileno())
            return
        memory = _in_memory(data)
        try:
            _put(box, [head], client.fileno(), memory)
        finally:
            os.close(memory)

    def _box(self, slot: int) -> socket.socket:
        """Another worker's postbox. Its descriptor is never closed, so neither is the socket."""
        box = self._boxes.get(slot)
        if box is None:
            box = self._boxes[slot] = postbox.opened(self._bells[slot].put)
        return box

    def _forget(self, ticket: Ticket) -> bool:
        """The ticket is of no more use; False when that was found out before."""
        with self._lock:
            if self._away.pop(ticket, None) is None:
                return False
            self._writer.give_back(ticket)
            return True

    def settle(self, most: int | None = None) -> None:
        """Let go of the clients that were taken, and see which have come back.

        Looks at so many, and at others the next time. Called in any thread.
        """
        with self._lock:
            some = list(islice(self._away.items(), most))
            if most is not None and len(self._away) > most:
                for ticket, _ in some:
                    self._away[ticket] = self._away.pop(ticket)
        for ticket, (peer, _) in some:
            if self._tickets.is_offered(ticket):
                continue
            taken = self._tickets.is_taken(ticket)
            if not self._forget(ticket):
                continue
            if taken:
                self._taken(peer)
            else:
                self.comes_back(peer)

    @contextlib.contextmanager
    def receipts_awaited(self) -> Iterator[None]:
        """Have the main thread told at once of each client that is taken.

        Called by the thread at the door, when it waits for something else.
        """
        slot = self._shared.slots[self._slot]
        slot.awaits_receipts = 1
        try:
            self.settle()
            yield
        finally:
            slot.awaits_receipts = 0

    def next_back(self) -> Peer | None:
        """A client that has come back, as its journey says."""
        with contextlib.suppress(IndexError):
            return self._back.popleft()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        with contextlib.suppress(IndexError):
            return self._back.popleft()  # just now
        return None

    def comes_back(self, peer: Peer) -> None:
        """Somebody is to see to a client that was not taken."""
        self._back.append(peer)
        ring(self.descriptor)

    def look_after(self) -> float:
        """Withdraw those that need not wait any longer; returns in how many seconds to look again.

        Called in the worker's main thread.
        """
        self.settle()
        self._offer_who_waits()
        with self._lock:
            self._watched = bool(self.count) or self._sent
            self._sent = False
            away = list(self._away.items())
        for ticket, (_, journey) in away:
            if self._need_not_wait(journey):
                self._withdraw(ticket)
        return LOOK_SECONDS if self._watched else math.inf

    def _withdraw(self, ticket: Ticket) -> None:
        with self._shared.lock:
            withdrawn = self._tickets.withdraw(ticket)
        if withdrawn:
            self.settle()

    def withdraw_all(self) -> list[Peer]:
        """Take back what was not taken. Called when nobody is at the door any more."""
        with self._lock:
            away = list(self._away)
        for ticket in away:
            self._withdraw(ticket)
        self.settle()
        for line in list(self._waiting.values()):
            while line:
                self.comes_back(line.popleft())
        back = []
        while (peer := self.next_back()) is not None:
            back.append(peer)
        return back


def _put(box: socket.socket, message: list[bytes], *descriptors: int) -> None:
    rights = array.array("i", descriptors)
    box.sendmsg(message, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)


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


class Parcel(NamedTuple):
    """A client that was taken out of a postbox, and is its sender's still: see `Incoming`."""

    passenger: Passenger
    sender: int  # its slot
    ticket: Ticket


class Incoming:
    """A worker's own postbox. Called by the thread at the door, but for what says otherwise."""

    def __init__(self, shared: Shared, slot: int, bells: Sequence[Bells], gate: Gate) -> None:
        self._shared = shared
        self._bells = bells
        self._gate = gate
        self._incarnation = shared.slots[slot].incarnation
        self.descriptor = bells[slot].take
        self._box = postbox.opened(self.descriptor)
        self._ended = self._workers_ended()
        self.waiting: deque[Parcel] = deque()  # taken out of it already

    def next(self) -> tuple[Passenger, int] | None:
        """The next client, and its number in this slot; None when there is none.

        Raises OSError (EMFILE) when there was no descriptor left for it; it is its sender's still.
        """
        while (parcel := self._next_waiting() or self._take_out()) is not None:
            number = self._accept(parcel)
            if number is not None:
                return parcel.passenger, number
            parcel.passenger.client.close()
        return None

    def _next_waiting(self) -> Parcel | None:
        with contextlib.suppress(IndexError):
            return self.waiting.popleft()
        return None

    def look_through(self) -> None:
        """Close the clients of senders that have ended: nobody counts them any more.

        Called in the main thread, when nobody is at the door who would take clients out.
        """
        ended = self._workers_ended()
        if ended == self._ended:
            return
        self._ended = ended
        with contextlib.suppress(OSError):  # no descriptor is left: they are their senders' still
            while (parcel := self._take_out()) is not None:
                self.waiting.append(parcel)
        for _ in range(len(self.waiting)):
            parcel = self._next_waiting()
            if parcel is None:
                return  # a thread has come to the door
            if self._shared.tickets[parcel.sender].is_offered(parcel.ticket):
                self.waiting.append(parcel)
            else:
                parcel.passenger.client.close()

    def _workers_ended(self) -> int:
        """A number that changes when another worker has ended."""
        return sum(slot.incarnation for slot in self._shared.used_slots)

    def _accept(self, parcel: Parcel) -> int | None:
        """Make the client ours; None when its sender has withdrawn it, or is dead."""
        number = self._gate.took_over()
        with self._shared.lock:
            taken = self._shared.tickets[parcel.sender].take(parcel.ticket)
        if not taken:
            self._gate.closed()
            return None
        self._tell(parcel.sender)
        return number

    def _refuse(self, sender: int, ticket: Ticket) -> None:
        with self._shared.lock:
            self._shared.tickets[sender].refuse(ticket)
        self._tell(sender)

    def _tell(self, sender: int) -> None:
        if self._shared.slots[sender].awaits_receipts:
            ring(self._bells[sender].watch)

    def _take_out(self) -> Parcel | None:
        while True:
            try:
                message, ancillary, told, _ = self._box.recvmsg(
                    _HEADER.size + MOST_INLINE, _SPACE, _FLAGS
                )
            except BlockingIOError:
                return None
            descriptors = descriptors_in(ancillary)
            incarnation, sender, place, number, opened_at, requests, arrived, in_memory = (
                _HEADER.unpack_from(message)
            )
            ticket = Ticket(place, number)
            complete = not told & _TRUNCATED and len(descriptors) == 1 + in_memory
            if complete and incarnation == self._incarnation:
                break
            # Meant for the worker that had this slot before, or there was no room for it.
            for each in descriptors:
                os.close(each)
            self._refuse(sender, ticket)
            if not complete:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        client = SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0])
        if client.gettimeout() is not None:
            client.settimeout(None)  # a module has called socket.setdefaulttimeout
        data = _from_memory(descriptors[1]) if in_memory else message[_HEADER.size :]
        return Parcel(Passenger(client, data, opened_at, requests, arrived), sender, ticket)


def _from_memory(descriptor: int) -> bytes:
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
            return memory[:]
    finally:
        os.close(descriptor)
