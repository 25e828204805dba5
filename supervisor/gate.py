"""The admission rules, kept over all workers together at every instant.

1. Never more than `max_connections` client connections open.
2. Never more than `max_concurrent_requests` requests running.
3. In any 60 seconds, wherever they start, at most `max_requests_per_minute` requests admitted.
4. While the gate is closed, because the daemon uses more memory or CPU than it may, no client is
   accepted and no request begins; what runs goes on. Nor is a client accepted while 1 to 3 leave
   no room.

What is taken stands in counters of the whole daemon (`Counters`, in the shared memory), and besides
in each worker's slot. Both are changed under the gate's lock: the counter first when room is taken,
the slot first when it is given back. A process killed in between leaves the counter too high, never
too low, and the master has it counted anew from the slots: see `Shared.recount`.

Only plain numbers are read and written under the lock, and no call gives up the interpreter lock:
a thread that did would wait for a busy module of its own worker to hand it back, and all other
workers with it. So room for a client is taken under the lock, and the client accepted outside it.

The rate is exact: the ring holds the times of the last admissions, and a request is admitted when
the entry `max_requests_per_minute` places back has left the window. Times are CLOCK_MONOTONIC:
setting the machine's clock changes nothing.

A thread that finds no room publishes in its slot what it waits for, checks once more, and sleeps
on its worker's eventfd. Whoever gives such room back wakes all workers that wait for it. Two
threads of a worker wait at most: the one that accepts, and one for all that have a request. A
wake-up is only a hint to check again: one that is lost because its process was killed costs
`LOST_WAKEUP_MS`.

Called in the worker process, from any of its threads, but for what says otherwise.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from cpanbridge.supervisor.memory import handoff_sockets
from cpanbridge.supervisor.memory.fields import (
    CONCURRENCY,
    CONNECTIONS,
    GATE_OPEN,
    OVERLOAD,
    RATE,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_LOAD,
    WAITS_FOR_NOTHING,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
)
from cpanbridge.supervisor.memory.layout import Shared

# Clients that a worker rejects at a time, with `overload = "reject"`.
MOST_REJECTED = 64

LOST_WAKEUP_MS = 100
OVERLOAD_RECHECK_MS = 1000

T = TypeVar("T")


class Wakeups(NamedTuple):
    """The descriptors by which others reach one worker. Made by the master, before it forks."""

    accept: int  # an eventfd: the thread that accepts waits for room on it
    request: int  # an eventfd: the thread that waits for a request's room
    main: int  # an eventfd: the main thread, when there is something for it to do
    put: int  # its hand-off queue, for clients that others hand over: see handoff_sockets.py
    take: int  # the end from which it takes them

    @classmethod
    def create(cls) -> "Wakeups":
        """Raises OSError when the process is out of descriptors."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        accept, request, main = (os.eventfd(0, flags) for _ in range(3))
        return cls(accept, request, main, *handoff_sockets.create())


class Obstacle(NamedTuple):
    """Why nothing can be admitted now, and what to wait for."""

    reason: str  # one of fields.REASONS
    waits_for: int  # whose giving back may remove it: WAITS_FOR_...
    until: int | None = None  # CLOCK_MONOTONIC nanoseconds when it will have gone

    @property
    def retry_after(self) -> float:
        """In how many seconds another try is worth while."""
        if self.until is not None:
            return max(0.001, (self.until - time.monotonic_ns()) / 1e9)
        return self.recheck_ms / 1000

    @property
    def recheck_ms(self) -> int:
        """After how many milliseconds a waiting thread checks again without a wake-up."""
        return OVERLOAD_RECHECK_MS if self.waits_for == WAITS_FOR_LOAD else LOST_WAKEUP_MS


