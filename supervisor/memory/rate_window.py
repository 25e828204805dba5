"""The admissions of the last 60 seconds, kept in a ring in the shared memory.

With a limit of N a minute the ring holds the time of each of the last N admissions, and a request
may be admitted when the entry N places back has left the window: one comparison, whatever the load,
and exact in every interval, wherever it starts.

Without a limit there is nothing to decide, only to count. Then the ring holds runs: for each
millisecond in which a request was admitted, its time and how many had been admitted before. A
minute has at most 60,000 of them, however many requests there are, and the count is true to a
millisecond.

Times are CLOCK_MONOTONIC in nanoseconds. `record` and `free_at` are called under the gate's lock;
`count` without. A process that is killed between writing an entry and counting it has changed
nothing: the ring has one entry more than the window, so the entry being written never decides.
"""

import time
from array import array
from collections.abc import Iterator
from typing import Protocol

from cpanbridge.supervisor.memory.fields import Ring

WINDOW_NS = 60 * 1_000_000_000
_MS = 1_000_000
RUNS = WINDOW_NS // _MS + 2
_LONG_AGO = -WINDOW_NS


def entries_for(limit: int, keeps: int) -> int:
    """How many 64-bit entries a ring has; see Window."""
    return keeps + 1 if limit else 2 * RUNS


class RingCounts(Protocol):
    """What counts a ring's entries, in the shared memory's header."""

    admissions: int
    runs: int


class Window:
    """One ring, as `header.admissions` and `header.runs` count it. `memory` has room for any limit.

    Functions that are called under the gate's lock create no container.
    """

    def __init__(self, header: RingCounts, ring: Ring, memory: memoryview) -> None:
        self._header = header
        self._fields = ring
        self._ring = memory  # times of admissions; or of runs, and RUNS places on their numbers

    @property
    def limit(self) -> int:
        """The requests allowed in a minute; 0: no limit."""
        return int(self._fields.limit)

    @property
    def size(self) -> int:
        """How many of the entries are in use."""
        return entries_for(self.limit, self._keeps)

    @property
    def _keeps(self) -> int:
        """How many admissions, or runs, it remembers."""
        return int(self._fields.keeps)

    def set(self, limit: int, keeps: int) -> None:
        """Use the ring, which nobody does, for another limit.

        `keeps` is how many admissions it remembers: as many as the limit, or more after a limit was
        lowered, in case it is raised again.
        """
        self._fields.limit = limit
        self._fields.keeps = keeps if limit else RUNS - 1

    def free_at(self) -> int:
        """When the next request may be admitted; a time that is over when it may be now."""
        limit = self._fields.limit
        decisive = self._header.admissions - limit
        if decisive < 0 or not limit:
            return _LONG_AGO
        oldest: int = self._ring[decisive % (self._fields.keeps + 1)]
        return oldest + WINDOW_NS + 1

    def record(self, now: int) -> None:
        """Count an admission."""
        position = self._header.admissions
        self._write(position, now)
        self._header.admissions = position + 1

    def _write(self, position: int, at: int) -> None:
        fields, ring = self._fields, self._ring
        if fields.limit:
            ring[position % (fields.keeps + 1)] = at
            return
        runs = self._header.runs
        if not runs or at // _MS != ring[(runs - 1) % RUNS] // _MS:
            ring[runs % RUNS] = at
            ring[RUNS + runs % RUNS] = position
            self._header.runs = runs + 1

    def count(self) -> int:
        """Requests admitted in the last 60 seconds: O(log window), without the lock."""
        header = self._header
        since = time.monotonic_ns() - WINDOW_NS
        if self.limit:
            newest = header.admissions
            return newest - self._first_after(since, newest)
        newest = header.runs
        first = self._first_after(since, newest)
        # The admissions are read last: never fewer than there were before the first run.
        before = self._ring[RUNS + first % RUNS] if first < newest else header.admissions
        return header.admissions - before

    def _first_after(self, since: int, newest: int, low: int = 0) -> int:
        """The first entry from `low` on that is later than `since`; `newest` when none is."""
        low, high = max(low, newest - self._keeps), newest
        size = self._keeps + 1
        while low < high:
            middle = (low + high) // 2
            if self._ring[middle % size] > since:
                high = middle
            else:
                low = middle + 1
        return low

    # -- replacing one ring by another, when a reload changes the limit --

    def inherit(self, old: "Window", newest: int) -> None:
        """Take over what an older ring knows of the first `newest` admissions.

        An admission whose exact time the old ring does not have is taken to be as late as it can
        have been, so that no minute ever gets more than its limit.
        """
        if not self.limit:
            self._header.runs = 0
            for at, position in old.by_millisecond(newest):
                self._write(position, at)
            return
        first = known = max(0, newest - self._keeps)
        if old.limit:
            known = max(first, newest - old._keeps)
            for begin, end in self._unbroken(known, newest):
                for start, stop in old._unbroken(begin, end):
                    here, there = start % self._size, start % old._size
                    self._ring[here : here + stop - start] = old._ring[there : there + stop - start]
        else:
            known = newest
            for at, position in reversed(list(old.by_millisecond(newest))):
                begin = max(first, position)
                self._fill(begin, known, at + _MS)
                known = begin
        self._fill(first, known, _LONG_AGO)

    def catch_up(self, old: "Window", position: int, newest: int) -> None:
        """The same for the admissions from `position` on. Called under the gate's lock as well."""
        ring = old._ring
        if old._fields.limit:
            size = old._fields.keeps + 1
            while position < newest:
                self._write(position, ring[position % size])
                position += 1
            return
        run = self._header.runs
        while position < newest:
            run -= 1
            before = ring[RUNS + run % RUNS]
            while newest > before and newest > position:
                newest -= 1
                self._write(newest, ring[run % RUNS] + _MS)

    @property
    def _size(self) -> int:
        return self._keeps + 1

    def by_millisecond(self, newest: int) -> Iterator[tuple[int, int]]:
        """The time of each millisecond with admissions in the window, and what was before it."""
        since = time.monotonic_ns() - WINDOW_NS
        if not self.limit:
            runs = self._header.runs
            for run in range(self._first_after(since, runs), runs):
                yield self._ring[run % RUNS], self._ring[RUNS + run % RUNS]
            return
        position = self._first_after(since, newest)
        while position < newest:
            at = self._ring[position % self._size]
            yield at, position
            position = self._first_after(at // _MS * _MS + _MS - 1, newest, position)

    def _fill(self, first: int, end: int, value: int) -> None:
        for start, stop in self._unbroken(first, end):
            here = start % self._size
            self._ring[here : here + stop - start] = array("q", [value]) * (stop - start)

    def _unbroken(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Positions `first` to `end`, in pieces that do not wrap around the ring."""
        while first < end:
            stop = min(end, first + self._size - first % self._size)
            yield first, stop
            first = stop
