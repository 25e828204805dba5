"""The sender's side of a hand-off: a worker's clients on their way to others; see message.py."""

import contextlib
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.handoff_claims import Claim, ClaimIssuer
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups, wake
from cpanbridge.supervisor.system.exhaustion import is_exhausted
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.transfer import ReturnReason, Transfer
from cpanbridge.workers.handoff.message import (
    HEADER,
    IN_MEMORY,
    INPUT_ENDED,
    MOST_INLINE,
    in_memory,
    post,
)

LOOK_SECONDS = 0.02
FEW = 8  # of the clients on their way, that the leading thread checks each time


class Outgoing:
    """A worker's clients that are on their way to other workers.

    No thread waits for them: the leading thread checks a few before each client that it serves,
    and the main thread all of them every `LOOK_SECONDS`. `taken` ends what this worker has of a
    client that another one has taken. `descriptor` is readable when one was returned.
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
        self._issuer = ClaimIssuer(self._claims)
        self._slot = slot
        self._wakeups = wakeups
        self._queues: dict[int, socket.socket] = {}
        self._taken = taken
        self._lock = threading.Lock()
        self._away: dict[Claim, tuple[ClientSocket, Transfer]] = {}
        # By their owners' slots: those whose owner's queue was full.
        self._waiting: dict[int, deque[ClientSocket]] = {}
        self._returned: deque[ClientSocket] = deque()
        self.claimed = 0  # clients that other workers have taken so far
        self._watched = False  # by the main thread
        self._sent = False  # since the main thread's last check
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def count(self) -> int:
        """How many are on their way, or wait for that, or were returned and not served yet."""
        waiting = sum(map(len, list(self._waiting.values())))
        return waiting + len(self._away) + len(self._returned)

    @property
    def on_their_way(self) -> int:
        """How many are in other workers' queues, or were taken there a moment ago."""
        return len(self._away)

    def put(self, client: ClientSocket) -> None:
        """Put a client into its owner's queue, as `client.transfer` says.

        If that is full, the main thread puts it in later: a thread that waited here would not empty
        its own queue, and two workers might wait for each other for ever. From then on the socket
        is not to be used. Called in the thread that serves the client. Raises OSError.
        """
        transfer = client.transfer
        assert transfer is not None
        with self._lock:
            line = self._waiting.setdefault(transfer.receiver.slot, deque())
        if line or not self._offer(client, transfer):
            line.append(client)
        # After it was entered: the main thread may check at any moment, and stop checking.
        with self._lock:
            self._sent = True
            watched, self._watched = self._watched, True
        if not watched:
            wake(self._wakeups[self._slot].main)

    def _offer(self, client: ClientSocket, transfer: Transfer) -> bool:
        """Put a client in now; False when there is no room, or no claim. Raises OSError."""
        claim = self._issuer.issue()
        if claim is None:
            return False
        # Before it can be taken: what is taken must be known here.
        with self._lock:
            self._away[claim] = client, transfer
        try:
            self._send(client, transfer, claim)
        except Exception as error:
            if not self._forget(claim):
                return True  # it was withdrawn meanwhile, and returned already
            if isinstance(error, OSError) and is_exhausted(error):
                return False
            raise
        return True

    def _offer_waiting(self) -> None:
        """Put in those that there is room for now. Called in the main thread."""
        for line in list(self._waiting.values()):
            is_full = False
            for _ in range(len(line)):
                client = line.popleft()
                transfer = client.transfer
                assert transfer is not None
                if self._need_not_wait(transfer):
                    self.return_client(client)
                    continue
                try:
                    is_full = is_full or not self._offer(client, transfer)
                except OSError:
                    self.return_client(client)  # the thread that serves it meets the same
                    continue
                if is_full:
                    line.append(client)

    def _need_not_wait(self, transfer: Transfer) -> bool:
        """Whether a client's time is over, or its owner has ended."""
        if time.monotonic() >= transfer.until:
            transfer.return_reason = ReturnReason.TOO_LATE
            return True
        return not self._shared.is_there(transfer.receiver)

    def _send(self, client: ClientSocket, transfer: Transfer, claim: Claim) -> None:
        _, data, accepted_at, requests, arrived, ticket, input_may_have_ended = transfer.moving
        owner = transfer.receiver
        is_large = len(data) > MOST_INLINE
        flags = (IN_MEMORY if is_large else 0) | (INPUT_ENDED if input_may_have_ended else 0)
        head = HEADER.pack(
            *(owner.incarnation, self._slot, *claim),
            *(accepted_at, requests, arrived, ticket, flags),
        )
        queue = self._queue(owner.slot)
        if not is_large:
            post(queue, [head, data], client.descriptor)
            return
        memory = in_memory(data)
        try:
            # Read now: the client may have been withdrawn and closed, and its number be another's.
            post(queue, [head], client.descriptor, memory)
        finally:
            os.close(memory)

    def _queue(self, slot: int) -> socket.socket:
        """Another worker's queue. Its descriptor is never closed, so neither is the socket."""
        # Under the lock, for one object each: a second one would close the descriptor as it goes,
        # and the number be a client's next.
        with self._lock:
            queue = self._queues.get(slot)
            if queue is None:
                queue = self._queues[slot] = handoff_sockets.end_of(self._wakeups[slot].put)
            return queue

    def _forget(self, claim: Claim) -> bool:
        """The claim is of no more use; False when that was found out before."""
        with self._lock:
            if self._away.pop(claim, None) is None:
                return False
            self._issuer.give_back(claim)
            return True

    def settle(self, most: int | None = None) -> None:
        """End what this worker has of clients that were taken, and find those that are returned.

        Checks so many, and others the next time; None: all. Called in any thread.
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
                self.claimed += 1
                self._taken(client)
            else:
                self.return_client(client)

    def next_returned(self) -> ClientSocket | None:
        """A client that was returned, with its `transfer`; None when there is none."""
        with contextlib.suppress(IndexError):
            return self._returned.popleft()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        with contextlib.suppress(IndexError):
            client = self._returned.popleft()  # just now
            if self._returned:  # and others, of which the descriptor tells no more
                wake(self.descriptor)
            return client
        return None

    def return_client(self, client: ClientSocket) -> None:
        """A client was not taken: a thread of this worker is to serve it."""
        self._returned.append(client)
        wake(self.descriptor)

    def look_after(self) -> float:
        """Withdraw those that need not wait any longer; returns in how many seconds to call again.

        Called in the worker's main thread.
        """
        self.settle()
        self._offer_waiting()
        with self._lock:
            self._watched = bool(self.count) or self._sent
            self._sent = False
            away = list(self._away.items())
        for claim, (_, transfer) in away:
            if self._need_not_wait(transfer):
                self._withdraw(claim)
        return LOOK_SECONDS if self._watched else math.inf

    def _withdraw(self, claim: Claim) -> None:
        if self._shared.lock.run(self._claims.withdraw, claim):
            self.settle()

    def withdraw_all(self) -> list[ClientSocket]:
        """Withdraw what was not taken. Called when no thread leads any more."""
        with self._lock:
            away = list(self._away)
        for claim in away:
            self._withdraw(claim)
        self.settle()
        for line in list(self._waiting.values()):
            while line:
                self.return_client(line.popleft())
        back = []
        while (client := self.next_returned()) is not None:
            back.append(client)
        return back
