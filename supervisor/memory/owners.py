"""Which worker has which state: a table in the shared memory.

A row says that what this client process keeps for this module is in that worker. A worker is named
by its slot and its incarnation, which changes when it ends: so a row outlives its worker, and a
reader of the row knows that the state is lost. A worker removes its own rows, and those of workers
that have ended.

The table is open addressed: a row stands at the place that its client hashes to, or at one of the
next. All rows of a client are found in one go, from there to the first place that was never used.
Every change is one store: a row counts from the moment that its state says so. A process killed
between any two stores leaves the table as it was, or as it should be: the lock, which passes to the
next one, orders them.

Called under the gate's lock, but for what says otherwise; so an owner is told as one number.
Whether there are a few rows or thousands, finding one takes the same time.
"""

from collections.abc import Iterator
from typing import NamedTuple

_NEVER, _USED, _GONE = 0, 1, 2
_COLUMNS = 5  # pid, start, uid, module, owner: 64 bits each
_SLOTS = 1 << 16  # more than there ever are
_MIX_PID, _MIX_START = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


class ClientProcess(NamedTuple):
    """Whose state it is: a client process, which its pid and start time tell, and its user.

    The user is the one that it had when it connected. If the kernel tells no process, the
    connection stands for its client: `pid` is `BY_CONNECTION` then, and `start` the inode of its
    socket.
    """

    pid: int
    start: int
    uid: int = 0


BY_CONNECTION = -1


NOBODY = -1  # in place of an owner's number


class Owner(NamedTuple):
    """A worker, as long as it lives."""

    slot: int
    incarnation: int

    @property
    def number(self) -> int:
        """Both in one number."""
        return self.incarnation * _SLOTS + self.slot

    @classmethod
    def of(cls, number: int) -> "Owner":
        """The owner that has this number."""
        return cls(number % _SLOTS, number // _SLOTS)


def owner_number(slot: int, incarnation: int) -> int:
    """As `Owner.number`, without an object."""
    return incarnation * _SLOTS + slot


def slot_of(owner: int) -> int:
    """The slot of an owner's number."""
    return owner % _SLOTS


def incarnation_of(owner: int) -> int:
    """The incarnation of an owner's number."""
    return owner // _SLOTS


def places_for(rows: int) -> int:
    """How many places a table has that holds so many rows: at least twice as many."""
    return max(64, 1 << (2 * rows - 1).bit_length())


def size_for(rows: int) -> int:
    """How many bytes a table takes."""
    return places_for(rows) * (1 + 8 * _COLUMNS)


class OwnerTable:
    """One table. `memory` is `size_for(rows)` bytes."""

    def __init__(self, memory: memoryview, rows: int) -> None:
        self.rows = rows
        places = places_for(rows)
        self._mask = places - 1
        self._states = memory[:places]
        numbers = memory[places:].cast("q")
        self._pids, self._starts, self._uids, self._modules, self._owners = (
            numbers[n * places : (n + 1) * places] for n in range(_COLUMNS)
        )

    def find(self, process: ClientProcess, module: int) -> int:
        """The number of the worker where the state is, or was; NOBODY when there is none."""
        index, step = self._home(process), 0
        while step <= self._mask and self._states[index] != _NEVER:
            if self._modules[index] == module and self._is_row_of(process, index):
                return self._owners[index]
            index = (index + 1) & self._mask
            step += 1
        return NOBODY

    def insert(self, process: ClientProcess, module: int, owner: int) -> bool:
        """Add a row, which is not there yet; False when all are taken."""
        # Counting takes a few microseconds, and a counter could be wrong after a kill.
        if bytes(self._states).count(_USED) >= self.rows:
            return False
        index = self._home(process)
        while self._states[index] == _USED:
            index = (index + 1) & self._mask
        self._pids[index] = process.pid
        self._starts[index] = process.start
        self._uids[index] = process.uid
        self._modules[index] = module
        self._owners[index] = owner
        self._states[index] = _USED
        return True

    def remove(self, process: ClientProcess, owner: int) -> int:
        """Take out all of a client's rows that tell this owner; how many there were."""
        index, step, found = self._home(process), 0, 0
        while step <= self._mask and self._states[index] != _NEVER:
            if self._owners[index] == owner and self._is_row_of(process, index):
                self._take_out(index)
                found += 1
            index = (index + 1) & self._mask
            step += 1
        return found

    def all(self) -> Iterator[tuple[ClientProcess, Owner]]:
        """Every row. Without the lock it is a glance: check what you find before you act on it."""
        for index, state in enumerate(bytes(self._states)):
            if state == _USED:
                process = ClientProcess(self._pids[index], self._starts[index], self._uids[index])
                yield process, Owner.of(self._owners[index])

    def _is_row_of(self, process: ClientProcess, index: int) -> bool:
        return (
            self._states[index] == _USED
            and self._pids[index] == process.pid
            and self._starts[index] == process.start
            and self._uids[index] == process.uid
        )

    def _home(self, process: ClientProcess) -> int:
        mixed = process.pid * _MIX_PID + process.start * _MIX_START
        return (mixed >> 24) & self._mask

    def _take_out(self, index: int) -> None:
        self._states[index] = _GONE
        # If no row follows, a search may end here: so searches stay short.
        if self._states[(index + 1) & self._mask] == _NEVER:
            while self._states[index] == _GONE:
                self._states[index] = _NEVER
                index = (index - 1) & self._mask
