"""Leaving who waits outside to the workers that would get them anyway.

Where calls go to a worker that has their state, that worker can let their clients in itself. It is
the busy one, so another one would be at the door before it time and again, and hand over client
after client, which costs more than the calls. So a worker from which two clients or more are on
their way lets nobody in until they are taken, so that their owner comes to the door itself.

For `HOLD_SECONDS` at most: an owner that does not take them, because a module keeps its interpreter
lock, would not let anybody in either. Then this worker takes all that come for `RELIEF_SECONDS`.

Called by the thread at the door. Times are CLOCK_MONOTONIC seconds.
"""

import time

from cpanbridge.workers.handoff.outgoing import Outgoing

HOLD_SECONDS = 0.002
RELIEF_SECONDS = 0.1
_SOME = 2


class Restraint:
    """One worker's part in it."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._since = 0.0  # 0: it does not hold back
        self._relieved_until = 0.0

    def holds_back(self) -> bool:
        """Whether to leave who waits outside to other workers, for now."""
        if self._outgoing.away < _SOME or self._outgoing.away_to_doors < _SOME:
            self._since = 0.0
            return False
        now = time.monotonic()
        if now < self._relieved_until:
            return False
        if not self._since:
            self._since = now
        if now - self._since < HOLD_SECONDS:
            return True
        self._since = 0.0
        self._relieved_until = now + RELIEF_SECONDS
        return False