class Gate:
    """One worker's view of the gate. The limits are read from the shared memory each time, so a
    change holds for all generations of workers at once.
    """

    def __init__(self, shared: Shared, slot: int, wakeups: Sequence[Wakeups]) -> None:
        self._shared = shared
        self._lock = shared.lock
        self._header = shared.header
        self._slot = shared.slots[slot]
        self._wakeups = wakeups[slot]
        self._all_wakeups = wakeups
        self._rings = shared.rings
        counters = shared.counters
        self._connections = counters.connections.get_obj()
        self._running = counters.running.get_obj()
        self._waiting = counters.waiting.get_obj()
        self._overload_state = counters.overload_state.get_obj()
        self._exiting = False
        self._turn_to_accept = threading.Lock()
        self._turn_for_request = threading.Lock()

    # -- taking room, under the lock --

    def obstacle(self, *, connection: bool) -> Obstacle | None:
        """What keeps a request out, or with `connection` a new client; None: there is room."""
        header = self._header
        if header.recount:
            self._shared.recount()
        if self._overload_state.value != GATE_OPEN and not self._exiting:
            return Obstacle(OVERLOAD, WAITS_FOR_LOAD)
        if connection and self._connections.value >= header.max_connections:
            return Obstacle(CONNECTIONS, WAITS_FOR_CONNECTION)
        if self._running.value >= header.max_concurrent_requests:
            return Obstacle(CONCURRENCY, WAITS_FOR_REQUEST)
        free_at = self._rings.window.free_at()
        if free_at > time.monotonic_ns():
            return Obstacle(RATE, WAITS_FOR_RATE, free_at)
        return None

    def take_connection(self) -> Literal[True]:
        """Take room for one client, which is to be accepted; `release_connection` must follow."""
        header, slot = self._header, self._slot
        connections = self._connections.value = self._connections.value + 1
        slot.opened += 1
        # A client that is handed over has room twice for a moment.
        if header.peak_connections < connections <= header.max_connections:
            header.peak_connections = connections
        return True

    def admit(self) -> Literal[True]:
        """Charge a request that is complete and about to run; `release_request` must follow."""
        self._running.value += 1
        self._slot.admitted += 1
        self._rings.window.record(time.monotonic_ns())
        return True

    # -- taking and giving back, with the lock --

    def take_any_connection(self) -> bool:
        """As `take_connection`, whatever room there is for requests; False when there is none."""
        with self._lock:
            if self._header.recount:
                self._shared.recount()
            return self._connections.value < self._header.max_connections and self.take_connection()

    def take_handed_off(self) -> int:
        """Take room for another worker's client; returns its number in this slot.

        It is counted here before the other worker gives it up: twice for a moment, and at every
        moment at least once, whichever process is killed.
        """
        with self._lock:
            self.take_connection()
            self._slot.taken_over += 1
            return int(self._slot.opened)

    def accepted(self) -> int:
        """The room that was taken has a client; returns its number in this slot.

        Called by the thread that accepts.
        """
        self._slot.accepted += 1
        return int(self._slot.opened)

    def release_connection(self) -> None:
        """Give back a connection's room, after its socket is closed, or when no client came."""
        with self._lock:
            self._slot.closed += 1
            self._connections.value -= 1
        if self._waiting.value:
            self._wake_waiting(WAITS_FOR_CONNECTION)

    def release_request(self, succeeded: bool) -> None:
        """Give back a request's room, once its function has returned."""
        with self._lock:
            if succeeded:
                self._slot.succeeded += 1
            else:
                self._slot.failed += 1
            self._running.value -= 1
        if self._waiting.value:
            self._wake_waiting(WAITS_FOR_REQUEST)

    def _wake_waiting(self, waits_for: int) -> None:
        for slot, wakeups in zip(self._shared.used_slots, self._all_wakeups, strict=False):
            if slot.accept_waits_for == waits_for:
                wake(wakeups.accept)
            if slot.request_waits_for == waits_for:
                wake(wakeups.request)

    def ignore_overload(self) -> None:
        """From now on this worker finishes what it has, also while the gate is closed.

        For a worker that exits: the gate may be waiting for its memory.
        """
        self._exiting = True
        wake(self._wakeups.request)

    def wake_other_workers(self) -> None:
        """Have all check the listen queue: this worker does not accept."""
        wake_main_threads(self._shared, self._all_wakeups)

    def wake_if_waiting(self, slot: int) -> None:
        """If any thread waits for room, wake the main thread of a worker that can give some."""
        if self._waiting.value:
            wake(self._all_wakeups[slot].main)

    # -- waiting for room --

    def attempt(self, take: Callable[[], T], *, connection: bool) -> T | Obstacle:
        """Run `take` under the lock and return what it returns, or what keeps it from being run.

        `take` is one of `take_connection` and `admit`.
        """
        with self._lock:
            obstacle = self.obstacle(connection=connection)
            if obstacle is None:
                return take()
        if obstacle.waits_for == WAITS_FOR_CONNECTION:
            self._slot.full += 1
        return obstacle

    def wait_and_take(self, take: Callable[[], T], stop: int, *, connection: bool) -> T | None:
        """Run `take` under the lock as soon as there is room, and return what it returns.

        Sleeps while there is none; returns None when the descriptor `stop` is readable by then.
        """
        # Of the threads that wait for the same, one checks; the others wait for their turn.
        if connection:
            with self._turn_to_accept:
                return self._wait_and_take(take, stop, connection)
        self._count_queued(+1)
        try:
            with self._turn_for_request:
                return self._wait_and_take(take, stop, connection)
        finally:
            self._count_queued(-1)

    def _count_queued(self, change: int) -> None:
        with self._lock:
            self._slot.queued += change

    def _wait_and_take(self, take: Callable[[], T], stop: int, connection: bool) -> T | None:
        try:
            while True:
                with self._lock:
                    obstacle = self.obstacle(connection=connection)
                    if obstacle is None:
                        return take()
                    is_new = self._publish(obstacle.waits_for, connection)
                # Room that was given back before this was published has woken nobody: so the
                # thread checks once more before it sleeps.
                if not is_new and self._sleep(obstacle, stop, connection):
                    return None
        finally:
            with self._lock:
                self._publish(WAITS_FOR_NOTHING, connection)

    def _publish(self, waits_for: int, connection: bool) -> bool:
        """Say what this thread waits for, so that it is woken; returns whether that is new.

        Called under the lock.
        """
        slot = self._slot
        before = slot.accept_waits_for if connection else slot.request_waits_for
        self._waiting.value += bool(waits_for) - bool(before)
        if connection:
            slot.accept_waits_for = waits_for
        else:
            slot.request_waits_for = waits_for
        return bool(before != waits_for)

    def _sleep(self, obstacle: Obstacle, stop: int, connection: bool) -> bool:
        """Sleep until the obstacle may have gone; True when `stop` is readable.

        A time is met exactly, in several sleeps: poll(2) may be late by a thousandth of what it is
        asked for, so it is asked for less, and the last milliseconds are a sleep of their own.
        """
        wakeup = self._wakeups.accept if connection else self._wakeups.request
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        exact_ns = 0
        limit_ms = obstacle.recheck_ms
        if obstacle.until is not None:
            left_ns = max(0, obstacle.until - time.monotonic_ns())
            early_ns = max(1_000_000, left_ns // 500)
            limit_ms = max(0, left_ns - early_ns) // 1_000_000
            if limit_ms == 0:
                exact_ns = left_ns
        ready = [fd for fd, _ in poll.poll(limit_ms)]
        if stop in ready:
            return True
        if wakeup in ready:
            os.eventfd_read(wakeup)  # all wake-ups so far: this thread sees to them
        else:
            time.sleep(exact_ns / 1e9)
        return False


def wake(eventfd: int) -> None:
    """Wake the thread that sleeps on this eventfd."""
    # Written 2**64 - 2 times and not read yet: it is readable.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(eventfd, 1)


def set_overload_state(shared: Shared, wakeups: Sequence[Wakeups], state: int) -> None:
    """Open or close the gate for the whole daemon: GATE_OPEN or GATE_CLOSED.

    Called in the master, which is the only writer and waits for no lock.
    """
    header = shared.header
    header.changed_at = time.monotonic_ns()
    header.closings += state != GATE_OPEN
    shared.counters.overload_state.get_obj().value = state
    if state != GATE_OPEN:
        return
    for slot, each in zip(shared.used_slots, wakeups, strict=False):
        if slot.accept_waits_for == WAITS_FOR_LOAD:
            wake(each.accept)
        if slot.request_waits_for == WAITS_FOR_LOAD:
            wake(each.request)


def wake_main_threads(shared: Shared, wakeups: Sequence[Wakeups]) -> None:
    """Have the main thread of every worker check whether there is something to do."""
    for each in wakeups[: shared.header.slots_used]:
        wake(each.main)
