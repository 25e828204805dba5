"""The receiver's side of a hand-off: a worker's own queue; see message.py."""

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

from cpanbridge.supervisor.gate import Gate, Wakeups
from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.handoff_claims import Claim
from cpanbridge.supervisor.memory.handoff_sockets import MOST_DESCRIPTORS, descriptors_in
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.client.transfer import MovingClient
from cpanbridge.workers.handoff.message import (
    HEADER,
    IN_MEMORY,
    INPUT_ENDED,
    MOST_INLINE,
    HandoffMessage,
    from_memory,
)

_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SPACE = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)


class Incoming:
    """A worker's own queue. Called by the leading thread, but for what says otherwise."""

    def __init__(self, shared: Shared, slot: int, wakeups: Sequence[Wakeups], gate: Gate) -> None:
        self._shared = shared
        self._gate = gate
        self._incarnation = shared.slots[slot].incarnation
        self.descriptor = wakeups[slot].take
        self._queue = handoff_sockets.end_of(self.descriptor)
        self._ended = self._workers_ended()
        self.waiting: deque[HandoffMessage] = deque()  # taken out of the queue already

    def next(self) -> tuple[MovingClient, int] | None:
        """The next client, and its number in this slot; None when there is none.

        Raises OSError (EMFILE) when there was no descriptor left for it; it is its sender's still.
        """
        while (message := self._next_waiting() or self._take_out()) is not None:
            number = self._accept(message)
            if number is not None:
                return message.moving, number
            os.close(message.moving.descriptor)
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
        with self._shared.lock:
            taken = self._shared.claims[message.sender].take(message.claim)
        if not taken:
            self._gate.release_connection()
            return None
        self._gate.wake_if_waiting(message.sender)  # which has its connection's room to give back
        return number

    def _refuse(self, sender: int, claim: Claim) -> None:
        with self._shared.lock:
            self._shared.claims[sender].refuse(claim)
        self._gate.wake_if_waiting(sender)

    def _take_out(self) -> HandoffMessage | None:
        while True:
            try:
                message, ancillary, told, _ = self._queue.recvmsg(
                    HEADER.size + MOST_INLINE, _SPACE, _FLAGS
                )
            except BlockingIOError:
                return None
            descriptors = descriptors_in(ancillary)
            incarnation, sender, position, number, accepted_at, requests, arrived, flags = (
                HEADER.unpack_from(message)
            )
            claim = Claim(position, number)
            in_memory = bool(flags & IN_MEMORY)
            complete = not told & _TRUNCATED and len(descriptors) == 1 + in_memory
            if complete and incarnation == self._incarnation:
                break
            # Meant for the worker that had this slot before, or there was no descriptor left.
            for each in descriptors:
                os.close(each)
            self._refuse(sender, claim)
            if not complete:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        try:
            data = from_memory(descriptors[1]) if in_memory else message[HEADER.size :]
        except OSError:  # mmap needs a descriptor of its own
            os.close(descriptors[0])
            self._refuse(sender, claim)
            raise
        input_may_have_ended = bool(flags & INPUT_ENDED)
        moving = MovingClient(
            descriptors[0], data, accepted_at, requests, arrived, input_may_have_ended
        )
        return HandoffMessage(moving, sender, claim)
