"""How long requests took, over the last five minutes, without keeping a list of them.

Each worker counts its requests in buckets, in a ring of half-minute slices in its part of the
shared memory. A bucket is a sixteenth of its octave wide, so any percentile is told with at most
3.2 % error, from a microsecond to a day, and a request costs the same however many there were.
Each slice also counts the requests that failed.

A slice says which half minute it counts. The worker that finds an old one empties it before it says
so, so a reader never takes an old count for a new one, whenever the writer is killed. (On a machine
that reorders stores a report may do so for an instant, once in half a minute.)
"""

import operator
import time
from collections.abc import Iterable, Iterator, Sequence

SLICE_NS = 30 * 1_000_000_000
SLICES = 11  # ten that are over, and the present one
_UNIT_BITS = 6  # durations are counted in 64 ns
_LINEAR = 16  # units below this have a bucket each; above, an octave has as many
BUCKETS = 38 * _LINEAR  # up to 2**47 ns, which is a day and a half
_SLICE_SIZE = 2 + BUCKETS  # which half minute it counts, the failed ones, the buckets
SIZE = 8 * SLICES * _SLICE_SIZE  # bytes

_EMPTY = memoryview(bytes(8 * (1 + BUCKETS))).cast("q")


class Histogram:
    """One worker's counts. Written by the worker, under the lock of its statistics."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes as 64-bit integers."""
        self._memory = memory

    def add(self, duration_ns: int, succeeded: bool, now: int) -> None:
        """Count a request that took so long and ended now (CLOCK_MONOTONIC, nanoseconds)."""
        memory = self._memory
        current = 1 + now // SLICE_NS  # 0 stands for an empty slice
        start = current % SLICES * _SLICE_SIZE
        if memory[start] != current:
            memory[start + 1 : start + _SLICE_SIZE] = _EMPTY
            memory[start] = current
        units = duration_ns >> _UNIT_BITS
        octave = units.bit_length() - 5
        bucket = (octave << 4) + (units >> octave) if octave > 0 else units
        memory[start + 2 + min(bucket, BUCKETS - 1)] += 1
        if not succeeded:
            memory[start + 1] += 1

    def recent(self) -> Iterator[memoryview]:
        """Each slice of the last five minutes: its failures, and then the buckets."""
        oldest = 1 + time.monotonic_ns() // SLICE_NS - SLICES + 1
        for start in range(0, SLICES * _SLICE_SIZE, _SLICE_SIZE):
            if self._memory[start] >= max(1, oldest):
                yield self._memory[start + 1 : start + _SLICE_SIZE]


class Latencies:
    """How long the requests of the last five minutes took, over all workers."""

    def __init__(self, failed: int, counts: Sequence[int]) -> None:
        self.failed = failed
        self.requests = sum(counts)
        self._counts = counts

    @property
    def error_rate(self) -> float:
        """The share of them that failed."""
        return self.failed / self.requests if self.requests else 0.0

    @property
    def average_seconds(self) -> float:
        """How long one took, with at most 3.2 % error."""
        seconds = sum(count * _middle(each) for each, count in enumerate(self._counts) if count)
        return seconds / self.requests if self.requests else 0.0

    def percentile(self, percent: float) -> float:
        """The seconds within which so many percent of them were done; 0.0 without any."""
        rank = percent / 100 * self.requests
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return _middle(bucket)
        return 0.0


def merged(histograms: Iterable[Histogram]) -> Latencies:
    """All workers' counts together."""
    sums = [0] * (1 + BUCKETS)
    for histogram in histograms:
        for each in histogram.recent():
            sums = list(map(operator.add, sums, each))
    return Latencies(sums[0], sums[1:])


def _middle(bucket: int) -> float:
    """The middle of a bucket, in seconds."""
    octave = max(0, (bucket >> 4) - 1)
    units = bucket - (octave << 4)
    return ((units + 0.5) * (1 << octave) * (1 << _UNIT_BITS)) / 1e9
