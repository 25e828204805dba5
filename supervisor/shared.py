"""The memory that the master and its workers share.

One memfd, laid out by the master before it forks, mapped by every process: a header, a slot for
each worker, and the ring of admission times. It has no name in any file system, so a killed
master leaves nothing behind, and a descriptor can be passed on to a master that takes over.

This is the only file that knows an offset; everyone else says `slot.opened` or
`shared.header.verdict`. All fields are aligned signed 64-bit integers, which the machine stores and
loads whole, so a process that is killed leaves every field either as it was or as it should be.

Who writes what is said at each field. A field has one writer, so that no update is ever lost, or
is written only under the gate's lock. What is open now is told by counters that only grow:
`opened - closed` connections, `admitted - (succeeded + failed)` requests. Clearing a dead worker's
slot is then a few stores, and no total is lost with the worker.
"""

import ctypes
import mmap
import os
import time

VERDICT_OPEN = 0
VERDICT_CLOSED = 1

WAITS_FOR_NOTHING = 0  # or for a time to come
WAITS_FOR_CONNECTION = 1
WAITS_FOR_REQUEST = 2

# Without a rate limit the ring only serves the count of the last minute; it then counts up to this.
UNLIMITED_WINDOW = 1 << 20
WINDOW_NS = 60 * 1_000_000_000

_CACHE_LINE = 64


class Header(ctypes.Structure):
    """What there is one of in the daemon."""

    _fields_ = (
        # Written by the master.
        ("started_at", ctypes.c_int64),  # CLOCK_REALTIME, nanoseconds
        ("started_monotonic", ctypes.c_int64),  # CLOCK_MONOTONIC, nanoseconds
        ("verdict", ctypes.c_int64),  # VERDICT_OPEN or VERDICT_CLOSED
        ("deaths", ctypes.c_int64),  # workers that ended without being told to
        # Written under the gate's lock.
        ("admissions", ctypes.c_int64),  # entries ever written to the ring
        ("peak_connections", ctypes.c_int64),
    )


class Slot(ctypes.Structure):
    """A worker's place. Totals go on counting when a replacement takes the slot over."""

    _fields_ = (
        # Written by the master.
        ("pid", ctypes.c_int64),  # 0: no process has the slot
        ("generation", ctypes.c_int64),
        # Written by the worker under the gate's lock.
        ("admitted", ctypes.c_int64),  # requests let through to run
        # 1: there is room for a client that the thread at the door may be accepting. Taken under
        # the gate's lock, given back without.
        ("reserved", ctypes.c_int64),
        # Written by the thread at the worker's door; there is one at a time.
        ("opened", ctypes.c_int64),  # connections accepted
        ("door_waits_for", ctypes.c_int64),  # WAITS_FOR_...
        # Written by the one thread of the worker that looks for a request's room: 1 if it waits.
        ("request_waits", ctypes.c_int64),
        # Written by the worker under its own release lock, and by the master once it is dead.
        ("closed", ctypes.c_int64),  # connections closed
        ("queued", ctypes.c_int64),  # threads that have a request and wait for its room
        ("succeeded", ctypes.c_int64),  # requests that have run and returned a result
        ("failed", ctypes.c_int64),  # requests that have run and did not
        ("refused", ctypes.c_int64),  # requests answered with an error without running
        ("invalid", ctypes.c_int64),  # of these, malformed ones
        ("security_events", ctypes.c_int64),
        ("busy_ns", ctypes.c_int64),  # time that finished requests took, all together
    )

    @property
    def connections(self) -> int:
        """Connections open now. Never too low for a reader that holds the gate's lock."""
        closed: int = self.closed
        opened: int = self.opened
        return opened - closed

    @property
    def running(self) -> int:
        """Requests running now. Never too low for a reader that holds the gate's lock."""
        finished = self.finished
        admitted: int = self.admitted
        return admitted - finished

    @property
    def finished(self) -> int:
        """Requests that have run, well or not."""
        return int(self.succeeded + self.failed)


def _padded(size: int) -> int:
    """Round up to whole cache lines, so that workers do not write into each other's."""
    return -(-size // _CACHE_LINE) * _CACHE_LINE


class Shared:
    """The mapped memory. Made once, in the master; workers inherit the mapping by fork.

    `window` is `max_requests_per_minute`, 0 for no limit; `workers` the number of slots.
    """

    def __init__(self, workers: int, window: int) -> None:
        self.window = window
        self.capacity = window or UNLIMITED_WINDOW
        # One entry more than the window holds: the entry that the next admission writes is then
        # never the one that decides about it, so a process killed between writing an entry and
        # counting it has changed nothing.
        self.ring_size = self.capacity + 1
        slot_size = _padded(ctypes.sizeof(Slot))
        slots_at = _padded(ctypes.sizeof(Header))
        ring_at = slots_at + workers * slot_size
        size = ring_at + 8 * self.ring_size

        self.fd = os.memfd_create("cpanbridged", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        memory = mmap.mmap(self.fd, size)
        self.header = Header.from_buffer(memory)
        self.slots = [Slot.from_buffer(memory, slots_at + n * slot_size) for n in range(workers)]
        self.ring = memoryview(memory)[ring_at:size].cast("q")

        self.header.started_at = time.time_ns()
        self.header.started_monotonic = time.monotonic_ns()

    @property
    def uptime(self) -> float:
        """Seconds since the daemon started."""
        started: int = self.header.started_monotonic
        return (time.monotonic_ns() - started) / 1e9

    def connections(self) -> int:
        """Client connections open in all workers."""
        return sum(slot.connections for slot in self.slots)

    def running(self) -> int:
        """Requests running in all workers."""
        return sum(slot.running for slot in self.slots)

    def clear(self, slot: Slot) -> None:
        """Give back what a dead worker held. Called in the master, once the process is gone.

        Its sockets are closed by then and its threads have ended, so the master is the only
        writer; readers under the gate's lock see room appear, as with any other release.
        """
        slot.pid = 0
        slot.reserved = 0
        slot.closed = slot.opened
        slot.failed = slot.admitted - slot.succeeded  # what was running is lost
        slot.door_waits_for = WAITS_FOR_NOTHING
        slot.request_waits = 0
        slot.queued = 0

    def admitted_in_window(self) -> int:
        """Requests admitted in the last 60 seconds, by a search in the ring: O(log window).

        Without a rate limit the count ends at `UNLIMITED_WINDOW`.
        """
        newest: int = self.header.admissions
        since = time.monotonic_ns() - WINDOW_NS
        low, high = max(0, newest - self.capacity), newest
        while low < high:
            middle = (low + high) // 2
            if self.ring[middle % self.ring_size] > since:
                high = middle
            else:
                low = middle + 1
        return newest - low
