"""The memory that the master and its workers share.

One memfd, laid out by the master before it forks and mapped by every process: a header, the names
of the functions, one slot for each worker with its statistics, the tables that tell which worker
has what state, and the ring of admission times. It has no name in any file system, so a killed
master leaves nothing behind, and the descriptor can be passed on to a master that takes over.

There are more slots than workers: while one generation drains, the next one takes free slots.
`slots_used` says how many have ever been used, so that nobody has to read further.

This is the only file that knows where a part begins; all others say `slot.opened` or
`shared.counters.running`. The fields, and who writes them, are in `fields.py`.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized, synchronized
from typing import Any, NamedTuple, cast

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import (
    admission_rings,
    connection_table,
    event_ring,
    function_stats,
    handoff_claims,
    histogram,
    owners,
)
from cpanbridge.supervisor.memory.admission_rings import AdmissionRings, in_pages
from cpanbridge.supervisor.memory.connection_table import ConnectionTable
from cpanbridge.supervisor.memory.event_ring import EventRing
from cpanbridge.supervisor.memory.fields import (
    COMMAND_NONE,
    DEATHS_KEPT,
    LAYOUT,
    REASONS,
    RETIREMENT_NONE,
    WAITS_FOR_NOTHING,
    Header,
    Slot,
)
from cpanbridge.supervisor.memory.function_stats import FunctionStats, Names
from cpanbridge.supervisor.memory.handoff_claims import Claims
from cpanbridge.supervisor.memory.histogram import Histogram
from cpanbridge.supervisor.memory.overload_state import SCALE
from cpanbridge.supervisor.memory.owners import Owner, OwnerTable
from cpanbridge.supervisor.memory.rate_window import Window
from cpanbridge.supervisor.memory.robustlock import SharedLock

MODULE_OWNERS = 1024  # modules whose state all clients share

_CACHE_LINE = 64
_ORDER_SECONDS = 0.002  # the lock is held for microseconds


class Counters(NamedTuple):
    """The gate's counters of the whole daemon, each as `multiprocessing.Value` gives it.

    They stand in the header, and all have the gate's lock. `with counters.running.get_lock():`
    holds it, and `counters.running.value` reads or writes under it. Code that must not wait for
    the lock, or holds it already, reads `counters.running.get_obj().value`.
    """

    connections: "Synchronized[int]"  # open, or about to be accepted
    running: "Synchronized[int]"  # requests
    admissions: "Synchronized[int]"  # requests ever admitted
    waiting: "Synchronized[int]"  # requests, and threads that accept
    overload_state: "Synchronized[int]"  # GATE_OPEN or GATE_CLOSED


class Statistics(NamedTuple):
    """What a slot's worker records of its work, for reports. Not cleared when it dies."""

    histogram: Histogram  # how long requests took
    waits: Sequence[Histogram]  # how long they waited, for each of fields.REASONS
    function_stats: FunctionStats  # of each function
    connection_table: ConnectionTable  # of its connections
    errors: EventRing  # the last failed requests: nanoseconds, the function's number, the error
    events: EventRing  # the last security events: the client's pid and uid, the event


class LayoutError(Exception):
    """The memory was laid out by other code; it cannot be read."""


def slot_capacity(workers: int) -> int:
    """How many slots a daemon of so many workers has: room for two generations and more."""
    return max(64, 3 * workers)


