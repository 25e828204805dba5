"""Spreading kept connections over the workers.

An idle worker accepts, so calls on connections of their own spread by themselves. A connection that
is kept stays with the worker that has accepted it; of idle workers the kernel may wake the same one
each time, and a worker that is added or replaced would have none.

So a worker that keeps at least two more than another one has clients hands one of them over with
its next request, in the way of a client that has its state there, and another one a little later,
the sooner the more it has. If the other worker does not take it in `TAKE_SECONDS`, the call runs
here after all, and for `REST_SECONDS` none is handed over.

One at a time is on its way, so a worker that takes none holds up one client and no more. A hand-off
costs as much as several calls, so a connection is handed over with its second request at the
earliest: with the first, nobody knows whether another one will come. This worker counts its kept
connections, and of the other one all clients: calls on connections of their own come and go, and
would have kept ones go to and fro.

Called by the threads that serve clients.
"""

import random
import threading
import time

from cpanbridge.supervisor.memory.fields import Slot
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.handoff.outgoing import Outgoing

PAUSE_SECONDS = 0.01  # between two hand-offs, divided by how many connections there are too many
TAKE_SECONDS = 0.05
REST_SECONDS = 1.0
_MORE = 2


class Balancer:
    """One worker's part in it. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, shared: Shared, slot: int, outgoing: Outgoing) -> None:
        self._shared = shared
        self._number = slot
        self._slot = shared.slots[slot]
        self._outgoing = outgoing
        # Not the modules' generator: a module that calls random.seed must get what that promises.
        self._random = random.Random(slot)
        self._lock = threading.Lock()
        self.next_check = 0.0  # when `worker_with_fewer` is worth while

    def worker_with_fewer(self, now: float, kept: int) -> Owner | None:
        """The worker that a kept connection is to be handed to, if any; `kept` are here.

        Called at `next_check` or later. Of two threads at once one is given none.
        """
        with self._lock:
            if now < self.next_check or self._outgoing.count:
                return None
            others = [
                (slot.connections, owner)
                for owner, slot in self._shared.workers()
                if owner.slot != self._number and self._takes(slot)
            ]
            fewest = min((has for has, _ in others), default=kept)
            surplus = max(1, kept - fewest - _MORE + 1)
            self.next_check = max(self.next_check, now + PAUSE_SECONDS / surplus)
        # Any of those with fewer: all workers would give theirs to the one with the fewest.
        fewer = [owner for has, owner in others if has <= kept - _MORE]
        return self._random.choice(fewer) if fewer else None

    def worker_with_a_thread(self, *, many: bool) -> Owner | None:
        """The worker that a request is to be handed to which waits here, if there is one.

        Without `many` one at a time is on its way. With it they go to one without a thread as
        well, if need be: this worker exits, and they can wait there as they do here.
        """
        if time.monotonic() < self.next_check or (self._outgoing.count and not many):
            return None
        others = [
            (not _has_thread(slot), slot.running + slot.queued, owner)
            for owner, slot in self._shared.workers()
            if owner.slot != self._number and slot.is_staying and (many or _has_thread(slot))
        ]
        return min(others)[2] if others else None

    def _takes(self, slot: Slot) -> bool:
        """Whether a worker has the same modules, being of this generation, and a thread left."""
        return slot.is_staying and slot.generation == self._slot.generation and _has_thread(slot)

    def was_not_taken(self, now: float) -> None:
        """A connection was returned."""
        with self._lock:
            self.next_check = max(self.next_check, now + REST_SECONDS)


def _has_thread(slot: Slot) -> bool:
    """Whether a worker may run one more request."""
    return not slot.threads or slot.running < slot.threads
