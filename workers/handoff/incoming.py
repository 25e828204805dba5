"""The receiver's side of a hand-off: a worker's own queue; see message.py."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.handoff_claims import Claim
from cpanbridge.supervisor.memory.handoff_sockets import MOST_DESCRIPTORS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.client.spare_descriptors import spare
from cpanbridge.workers.client.transfer import MovingClient
from cpanbridge.workers.handoff.message import (
    IN_MEMORY,
    INPUT_ENDED,
    HandoffMessage,
    RawMessage,
    from_memory,
    receive,
)


class Incoming:
    """A worker's own queue. Called by the leading thread, but for what says otherwise."""

    def __init__(self, shared: Shared, slot: int, wakeups: Sequence[Wakeups], gate: Gate) -> None:
        self._shared = shared
        self._gate = gate
        self._incarnation = shared.slots[slot].incarnation
        self.descriptor = wakeups[slot].take
        self._queue = handoff_sockets.end_of(self.descriptor)
        self._ended = self._workers_ended()
        self._lacks_descriptors = False  # or has, at some time: then it receives with spare ones
        self.waiting: deque[HandoffMessage] = deque()  # taken out of the queue already

    def next(self) -> tuple[MovingClient, int] | None:
        """The next client, and its number in this slot; None when there is none.

        Raises OSError (EMFILE) when there was no descriptor left for it; it is its sender's still.
        """
        while (message := self._next_waiting() or self._take_out()) is not None:
            number = None
            try:
                number = self._accept(message)
            finally:
                if number is None:
                    os.close(message.moving.descriptor)
                    self._refuse(message.sender, message.claim)
            if number is not None:
                return message.moving, number
        return None

    def _next_waiting(self) -> HandoffMessage | None:
        with contextlib.suppress(IndexError):
            return self.waiting.popleft()
        return None

    def discard_orphans(self) -> bool:
        """Close the clients of senders that have ended: nobody counts them any more.

        Returns whether others are `waiting` now, of which no descriptor tells. Called in the main
        thread, when no thread leads that would take clients out.
        """
        ended = self._workers_ended()
        if ended == self._ended:
            return False
        self._ended = ended
        with contextlib.suppress(OSError):  # no descriptor is left: they are their senders' still
            while (message := self._take_out()) is not None:
                self.waiting.append(message)
        for _ in range(len(self.waiting)):
            message = self._next_waiting()
            if message is None:
                break  # a thread leads again
            if self._shared.claims[message.sender].is_offered(message.claim):
                self.waiting.append(message)
            else:
                os.close(message.moving.descriptor)
        return bool(self.waiting)

    def _workers_ended(self) -> int:
        """A number that changes when another worker has ended."""
        return sum(slot.incarnation for slot in self._shared.used_slots)

    def _accept(self, message: HandoffMessage) -> int | None:
        """Make the client ours; None when its sender has withdrawn it, or is dead."""
        number = self._gate.take_handed_off()
        taken = self._shared.lock.run(self._shared.claims[message.sender].take, message.claim)
        if not taken:
            self._gate.release_connection()
            return None
        self._gate.wake_if_waiting(message.sender)  # which has its connection's room to give back
        return number

    def _refuse(self, sender: int, claim: Claim) -> None:
        """Leave a client to its sender, if that offers it still."""
        self._shared.lock.run(self._shared.claims[sender].refuse, claim)
        self._gate.wake_if_waiting(sender)

    def _take_out(self) -> HandoffMessage | None:
        """The next message of the queue; None when there is none. Raises OSError.

        Whatever becomes of one that has been taken out, its client is refused if this worker does
        not get it: nobody else knows that the message is gone.
        """
        while (raw := self._receive()) is not None:
            message = None
            try:
                message = self._unpack(raw)
            finally:
                if message is None:
                    raw.close()
                    self._refuse(raw.sender, raw.claim)
            if message is not None:
                return message
        return None

    def _receive(self) -> RawMessage | None:
        if not self._lacks_descriptors:
            return receive(self._queue)
        with spare.given_up(MOST_DESCRIPTORS):
            return receive(self._queue)

    def _unpack(self, raw: RawMessage) -> HandoffMessage | None:
        """None for one that was meant for the worker that had this slot before."""
        if not raw.complete:
            self._lacks_descriptors = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if raw.incarnation != self._incarnation:
            return None
        data = raw.data
        if raw.flags & IN_MEMORY:
            data = from_memory(raw.descriptors[1])
            os.close(raw.descriptors.pop())
        moving = MovingClient(raw.descriptors[0], data, *raw.history, bool(raw.flags & INPUT_ENDED))
        return HandoffMessage(moving, raw.sender, raw.claim)