class Shared:
    """The mapped memory: made once by `create`, in the master; workers inherit it by fork."""

    def __init__(self, fd: int, capacity: int, max_sessions: int) -> None:
        """Map memory that is laid out for so many. See `create` and `attach`."""
        self.fd = fd
        rings_at = _rings_at(capacity, max_sessions)
        self._memory = mmap.mmap(fd, rings_at + admission_rings.SIZE)
        self.header = Header.from_buffer(self._memory)
        self.lock = SharedLock(_lock_of(self.header))  # the gate's
        self.counters = Counters(*(self._counter(name) for name in Counters._fields))
        self.slots = [Slot.from_buffer(self._memory, _slot_at(n)) for n in range(capacity)]
        view = memoryview(self._memory)
        names = view[_NAMES_AT : _NAMES_AT + function_stats.NAMES_SIZE]
        self.names = Names(self.header, names, self.lock)
        self.statistics = [_statistics(view, _claims_at(n) + _CLAIMS_SIZE) for n in range(capacity)]
        self.claims = [
            Claims(view[_claims_at(n) : _claims_at(n) + handoff_claims.SIZE].cast("q"))
            for n in range(capacity)
        ]
        at = _owners_at(capacity)
        end = at + owners.size_for(MODULE_OWNERS)
        self.module_owners = OwnerTable(view[at:end], MODULE_OWNERS)
        at, end = end, end + owners.size_for(max_sessions)
        self.sessions = OwnerTable(view[at:end], max_sessions)
        self.rings = AdmissionRings(self._memory, rings_at, self.header, self.lock)

    @classmethod
    def create(cls, capacity: int, limits: Limits, used: int | None = None) -> "Shared":
        """Lay out new memory. `used` is the slots that have a worker from the start: all."""
        fd = os.memfd_create("cpanbridged", os.MFD_CLOEXEC)
        os.ftruncate(fd, _rings_at(capacity, limits.max_sessions) + admission_rings.SIZE)
        shared = cls(fd, capacity, limits.max_sessions)
        header = shared.header
        SharedLock.create(_lock_of(header))
        header.layout = LAYOUT
        header.capacity = capacity
        header.max_sessions = limits.max_sessions
        header.slots_used = capacity if used is None else used
        header.started_at = time.time_ns()
        header.started_monotonic = time.monotonic_ns()
        shared.rings.begin(limits.max_requests_per_minute)
        shared.apply_limits(limits)
        return shared

    @classmethod
    def attach(cls, fd: int) -> "Shared":
        """Map memory that another process has laid out. Raises LayoutError."""
        if os.fstat(fd).st_size < ctypes.sizeof(Header):
            raise LayoutError("too small to be cpanbridged's")
        with mmap.mmap(fd, ctypes.sizeof(Header)) as memory:
            header = Header.from_buffer_copy(memory)
        if header.layout != LAYOUT:
            raise LayoutError(f"its layout is {header.layout}, and this version's is {LAYOUT}")
        shared = cls(fd, header.capacity, header.max_sessions)
        shared.header.recount = 1  # the master before may have been killed while it cleared a slot
        return shared

    def _counter(self, name: str) -> "Synchronized[int]":
        at = getattr(Header, name).offset
        field = ctypes.c_int64.from_buffer(self._memory, at)
        return synchronized(field, cast(Any, self.lock))  # any lock with acquire and release

    def request_cleanup(self) -> int:
        """Have all workers close their stale connections. Called under the gate's lock."""
        self.header.cleanups += 1
        self.header.cleanup_at = time.monotonic_ns()
        return 0

    def record_death(self) -> None:
        """A worker has ended without being told to. Called in the master."""
        header = self.header
        header.death_times[header.deaths % DEATHS_KEPT] = time.monotonic_ns()
        header.deaths += 1

    def deaths_within(self, seconds: float) -> int:
        """Workers that died in the last so many seconds; at most `DEATHS_KEPT`."""
        since = time.monotonic_ns() - int(seconds * 1e9)
        kept = min(self.header.deaths, DEATHS_KEPT)
        return sum(at > since for at in self.header.death_times[:kept])

    def use_slot(self, number: int) -> None:
        """From now on a worker may be in this slot. Called in the master."""
        self.header.slots_used = max(self.header.slots_used, number + 1)

    @property
    def used_slots(self) -> list[Slot]:
        """The slots that a worker may have, or has had."""
        return self.slots[: self.header.slots_used]

    @property
    def uptime(self) -> float:
        """Seconds since the daemon started."""
        started: int = self.header.started_monotonic
        return (time.monotonic_ns() - started) / 1e9

    def connections(self) -> int:
        """Client connections open in all workers, by their slots."""
        return sum(slot.connections for slot in self.used_slots)

    def running(self) -> int:
        """Requests running in all workers, by their slots."""
        return sum(slot.running for slot in self.used_slots)

    def admitted_in_window(self) -> int:
        """Requests admitted in the last 60 seconds."""
        return self.window.count()

    def owner(self, slot: int) -> Owner:
        """The worker that has the slot now, as an owner of state."""
        return Owner(slot, self.slots[slot].incarnation)

    def workers(self) -> list[tuple[Owner, Slot]]:
        """The workers in the used slots, as owners of state, and their slots.

        A worker is named before its slot is read: what is found there, such as that it serves, is
        never another's, that has come into the slot since. So nobody hands a client to a worker
        that does not serve yet.
        """
        return [(self.owner(number), slot) for number, slot in enumerate(self.used_slots)]

    def is_there(self, owner: Owner) -> bool:
        """Whether the worker still lives, as far as the master has seen."""
        return bool(self.slots[owner.slot].incarnation == owner.incarnation)

    def clear(self, slot: Slot) -> None:
        """Give back what a dead worker held. Called in the master, once the process is gone.

        Its sockets are closed by then and its threads have ended, so nobody else writes to the
        slot, and the lock need not be held. The next process that decides about room counts anew.
        """
        # First: a worker that takes over one of its clients has counted that client before.
        self.claims[self.slots.index(slot)].cancel_all()
        slot.serves = 0
        slot.incarnation += 1
        slot.command = COMMAND_NONE
        slot.exit_by = 0
        slot.shut = 0
        slot.retirement_request = RETIREMENT_NONE
        slot.call_deadline = 0
        slot.closed = slot.opened
        slot.failed = slot.admitted - slot.succeeded  # what was running is lost
        slot.accept_waits_for = WAITS_FOR_NOTHING
        slot.request_waits_for = WAITS_FOR_NOTHING
        slot.queued = 0
        slot.first_ticket = 0
        slot.passed_over_at = 0
        slot.sessions = 0
        slot.memory = 0
        if self.header.awake_acceptor == 1 + self.slots.index(slot):
            self.header.awake_acceptor = 0
        # Makes the stores above count, so whoever sees it must see them: the lock orders them. If
        # it is not to be had, its holder is stopped, and they are there when it is free.
        ordered = self.lock.acquire(timeout=_ORDER_SECONDS)
        self.header.recount = 1
        if ordered:
            self.lock.release()
        self.statistics[self.slots.index(slot)].connection_table.clear()
        slot.pid = 0  # last: if this master is killed before, the next one clears the slot anew

    def recount(self) -> None:
        """Count anew what is taken, after a worker has died. Called under the gate's lock.

        A worker that died between two stores may have counted in one place and not in the other:
        the slots are right, for the master has cleared that worker's.
        """
        self.header.recount = 0  # first: a worker that dies from now on is counted out again
        connections = running = waiting = number = 0
        while number < self.header.slots_used:
            slot = self.slots[number]
            connections += slot.connections
            running += slot.running
            waiting += slot.waiting
            number += 1
        self.header.connections = connections
        self.header.running = running
        self.header.waiting = waiting

    # -- the limits, which a reload may change for all generations at once --

    @property
    def window(self) -> Window:
        """The admissions of the last minute; another one after a reload that changes the limit."""
        return self.rings.window

    def apply_limits(self, limits: Limits) -> bool:
        """Let these limits hold. Called in the master.

        False when the gate's lock is not to be had at once; nothing has changed then.
        """
        if not self.rings.try_to_resize(limits.max_requests_per_minute):
            return False
        # Each is one store, so no lock is needed: a decision is by the old ones or the new ones.
        header = self.header
        header.max_connections = limits.max_connections
        header.max_concurrent_requests = limits.max_concurrent_requests
        header.max_memory_mb = limits.max_memory_mb
        header.max_cpu = round(limits.max_cpu_percent * SCALE)
        return True


