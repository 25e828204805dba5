"""The rings of admission times: the one in use, and how another takes its place.

They stand at the end of the shared memory, one after the other. When a reload changes the rate
limit, a ring for the new limit is added, takes over what the old one knows of the last minute, and
becomes the current one by one store. The memory of a ring that was replaced twice is given back.
"""

import mmap
import os

from cpanbridge.supervisor.memory.fields import Header, Ring
from cpanbridge.supervisor.memory.rate_window import Window, entries_for


class AdmissionRings:
    """All rings of one daemon. `fd` is the shared memory, up to whose end they stand."""

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd
        self._header = header
        # With its number, in one attribute: two threads of a worker may map the same ring at once.
        self._mapped: tuple[int, Window] | None = None

    @property
    def window(self) -> Window:
        """The ring in use. Called under the gate's lock, or for a report."""
        number: int = self._header.ring_number
        mapped = self._mapped
        if mapped is None or mapped[0] != number:
            mapped = self._mapped = number, self._map(self._header.rings[number % 2])
        return mapped[1]

    def begin(self, limit: int) -> None:
        """Make the first ring. Called once, when the memory is laid out."""
        self._add(limit, 0, None)

    def resize(self, limit: int) -> None:
        """Change the rate limit, and keep what is known of the last minute.

        Called in the master under the gate's lock. Raises OSError when there is no memory; nothing
        has changed then. A master that is killed here leaves the old limit in force.
        """
        old = self.window
        if limit != old.limit:
            self._add(limit, self._header.ring_number + 1, old)

    def _add(self, limit: int, number: int, old: Window | None) -> None:
        at = os.fstat(self._fd).st_size
        keeps = max(limit, old.count() if old is not None else 0)
        os.ftruncate(self._fd, at + in_pages(8 * entries_for(limit, keeps)))
        ring = self._header.rings[number % 2]
        if ring.at:
            self._give_back(ring)
            ring.at = 0
        ring.limit, ring.keeps, ring.at = limit, keeps, at  # in this order: `at` makes it valid
        if old is not None:
            self._map(ring).inherit(old)
        self._header.ring_number = number

    def _give_back(self, ring: Ring) -> None:
        """Free a ring that was replaced twice. The file keeps its size, with a hole.

        A reader that still has it mapped, without the lock, finds times of long ago.
        """
        with mmap.mmap(self._fd, _size_of(ring), offset=ring.at) as memory:
            memory.madvise(mmap.MADV_REMOVE)

    def _map(self, ring: Ring) -> Window:
        memory = mmap.mmap(self._fd, _size_of(ring), offset=ring.at)
        return Window(self._header, memoryview(memory).cast("q"), ring.limit, ring.keeps)


def _size_of(ring: Ring) -> int:
    return 8 * entries_for(ring.limit, ring.keeps)


def in_pages(size: int) -> int:
    """Round up to whole pages, in bytes."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
