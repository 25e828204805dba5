"""Leaving a lone client to the worker that had it last, and is about to look for it again.

A client that calls again and again without a pause is back before the worker that has answered it
has looked outside. So the kernel wakes another worker for it, and the two race: one of them has
waked, taken the gate's lock and looked for nothing, and the client goes from one to the other and
finds cold caches at each. Where a worker is told of clients for whom it was not needed, `TIMES` in
a row, it stays away for some milliseconds each time that it happens again.

It is needed where the worker that let the last client in runs a call, leaves, or will not look
outside any more before it sleeps. And nobody relies on that worker for long: who has let nobody in
since a client was left to it gets no other one, whatever keeps it.

Called by the thread at the door.
"""

from cpanbridge.supervisor.memory.layout import Shared

TIMES = 40  # fewer, and one of two clients that call without a pause would be left to the other's
FIRST_SECONDS = 0.001
MOST_SECONDS = 0.008


class Deference:
    """One worker's part in it."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._header = shared.header
        self._slots = shared.slots
        self._number = slot
        self._own = shared.slots[slot]
        self._times = 0  # that it was not needed, in a row
        self._seconds = FIRST_SECONDS  # for how long it stays away the next time
        self._left_to = (slot, 0)  # whom a client was left to, and how many that had let in then

    def has_accepted(self) -> None:
        """A client from outside was let in; this worker looks for the next one after it."""
        self._own.looks_again = 1
        self._header.last_door = self._number

    def will_not_look_again(self) -> None:
        """It looks outside now: who comes after that may not be seen before it sleeps.

        Or nobody looks, as all threads are busy; called in any thread then.
        """
        self._own.looks_again = 0

    def seconds_away(self) -> float:
        """For how long to leave the client of which this worker was told to another; 0: not."""
        last = self._header.last_door
        other = self._slots[last]
        if last == self._number or other.running or not other.is_staying:
            self._times, self._seconds = 0, FIRST_SECONDS
            return 0.0
        if not other.looks_again:
            return 0.0  # it has looked a moment ago, or sleeps
        self._times += 1
        left_to = (last, other.opened)
        if self._times <= TIMES or left_to == self._left_to:
            return 0.0
        self._left_to = left_to
        seconds, self._seconds = self._seconds, min(2 * self._seconds, MOST_SECONDS)
        return seconds
