"""The admission rules, kept over all workers together at every instant.

1. Never more than `max_connections` client connections open.
2. Never more than `max_concurrent_requests` requests running.
3. In any 60 seconds, wherever they start, at most `max_requests_per_minute` requests admitted.
4. While the master's verdict is closed nothing is accepted and no request begins; what runs goes
   on. Nothing is accepted either while 1 to 3 leave no room.

Everything that takes room is decided under one lock; giving room back needs none. The kernel frees
it when its holder dies, at whatever instruction: see robustlock.py.

Only numbers are read and written while the lock is held. In particular no call gives up the
interpreter lock: a thread that did would wait for a busy module of its own worker to hand it back,
and all other workers with it. So a client is accepted outside the lock, into room that was reserved
under it.

Room is counted from what all slots say. That takes longer the more workers there are, so it is done
once for many who take room: the one who counts leaves word of how many others may pass without
counting again, whether for a connection or a request (`header.passes`). Room that is given back
meanwhile only makes it more. Where there is less room than that, each one counts.

The rate is exact: the ring holds the times of the last admissions, and a request is admitted when
the entry `max_requests_per_minute` places back has left the window. One comparison, whatever the
load. Times are CLOCK_MONOTONIC: setting the machine's clock changes nothing.

Who finds no room says in its slot what it waits for, looks once more, and sleeps on its worker's
eventfd, the bell. Whoever gives room back rings the bell of every worker that waits for such room,
where anybody waits at all (`header.somebody_waits`); two threads of a worker wait at most, one at
the door and one for all that have a request. A ring is only a hint to look again: one that is lost
because its process was killed costs `LOST_RING_MS`.

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
from cpanbridge.supervisor.memory.layout import (
    GATE_OPEN,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_LOAD,
    WAITS_FOR_NOTHING,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    Shared,
    Slot,
)

# Clients that a worker is telling so, at a time, where those that find no room are turned away.
MOST_REJECTED = 64

LOST_RING_MS = 100
OVERLOAD_RECHECK_MS = 1000

# How often room is taken before all slots are counted again; as often as there are slots where
# these are more. So a rise in connections that is over before the monitor's next look may be told
# too low by as many, and by those that doors had reserved when it was counted.
PASSES = 8

T = TypeVar("T")


class Wakeups(NamedTuple):
    """What others reach one worker by: eventfds that they ring, and its postbox.

    Made by the master, before it forks.
    """

    acceptor: int  # for its thread at the door
    request: int  # for the one of its threads that looks for a request's room
    watch: int  # for its main thread, when there is something for it to do
    put: int  # its postbox, for clients that others hand over to it: see postbox.py
    take: int  # where it takes them out

    @classmethod
    def hang(cls) -> "Wakeups":
        """Create them. Raises OSError when the process is out of descriptors."""
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        acceptor, request, watch = (os.eventfd(0, flags) for _ in range(3))
        return cls(acceptor, request, watch, *handoff_sockets.hang())


class Obstacle(NamedTuple):
    """Why nothing can be admitted now, and what to wait for."""

    # verdict, connections, concurrency, rate; reservations: for a moment, as other doors look out
    reason: str
    waits_for: int  # whose giving back may remove it: WAITS_FOR_...
    until: int | None = None  # CLOCK_MONOTONIC nanoseconds when it will have gone

    @property
    def retry_after(self) -> float:
        """In how many seconds it is worth while to try again."""
        if self.until is not None:
            return max(0.001, (self.until - time.monotonic_ns()) / 1e9)
        return (OVERLOAD_RECHECK_MS if self.reason == "verdict" else LOST_RING_MS) / 1000


class Gate:
    """One worker's view of the gate. The limits are read from the shared
    memory each time, so that a change holds for all generations of workers at once.
    """

    def __init__(self, shared: Shared, slot: int, wakeups: Sequence[Wakeups]) -> None:
        self._shared = shared
        self._lock = shared.lock
        self._header = shared.header
        self._slot = shared.slots[slot]
        self._wakeups = wakeups[slot]
        self._all_wakeups = wakeups
        self._workers: list[tuple[Slot, Wakeups]] = []
        self._exiting = False
        self._release = threading.Lock()
        self._line_for_connection = threading.Lock()
        self._line_for_request = threading.Lock()

    # -- taking room, under the lock --

    def obstacle(self, *, connection: bool) -> Obstacle | None:
        """What keeps a request out, or with `connection` a new client; None when there is room."""
        header = self._header
        if header.overload_state != GATE_OPEN and not self._exiting:
            return Obstacle("verdict", WAITS_FOR_LOAD)
        if header.passes <= 0:
            obstacle = self._count(connection)
            if obstacle is not None:
                return obstacle
        free_at = self._shared.window.free_at()
        if free_at > time.monotonic_ns():
            return Obstacle("rate", WAITS_FOR_RATE, free_at)
        return None

    def _count(self, connection: bool) -> Obstacle | None:
        """Count what is taken, say how many may pass without that, and what is in the way of one.

        Fewer may have passed by then than there is room for: what `took_over` counts twice is room
        that is taken once.
        """
        header = self._header
        connections = reserved = running = 0
        for slot, _ in self._used():
            reserved += slot.reserved  # before `opened`, which it turns into
            connections += slot.opened - slot.closed
            running += slot.admitted - slot.succeeded - slot.failed
        self._shared.record_peak(connections)
        if header.somebody_waits:
            self._see_who_waits()
        connections_left = header.max_connections - connections - reserved
        requests_left = header.max_concurrent_requests - running
        header.passes = min(max(PASSES, len(self._workers)), connections_left, requests_left)
        if connection and connections_left <= 0:
            taken = connections >= header.max_connections
            return Obstacle("connections" if taken else "reservations", WAITS_FOR_CONNECTION)
        if requests_left <= 0:
            return Obstacle("concurrency", WAITS_FOR_REQUEST)
        return None

    def _see_who_waits(self) -> None:
        """Whether anybody does. Who was killed while it waited waits no longer."""
        self._header.somebody_waits = any(
            slot.accept_waits_for or slot.request_waits_for for slot, _ in self._used()
        )

    def _used(self) -> list[tuple[Slot, Wakeups]]:
        """The slots that a worker may have, or has had, with their bells."""
        used: int = self._header.slots_used
        if used != len(self._workers):
            self._workers = list(zip(self._shared.used_slots, self._all_wakeups, strict=False))
        return self._workers

    def reserve(self) -> Literal[True]:
        """Take room for one client; `opened` or `nobody_came` must follow."""
        self._header.passes -= 1
        self._slot.reserved = 1
        return True

    def admitted(self) -> Literal[True]:
        """Charge a request that is complete and about to run."""
        self._header.passes -= 1
        self._slot.admitted += 1
        self._shared.window.record(time.monotonic_ns())
        return True

    def reserve_any(self) -> bool:
        """Take room for a client, whatever there is of requests; False when there is none.

        As `reserve`, but it takes the lock itself.
        """
        with self._lock:
            reserved = sum(slot.reserved for slot in self._shared.used_slots)
            if reserved + self._shared.connections() >= self._header.max_connections:
                return False
            return self.reserve()

    # -- using room and giving it back, without the lock --

    def opened(self) -> int:
        """The room that was reserved has a client; returns its number in this slot.

        Called by the thread at the door.
        """
        number: int = self._slot.opened + 1
        self._slot.opened = number
        self._slot.reserved = 0
        return number

    def took_over(self) -> int:
        """A client is taken over from another worker; returns its number in this slot.

        It is counted here before the other worker gives it up: twice for a moment, and never not
        at all, whoever is killed when. Called by the thread at the door.
        """
        number: int = self._slot.opened + 1
        self._slot.opened = number
        self._slot.taken_over += 1
        return number

    def nobody_came(self) -> None:
        """Give back the room that was reserved. Called by the thread at the door."""
        self._slot.reserved = 0
        self._tell_who_waits_for_connection()

    def closed(self) -> None:
        """Give back a connection, after its socket is closed."""
        with self._release:
            self._slot.closed += 1
        self._tell_who_waits_for_connection()

    def finished(self, succeeded: bool) -> None:
        """Give back a request's place, once its function has returned."""
        with self._release:
            if succeeded:
                self._slot.succeeded += 1
            else:
                self._slot.failed += 1
        if not self._header.somebody_waits:
            return
        for other, wakeups in self._used():
            if other.request_waits_for == WAITS_FOR_REQUEST:
                ring(wakeups.request)
            if other.accept_waits_for == WAITS_FOR_REQUEST:
                ring(wakeups.acceptor)

    def leave(self) -> None:
        """From now on the verdict is nothing to this worker: what it has taken up, it finishes.

        It accepts no more, and the verdict may be waiting for it to have left.
        """
        self._exiting = True
        ring(self._wakeups.request)

    def leave_to_others(self) -> None:
        """Somebody may wait outside whom this worker does not let in: let the others look."""
        wake_main_threads(self._shared, self._all_wakeups)

    def _tell_who_waits_for_connection(self) -> None:
        if not self._header.somebody_waits:
            return
        for other, wakeups in self._used():
            if other.accept_waits_for == WAITS_FOR_CONNECTION:
                ring(wakeups.acceptor)

    # -- waiting for room --

    def attempt(self, take: Callable[[], T], *, connection: bool) -> T | Obstacle:
        """Run `take` under the lock and return what it returns, or what keeps it from being run.

        `take` is one of `reserve` and `admitted`.
        """
        with self._lock:
            obstacle = self.obstacle(connection=connection)
            if obstacle is None:
                return take()
        if obstacle.reason == "connections":
            self._slot.full += 1
        return obstacle

    def enter(self, take: Callable[[], T], stop: int, *, connection: bool) -> T | None:
        """Run `take` under the lock as soon as there is room, and return what it returns.

        Sleeps while there is none; returns None when the descriptor `stop` is readable by then.
        """
        outcome = self.attempt(take, connection=connection)
        if not isinstance(outcome, Obstacle):
            return outcome
        return self.wait_and_take(take, stop, connection=connection)

    def wait_and_take(self, take: Callable[[], T], stop: int, *, connection: bool) -> T | None:
        """As `enter`, for who has found no room already."""
        # Of the threads that wait for the same, one looks and the others wait for their turn.
        if connection:
            with self._line_for_connection:
                return self._wait_and_take(take, stop, connection)
        self._queue(+1)
        try:
            with self._line_for_request:
                return self._wait_and_take(take, stop, connection)
        finally:
            self._queue(-1)

    def _queue(self, change: int) -> None:
        with self._release:
            self._slot.queued += change

    def _wait_and_take(self, take: Callable[[], T], stop: int, connection: bool) -> T | None:
        try:
            while True:
                with self._lock:
                    obstacle = self.obstacle(connection=connection)
                    if obstacle is None:
                        return take()
                    is_new = self._register(obstacle.waits_for, connection)
                # Room that was given back before this thread was registered has rung nobody: so
                # it looks once more before it sleeps.
                if not is_new and self._sleep(obstacle, stop, connection):
                    return None
        finally:
            with self._lock:
                self._register(WAITS_FOR_NOTHING, connection)
                self._see_who_waits()

    def _register(self, waits_for: int, connection: bool) -> bool:
        """Say what this thread waits for, so that it is rung; whether that is something new.

        Called under the lock.
        """
        slot = self._slot
        if connection:
            before, slot.accept_waits_for = slot.accept_waits_for, waits_for
        else:
            before, slot.request_waits_for = slot.request_waits_for, waits_for
        self._header.somebody_waits = 1
        return bool(before != waits_for)

    def _sleep(self, obstacle: Obstacle, stop: int, connection: bool) -> bool:
        """Sleep until the obstacle may have gone; True when `stop` is readable.

        A time is met exactly, in several sleeps: poll(2) may be late by a thousandth of what it is
        asked for, so it is asked for less, and the last milliseconds are a sleep of their own.
        """
        wakeup = self._wakeups.acceptor if connection else self._wakeups.request
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        exact_ns = 0
        if obstacle.until is not None:
            left_ns = max(0, obstacle.until - time.monotonic_ns())
            early_ns = max(1_000_000, left_ns // 500)
            limit_ms = max(0, left_ns - early_ns) // 1_000_000
            if limit_ms == 0:
                exact_ns = left_ns
        else:
            limit_ms = OVERLOAD_RECHECK_MS if obstacle.reason == "verdict" else LOST_RING_MS
        ready = [fd for fd, _ in poll.poll(limit_ms)]
        if stop in ready:
            return True
        if wakeup in ready:
            os.eventfd_read(wakeup)  # all rings so far: this thread looks after it
        else:
            time.sleep(exact_ns / 1e9)
        return False


def ring(wakeup: int) -> None:
    """Wake whoever sleeps by this eventfd."""
    # Rung 2**64 - 2 times and not heard yet: it will be.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(wakeup, 1)


def set_overload_state(shared: Shared, wakeups: Sequence[Wakeups], overload_state: int) -> None:
    """Open or close the gate for the whole daemon. Called in the master."""
    header = shared.header
    header.changed_at = time.monotonic_ns()
    header.closings += overload_state != GATE_OPEN
    header.overload_state = overload_state
    if overload_state != GATE_OPEN:
        return
    for slot, each in zip(shared.used_slots, wakeups, strict=False):
        if slot.accept_waits_for == WAITS_FOR_LOAD:
            ring(each.acceptor)
        if slot.request_waits_for == WAITS_FOR_LOAD:
            ring(each.request)


def wake_main_threads(shared: Shared, wakeups: Sequence[Wakeups]) -> None:
    """Let the main thread of every worker look whether there is something to do."""
    for each in wakeups[: shared.header.slots_used]:
        ring(each.watch)
