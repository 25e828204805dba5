"""Spreading clients over the workers: who has more of them lets the others go first.

All workers are woken by a client that waits outside, and who is first has it. For calls on
connections of their own that spreads the load by itself: who is busy is not first. A client that
keeps its connection stays where it was let in, so a worker that is awake anyway would collect them
all before another has got the processor.

So a worker that has at least two clients more than another one holds back, for `HOLD_SECONDS` at
most. Where the others do not come in that time, because a module keeps their interpreter lock, it
takes all that come for `RELIEF_SECONDS`. Where they do, and clients wait all the same, there are
more than the others can see to: it takes its part for `SHARE_SECONDS`. Otherwise connections that
only rest here would leave its processor idle.

Called by the thread at the door.
"""

import time

from cpanbridge.supervisor.shared import Shared

HOLD_SECONDS = 0.002
RELIEF_SECONDS = 0.1
SHARE_SECONDS = 0.006
_MORE = 2


class Balance:
    """One worker's part in it."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._shared = shared
        self._slot = shared.slots[slot]
        self._held_since = 0.0
        self._let_in_by_others = 0  # when it began to hold back
        self._relieved_until = 0.0

    def holds_back(self) -> bool:
        """Whether to leave who waits outside to other workers, for now."""
        mine = self._slot.connections
        if mine < _MORE:
            return False
        now = time.monotonic()
        if now < self._relieved_until:
            return False
        fewest, let_in = self._others()
        if fewest + _MORE > mine:
            self._held_since = 0.0
            return False
        if not self._held_since:
            self._held_since = now
            self._let_in_by_others = let_in
        return now - self._held_since < HOLD_SECONDS

    def let_in(self) -> None:
        """A client was let in, perhaps one for which this worker had held back."""
        if self._held_since:
            now, held_since = time.monotonic(), self._held_since
            self._held_since = 0.0
            if self._others()[1] == self._let_in_by_others:
                self._relieved_until = now + RELIEF_SECONDS
            elif now - held_since >= HOLD_SECONDS:
                self._relieved_until = now + SHARE_SECONDS

    def _others(self) -> tuple[int, int]:
        """The fewest clients that another worker has, and how many all others have let in."""
        others = [
            each for each in self._shared.used_slots if each.serves and each is not self._slot
        ]
        fewest = min((each.connections for each in others), default=self._slot.connections)
        return fewest, sum(each.opened for each in others)
