"""The last few errors and security events of each worker, in a ring in the shared memory.

An entry has a checksum, and counts only with the right one. So a reader sees it whole or not at
all, whenever the writer is killed, and in whatever order a machine shows it the writer's stores.
"""

import struct
import zlib
from typing import NamedTuple

EVENTS = 16
_TEXT_SIZE = 344
_ENTRY_SIZE = 5 * 8 + _TEXT_SIZE  # sequence number, time, two numbers, length and checksum, text
SIZE = EVENTS * _ENTRY_SIZE  # bytes
_NUMBERS = struct.Struct("@4q")
_LENGTH_MASK = 0xFFFFFFFF


class Event(NamedTuple):
    """One entry. What `first` and `second` mean is up to the ring's writer."""

    at: int  # CLOCK_REALTIME, nanoseconds
    first: int
    second: int
    text: str


class EventRing:
    """One worker's ring. Written by the worker, under the lock of its statistics."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes."""
        self._text = memory
        self._numbers = memory.cast("q")

    def add(self, at: int, first: int, second: int, text: str) -> None:
        """Write an entry over the oldest one. Its text is shortened to what fits."""
        numbers = self._numbers
        starts = range(0, SIZE // 8, _ENTRY_SIZE // 8)
        start = min(starts, key=lambda each: numbers[each])
        sequence = max(numbers[each] for each in starts) + 1
        encoded = text.encode("utf-8", "backslashreplace")[:_TEXT_SIZE]
        numbers[start + 1] = at
        numbers[start + 2] = first
        numbers[start + 3] = second
        numbers[start + 4] = _seal(sequence, at, first, second, encoded)
        begin = 8 * (start + 5)
        self._text[begin : begin + len(encoded)] = encoded
        numbers[start] = sequence

    def read(self) -> list[Event]:
        """All entries, the newest first."""
        found = []
        for start in range(0, SIZE // 8, _ENTRY_SIZE // 8):
            sequence, at, first, second, seal = self._numbers[start : start + 5].tolist()
            begin = 8 * (start + 5)
            text = bytes(self._text[begin : begin + min(seal & _LENGTH_MASK, _TEXT_SIZE)])
            if sequence and seal == _seal(sequence, at, first, second, text):
                found.append((sequence, Event(at, first, second, text.decode("utf-8", "ignore"))))
        return [event for _, event in sorted(found, reverse=True)]


def _seal(sequence: int, at: int, first: int, second: int, text: bytes) -> int:
    """An entry's length and checksum, in one word."""
    checksum = zlib.crc32(text, zlib.crc32(_NUMBERS.pack(sequence, at, first, second)))
    return (checksum >> 1) << 32 | len(text)
