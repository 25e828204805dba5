"""How often each function was called, and how that went, for the whole daemon.

A function gets a number when it is first called: its place in a table of names that all workers
share, written under the gate's lock. What a worker counts of it stands at that number in the
worker's own part of the memory, so counting takes no lock between processes.

The table has an end; functions that come later are counted together under `OTHERS`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

OTHERS = "(others)"
FUNCTIONS = 1024
_NAME_SIZE = 160  # bytes: 8 for the length; a name has 50 + 1 + 100 characters of ASCII at most
NAMES_SIZE = FUNCTIONS * _NAME_SIZE  # bytes
_FIELDS = 4  # calls, failed, nanoseconds, when the last one ended (CLOCK_MONOTONIC, nanoseconds)
SIZE = 8 * _FIELDS * FUNCTIONS  # bytes


class Counter(Protocol):
    """What counts the names, in the shared memory's header."""

    functions: int


class Count(NamedTuple):
    """What is known of one function."""

    name: str  # module.function
    calls: int
    failed: int
    busy_ns: int


class Names:
    """The table of names. One view of it is one process's."""

    def __init__(self, header: Counter, memory: memoryview) -> None:
        """`memory` is `NAMES_SIZE` bytes."""
        self._header = header
        self._memory = memory
        # Replaced as a whole: another thread may be reading new names at the same time.
        self._names: Sequence[str] = (OTHERS,)

    def number_of(self, name: str) -> int:
        """A function's number; it is given one if it has none. Called under the gate's lock."""
        names = self.all()
        if name in names:
            return names.index(name)
        number = len(names)
        if number >= FUNCTIONS:
            return 0
        text = name.encode("ascii")
        start = number * _NAME_SIZE
        self._memory[start + 8 : start + 8 + len(text)] = text
        self._memory[start : start + 8] = len(text).to_bytes(8, "little")
        self._header.functions = number
        return number

    def all(self) -> Sequence[str]:
        """All names, by their numbers. Called from any thread."""
        names, last = self._names, self._header.functions
        if len(names) <= last:
            names = (*names, *map(self._read, range(len(names), last + 1)))
            self._names = names
        return names

    def _read(self, number: int) -> str:
        start = number * _NAME_SIZE
        length = int.from_bytes(self._memory[start : start + 8], "little")
        return bytes(self._memory[start + 8 : start + 8 + length]).decode("ascii")


class FunctionStats:
    """One worker's counts. Written by the worker, under the lock of its statistics."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes as 64-bit integers."""
        self._memory = memory

    def add(self, number: int, succeeded: bool, duration_ns: int, now: int) -> None:
        """Count a call that has ended now (CLOCK_MONOTONIC, nanoseconds)."""
        memory, start = self._memory, _FIELDS * number
        memory[start] += 1
        if not succeeded:
            memory[start + 1] += 1
        memory[start + 2] += duration_ns
        memory[start + 3] = now

    def read(self, number: int) -> tuple[int, int, int]:
        """A function's calls, failures and nanoseconds."""
        calls, failed, busy_ns = self._memory[_FIELDS * number : _FIELDS * number + 3].tolist()
        return calls, failed, busy_ns

    def latest(self, names: Sequence[str], since: int, most: int) -> list[str]:
        """The functions that ended last, the newest first, but none before `since`."""
        times = self._memory[3 : _FIELDS * len(names) : _FIELDS].tolist()
        recent = sorted(((at, name) for at, name in zip(times, names, strict=True)), reverse=True)
        return [name for at, name in recent[:most] if at > since]


def counts(names: Sequence[str], all_stats: Sequence[FunctionStats]) -> list[Count]:
    """What all workers have counted, for each function that was called."""
    found = []
    for number, name in enumerate(names):
        each = [function_stats.read(number) for function_stats in all_stats]
        calls, failed, busy_ns = (sum(column) for column in zip(*each, strict=True))
        if calls:
            found.append(Count(name, calls, failed, busy_ns))
    return found
