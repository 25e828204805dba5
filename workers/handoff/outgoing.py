"""A worker's clients that are on their way to other workers; see handover.py."""

import contextlib
import errno
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cpanbridge.supervisor.gate import Wakeups, ring
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.handoff_claims import Claim, ClaimIssuer
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.transfer import Fate, Transfer
from cpanbridge.workers.handoff.message import (
    HEADER,
    IN_MEMORY,
    INPUT_OPEN,
    MOST_INLINE,
    in_memory,
    post,
)

LOOK_SECONDS = 0.02
# Of these the thread at the door looks at so many each time that it comes by.
FEW = 8
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
        self,
        shared: Shared,
        slot: int,
        wakeups: Sequence[Wakeups],
        taken: Callable[[ClientSocket], None],
    ) -> None:
        self._shared = shared
        self._claims = shared.claims[slot]
        self._writer = ClaimIssuer(self._claims)
        self._slot = slot
        self._wakeups = wakeups
        self._queues: dict[int, socket.socket] = {}
        self._taken = taken
        self._lock = threading.Lock()
        self._away: dict[Claim, tuple[ClientSocket, Transfer]] = {}
        self._waiting: dict[
            int, deque[ClientSocket]
        ] = {}  # by their owners' slots: there was no room
        self._back: deque[ClientSocket] = deque()
        self._watched = False  # by the main thread
        self._sent = False  # since the main thread looked
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def count(self) -> int:
        """How many are on their way, or wait for that, or are back and not looked after yet."""
        waiting = sum(map(len, list(self._waiting.values())))
        return waiting + len(self._away) + len(self._back)

    @property
    def away(self) -> int:
        """How many are in other workers' postboxes, or were taken there a moment ago."""
        return len(self._away)

    @property
    def away_to_doors(self) -> int:
        """Of those, how many go to workers that let clients in from outside themselves."""
        with self._lock:
            transfers = [transfer for _, transfer in self._away.values()]
        return sum(bool(self._shared.slots[each.owner.slot].serves) for each in transfers)

    def put(self, client: ClientSocket) -> None:
        """Put a client into its owner's postbox, as `peer.journey` says.

        Where there is no room for it, the main thread puts it in later: a thread that waited here
        would not empty its own postbox, and two workers might wait for each other for ever. From
        then on its socket is not to be used. Called in the thread that serves the client. Raises
        OSError when this worker has no descriptor left.
        """
        transfer = client.transfer
        assert transfer is not None
        with self._lock:
            line = self._waiting.setdefault(transfer.owner.slot, deque())
        if line or not self._offer(client, transfer):
            line.append(client)
        # Not before it is there to be seen: the main thread may look at any moment, and stop.
        with self._lock:
            self._sent = True
            watched, self._watched = self._watched, True
        if not watched:
            ring(self._wakeups[self._slot].watch)

    def _offer(self, client: ClientSocket, transfer: Transfer) -> bool:
        """Put a client in now; False when there is no room, or no ticket. Raises OSError."""
        claim = self._writer.issue()
        if claim is None:
            return False
        # Before it can be taken, so that nothing becomes of a client that is not known.
        with self._lock:
            self._away[claim] = client, transfer
        try:
            self._send(client, transfer, claim)
        except OSError as error:
            if not self._forget(claim):
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
                client = line.popleft()
                transfer = client.transfer
                assert transfer is not None
                if self._need_not_wait(transfer):
                    self.comes_back(client)
                    continue
                try:
                    is_full = is_full or not self._offer(client, transfer)
                except OSError:
                    self.comes_back(client)  # whoever sees to it meets the same, and says so
                    continue
                if is_full:
                    line.append(client)

    def _need_not_wait(self, transfer: Transfer) -> bool:
        """Whether a client's time is over, or its owner has ended."""
        if time.monotonic() >= transfer.until:
            transfer.fate = Fate.TOO_LATE
            return True
        return not self._shared.is_there(transfer.owner)

    def _send(self, client: ClientSocket, transfer: Transfer, claim: Claim) -> None:
        _, data, opened_at, requests, arrived, input_may_have_ended = transfer.moving
        owner = transfer.owner
        is_large = len(data) > MOST_INLINE
        flags = (IN_MEMORY if is_large else 0) | (0 if input_may_have_ended else INPUT_OPEN)
        head = HEADER.pack(
            *(owner.incarnation, self._slot, *claim), *(opened_at, requests, arrived, flags)
        )
        queue = self._queue(owner.slot)
        if not is_large:
            post(queue, [head, data], client.descriptor)
            return
        memory = in_memory(data)
        try:
            # Asked now: it may have been withdrawn and closed, and its number be another's.
            post(queue, [head], client.descriptor, memory)
        finally:
            os.close(memory)

    def _queue(self, slot: int) -> socket.socket:
        """Another worker's postbox. Its descriptor is never closed, so neither is the socket."""
        queue = self._queues.get(slot)
        if queue is None:
            queue = self._queues[slot] = handoff_sockets.opened(self._wakeups[slot].put)
        return queue

    def _forget(self, claim: Claim) -> bool:
        """The ticket is of no more use; False when that was found out before."""
        with self._lock:
            if self._away.pop(claim, None) is None:
                return False
            self._writer.give_back(claim)
            return True

    def settle(self, most: int | None = None) -> None:
        """Let go of the clients that were taken, and see which have come back.

        Looks at so many, and at others the next time. Called in any thread.
        """
        if not self._away:
            return
        with self._lock:
            some = list(islice(self._away.items(), most))
            if most is not None and len(self._away) > most:
                for claim, _ in some:
                    self._away[claim] = self._away.pop(claim)
        for claim, (client, _) in some:
            if self._claims.is_offered(claim):
                continue
            taken = self._claims.is_taken(claim)
            if not self._forget(claim):
                continue
            if taken:
                self._taken(client)
            else:
                self.comes_back(client)

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

    def next_back(self) -> ClientSocket | None:
        """A client that has come back, as its journey says."""
        with contextlib.suppress(IndexError):
            return self._back.popleft()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        with contextlib.suppress(IndexError):
            return self._back.popleft()  # just now
        return None

    def comes_back(self, client: ClientSocket) -> None:
        """Somebody is to see to a client that was not taken."""
        self._back.append(client)
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
        for claim, (_, transfer) in away:
            if self._need_not_wait(transfer):
                self._withdraw(claim)
        return LOOK_SECONDS if self._watched else math.inf

    def _withdraw(self, claim: Claim) -> None:
        with self._shared.lock:
            withdrawn = self._claims.withdraw(claim)
        if withdrawn:
            self.settle()

    def withdraw_all(self) -> list[ClientSocket]:
        """Take back what was not taken. Called when nobody is at the door any more."""
        with self._lock:
            away = list(self._away)
        for claim in away:
            self._withdraw(claim)
        self.settle()
        for line in list(self._waiting.values()):
            while line:
                self.comes_back(line.popleft())
        back = []
        while (client := self.next_back()) is not None:
            back.append(client)
        return back
