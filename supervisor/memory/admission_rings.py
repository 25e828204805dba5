"""The two rings of admission times: the one in use, and the one that takes its place.

Both stand at the end of the shared memory, each with room for the highest limit that there is, and
every process has both mapped from its start. (What was never written takes no memory.) When a
reload changes the rate limit, the other ring is made ready, takes over what this one knows of the
last minute, and becomes the one in use by one store.
"""

import mmap

from cpanbridge.supervisor.config import MAX_REQUESTS_PER_MINUTE
from cpanbridge.supervisor.memory.fields import Header
from cpanbridge.supervisor.memory.rate_window import Window, entries_for
from cpanbridge.supervisor.memory.robustlock import SharedLock

# How many admissions a ring may have missed that is to take over: so many are copied in less than a
# millisecond, while all others wait.
_FEW = 1000


def in_pages(size: int) -> int:
    """Round up to whole pages, in bytes."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


_RING_SIZE = in_pages(8 * entries_for(MAX_REQUESTS_PER_MINUTE, MAX_REQUESTS_PER_MINUTE))
SIZE = 2 * _RING_SIZE  # bytes


class AdmissionRings:
    """The rings of one daemon. `memory` is the shared memory, from `at` on which they stand."""

    def __init__(self, memory: mmap.mmap, at: int, header: Header, lock: SharedLock) -> None:
        self._memory = memory
        self._at = at
        self._header = header
        self._lock = lock
        view = memoryview(memory)
        self.windows = tuple(
            Window(header, header.rings[n], view[at + n * _RING_SIZE :][:_RING_SIZE].cast("q"))
            for n in range(2)
        )

    @property
    def window(self) -> Window:
        """The ring in use. Called under the gate's lock, or for a report."""
        number: int = self._header.ring_number
        return self.windows[number % 2]

    def begin(self, limit: int) -> None:
        """Make the first ring. Called once, when the memory is laid out."""
        self.window.set(limit, limit)

    def try_to_resize(self, limit: int) -> bool:
        """Change the rate limit, and keep what is known of the last minute.

        False when the gate's lock is not to be had at once; nothing has changed then. Called in the
        master. One that is killed here leaves the old limit in force, or the new one.
        """
        old = self.window
        if limit == old.limit:
            return True
        number = self._header.ring_number + 1
        new = self.windows[number % 2]
        new.set(limit, max(limit, old.count()))
        position = 0
        # Taking the lock for a moment lets this process see all that was written under it before.
        while newest := self._lock.try_run(self._take_over, number, position):
            if position:
                new.catch_up(old, position, newest)
            else:
                new.inherit(old, newest)
            position = newest
        if newest is None:
            return False
        self._give_back(1 - number % 2)
        return True

    def _take_over(self, number: int, position: int) -> int:
        """Put the other ring into use, if it has all but a few admissions; 0: it is.

        Otherwise how many admissions there are. Called under the gate's lock.
        """
        header = self._header
        newest: int = header.admissions
        if newest > position + (_FEW if position else 0):
            return newest
        self.windows[number % 2].catch_up(self.window, position, newest)
        header.ring_number = number
        return 0

    def _give_back(self, number: int) -> None:
        """Free the memory of a ring that is not in use. A reader finds times of long ago."""
        self._memory.madvise(mmap.MADV_REMOVE, self._at + number * _RING_SIZE, _RING_SIZE)
