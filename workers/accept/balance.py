"""Spreading kept connections over the workers.

A client that waits outside is let in by a worker that has nothing to do. For calls on connections
of their own that spreads the load by itself: who is busy does not come. A connection that is kept
stays where it was let in, and a worker that is awake anyway would collect them all before another
one has got the processor; and when a worker is added or replaced, the new one would have none.

So a worker that keeps at least two more than another one has clients passes one on to it, by the
way that clients take to their state (handover.py), and another one a little later, the sooner the
more it has, until nobody keeps two more than anybody else has. Where one is not taken in
`TAKE_SECONDS`, because a module keeps the other worker's interpreter lock, its call runs here after
all, and for `REST_SECONDS` nobody is passed on.

One at a time is on its way, so that a worker that takes nothing holds up one and no more. None is
passed on where `threads` is set: all of them may be busy there, and here when it comes back. So
what spreads those is only that the worker which has let one in is not the next one to be woken.

That costs as much as several calls, so only a connection that has rested is passed on: with its
first request, nobody knows whether there will be another one. And of its own clients a worker
counts those that are kept, of another one's all: calls on connections of their own come and go, and
would have kept ones go to and fro.

Called by the threads that serve clients.
"""

import math
import random
import threading

from cpanbridge.supervisor.memory.layout import Shared, Slot
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.handoff.outgoing import Outgoing

LOOK_SECONDS = 0.01  # between two that are passed on, divided by how many there are too many
TAKE_SECONDS = 0.05
REST_SECONDS = 1.0
_MORE = 2


class Balance:
    """One worker's part in it. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, shared: Shared, slot: int, outgoing: Outgoing, threads: int) -> None:
        """`threads` is the setting: 0 where there are as many as the calls need."""
        self._shared = shared
        self._number = slot
        self._slot = shared.slots[slot]
        self._outgoing = outgoing
        # Not the modules' own numbers: who calls random.seed must get what that promises. And any
        # of those with fewer, not the one with fewest, to which all others would give theirs.
        self._random = random.Random(slot)
        self._lock = threading.Lock()
        # When it is worth while to ask for a better place.
        self.next_look = math.inf if threads else 0.0

    def better_place(self, now: float, kept: int) -> Owner | None:
        """The worker that a connection is to be passed on to, if any; `kept` is how many are here.

        Called at `next_look` or later. Of two threads at once one is given none.
        """
        with self._lock:
            if now < self.next_look or self._outgoing.count:
                return None
            return self._better_place(now, kept)

    def _better_place(self, now: float, kept: int) -> Owner | None:
        others = [
            (slot.connections, number)
            for number, slot in enumerate(self._shared.used_slots)
            if number != self._number and self._takes(slot)
        ]
        fewest, _ = min(others, default=(kept, 0))
        surplus = max(1, kept - fewest - _MORE + 1)
        self.next_look = max(self.next_look, now + LOOK_SECONDS / surplus)
        fewer = [number for has, number in others if has <= kept - _MORE]
        return self._shared.owner(self._random.choice(fewer)) if fewer else None

    def _takes(self, slot: Slot) -> bool:
        """Whether a worker is one of this generation, whose modules are the same."""
        return slot.is_staying and bool(slot.generation == self._slot.generation)

    def was_not_taken(self, now: float) -> None:
        """A connection has come back."""
        with self._lock:
            self.next_look = max(self.next_look, now + REST_SECONDS)
