"""A table of each worker's connections in the shared memory, for reports.

The gate's counters decide what may be connected, and are exact; this table lists a worker's first
thousand connections. Beside each stands what it has run last and for whom: so the master can name
what a worker was running when it died.

Nothing is decided by this table, and it is read without a lock. On a machine that reorders stores
(aarch64) a report may for an instant show a connection with a field of the one before it. What a
worker that has ended has written is all there.
"""

import struct
from collections import deque
from typing import NamedTuple

LISTED = 1024
_FIELDS = 5
_UNLISTED = _FIELDS * LISTED  # the last entry is for all that are not listed
_CALL = struct.Struct("@qq112s")  # the function's number, the client's pid, the caller in UTF-8
_CALL_SIZE = _CALL.size
_record = _CALL.pack_into  # for each request: looked up once
_CALLS_AT = 8 * _FIELDS * (LISTED + 1)  # bytes; apart, so that listing connections reads no more
SIZE = _CALLS_AT + _CALL_SIZE * (LISTED + 1)  # bytes

# What a connection is doing.
READING = 1  # it waits for the rest of a request
WAITING = 2  # its request waits for room
RUNNING = 3
REPLYING = 4
IDLE = 5  # kept by its client, between two requests

STATUS_NAMES = {
    READING: "reading",
    WAITING: "waiting",
    RUNNING: "running",
    REPLYING: "replying",
    IDLE: "idle",
}

_NUMBER, _OPENED_AT, _LAST_ACTIVITY, _REQUESTS, _STATUS = range(_FIELDS)


class Connection(NamedTuple):
    """One connection as it stands in the table. Times are CLOCK_MONOTONIC nanoseconds."""

    number: int  # counts up in its slot
    opened_at: int
    last_activity: int  # a byte came in or a request ended
    requests: int
    status: int

    def is_stale(self, now: int, stale_timeout: float) -> bool:
        """Whether its client has been silent for long, while it was the client's turn."""
        silent = (now - self.last_activity) / 1e9
        return self.status in (READING, IDLE) and silent > stale_timeout


class RunningCall(NamedTuple):
    """What a connection is running."""

    function: int  # see function_stats.py
    pid: int  # the client's; 0: not known
    caller: str  # as the client says, perhaps shortened; empty: it does not say


class ConnectionTable:
    """One worker's table. Written by the thread that serves the connection."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is `SIZE` bytes as 64-bit integers."""
        self.memory = memory

    def connections(self) -> list[Connection]:
        """Those that are listed now."""
        found = []
        for start in range(0, _UNLISTED, _FIELDS):
            if self.memory[start]:
                entry = Connection(*self.memory[start : start + _FIELDS].tolist())
                if entry.number and entry.status:
                    found.append(entry)
        return found

    def running(self) -> list[RunningCall]:
        """What the listed connections run. For a worker that has ended, or a glance at others."""
        calls = []
        for entry in range(0, _UNLISTED, _FIELDS):
            if self.memory[entry] and self.memory[entry + _STATUS] == RUNNING:
                function, pid, caller = _CALL.unpack_from(
                    self.memory, _CALLS_AT + entry // _FIELDS * _CALL_SIZE
                )
                text = caller.rstrip(b"\0").decode("utf-8", "replace")
                calls.append(RunningCall(function, pid, text))
        return calls

    def clear(self) -> None:
        """Remove all, once their worker has ended. Called in the master."""
        for start in range(0, _UNLISTED, _FIELDS):
            self.memory[start] = 0


class ConnectionTableWriter:
    """The worker's side. An entry is named by the index at which it begins."""

    def __init__(self, connection_table: ConnectionTable) -> None:
        self._memory = connection_table.memory
        self._free = deque(range(0, _UNLISTED, _FIELDS))

    def enter(self, number: int, now: int) -> int:
        """List a new connection; returns its entry."""
        try:
            entry = self._free.pop()
        except IndexError:
            entry = _UNLISTED
        memory = self._memory
        memory[entry + _OPENED_AT] = now
        memory[entry + _LAST_ACTIVITY] = now
        memory[entry + _REQUESTS] = 0
        memory[entry + _STATUS] = READING
        memory[entry] = number
        return entry

    def requests(self, entry: int) -> int:
        """How many requests a connection has had."""
        return self._memory[entry + _REQUESTS]

    def resume(self, entry: int, opened_at: int, requests: int) -> None:
        """Take over the history of a connection that was another worker's before."""
        self._memory[entry + _OPENED_AT] = opened_at
        self._memory[entry + _REQUESTS] = requests

    def heard(self, entry: int, now: int) -> None:
        """Some bytes of a request were received."""
        self._memory[entry + _LAST_ACTIVITY] = now
        self._memory[entry + _STATUS] = READING

    def is_doing(self, entry: int, status: int) -> None:
        """Set what a connection is doing now."""
        self._memory[entry + _STATUS] = status

    def runs(self, entry: int, function: int, pid: int, caller: str | None) -> None:
        """One more request of it runs: see RunningCall."""
        memory = self._memory
        text = caller.encode("utf-8", "replace") if caller else b""
        _record(memory, _CALLS_AT + entry // _FIELDS * _CALL_SIZE, function, pid, text)
        memory[entry + _REQUESTS] += 1
        memory[entry + _STATUS] = RUNNING

    def ran(self, entry: int, now: int) -> None:
        """Its request has ended, and the reply is on its way."""
        self._memory[entry + _LAST_ACTIVITY] = now
        self._memory[entry + _STATUS] = REPLYING

    def leave(self, entry: int) -> None:
        """Take a connection off the list."""
        if entry != _UNLISTED:
            self._memory[entry] = 0
            self._free.append(entry)
