"""How often each function was called, and how that went, for the whole daemon.

A function gets a number when it is first called: its place in a table of names that all workers
share, written under the gate's lock. What a worker counts of it stands at that number in the
worker's own part of the memory, so counting takes no lock between processes.

The table has an end; functions that come later are counted together under `OTHERS`.

Names and counts are read without a lock. A name has a checksum: to a reader that its machine shows
the number of names before the last name itself (as aarch64 may), that one is not there yet. Of the
counts, which are for reports, such a reader may for an instant see some without the others.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cpanbridge.supervisor.memory.robustlock import SharedLock

OTHERS = "(others)"
FUNCTIONS = 1024
# Bytes: 4 each for length and checksum; a name has 50 + 1 + 100 characters of ASCII at most.
_NAME_SIZE = 160
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

    def __init__(self, header: Counter, memory: memoryview, lock: SharedLock) -> None:
        """`memory` is `NAMES_SIZE` bytes; `lock` the gate's."""
        self._header = header
        self._lock = lock
        self._memory = memory
        # Replaced as a whole: another thread may be reading new names at the same time.
        self._names: Sequence[str] = (OTHERS,)

    def number_of(self, name: str) -> int:
        """A function's number; it is given one if it has none."""
        text = name.encode("ascii")
        seal = _seal(text)
        while name not in (names := self.all()):
            number = len(names)
            if number >= FUNCTIONS:
                return 0
            start = number * _NAME_SIZE
            places = slice(start + 8, start + 8 + len(text)), slice(start, start + 8)
            # It fails when another one was added meanwhile.
            self._lock.run(self._add, number, *places, text, seal)
        return names.index(name)

    def _add(self, number: int, text_at: slice, seal_at: slice, text: bytes, seal: bytes) -> int:
        """Called under the gate's lock."""
        if self._header.functions == number - 1:
            self._memory[text_at] = text
            self._memory[seal_at] = seal
            self._header.functions = number
        return 0

    def all(self) -> Sequence[str]:
        """All names, by their numbers. Called from any thread."""
        names, last = self._names, self._header.functions
        if len(names) <= last:
            new: list[str] = []
            while len(names) + len(new) <= last:
                name = self._read(len(names) + len(new))
                if name is None:
                    break
                new.append(name)
            names = self._names = (*names, *new)
        return names

    def of(self, number: int) -> str:
        """A function's name, as far as it is to be seen."""
        names = self.all()
        return names[number] if number < len(names) else OTHERS

    def _read(self, number: int) -> str | None:
        """A name; None when it is not to be seen whole yet."""
        start = number * _NAME_SIZE
        seal = bytes(self._memory[start : start + 8])
        length = int.from_bytes(seal[:4], "little")
        text = bytes(self._memory[start + 8 : start + 8 + min(length, _NAME_SIZE - 8)])
        return text.decode("ascii") if text and seal == _seal(text) else None


def _seal(text: bytes) -> bytes:
    """A name's length and checksum."""
    return len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")


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