def _lock_of(header: Header) -> int:
    return ctypes.addressof(header) + Header.lock.offset


def _padded(size: int) -> int:
    """Round up to whole cache lines, so that workers do not write into each other's."""
    return -(-size // _CACHE_LINE) * _CACHE_LINE


_NAMES_AT = _padded(ctypes.sizeof(Header))
_STATISTICS = (
    *(histogram.SIZE,) * (1 + len(REASONS)),
    function_stats.SIZE,
    connection_table.SIZE,
    event_ring.SIZE,
    event_ring.SIZE,
)
_CLAIMS_SIZE = _padded(handoff_claims.SIZE)
_SLOT_SIZE = _padded(ctypes.sizeof(Slot)) + _CLAIMS_SIZE + sum(map(_padded, _STATISTICS))


def _slot_at(number: int) -> int:
    return _NAMES_AT + _padded(function_stats.NAMES_SIZE) + number * _SLOT_SIZE


def _claims_at(number: int) -> int:
    return _slot_at(number) + _padded(ctypes.sizeof(Slot))


def _statistics(memory: memoryview, at: int) -> Statistics:
    parts = []
    for size in _STATISTICS:
        parts.append(memory[at : at + size])
        at += _padded(size)
    *histograms, calls, connections, errors, events = parts
    times, *waits = (Histogram(each.cast("q")) for each in histograms)
    return Statistics(
        times,
        waits,
        FunctionStats(calls.cast("q")),
        ConnectionTable(connections.cast("q")),
        EventRing(errors),
        EventRing(events),
    )


def _owners_at(capacity: int) -> int:
    return _slot_at(capacity)


def _rings_at(capacity: int, max_sessions: int) -> int:
    tables = owners.size_for(MODULE_OWNERS) + owners.size_for(max_sessions)
    return in_pages(_owners_at(capacity) + tables)
