"""The admission rules, kept over all workers together at every instant.

1. Never more than `max_connections` client connections open.
2. Never more than `max_concurrent_requests` requests running.
3. In any 60 seconds, wherever they start, at most `max_requests_per_minute` requests admitted.
4. While the gate is closed, because the daemon uses more memory or CPU than it may, no request
   begins; what runs goes on.
5. Of the requests that wait, the one that came first is admitted first, whichever worker it is in.

Clients are accepted by the first rule alone; requests wait (`workers/accept/admission.py`).

What is taken stands in counters of the whole daemon (`Counters`, in the shared memory), and besides
in each worker's slot. Both are changed under the gate's lock: the counter first when room is taken,
the slot first when it is given back. A process killed in between leaves the counter too high, never
too low, and the master has it counted anew from the slots: see `Shared.recount`.

The functions that run under the lock work on plain numbers: see `memory/robustlock.py`. So room for
a client is taken under the lock, and the client accepted outside it.

The rate is exact: a request is admitted when the entry `max_requests_per_minute` places back in the
ring of admission times has left the window. Times are CLOCK_MONOTONIC, which nobody sets.

A request that finds no room is given a ticket, a number that goes up, and each slot tells its
oldest one. A request is admitted when there is room and no other slot has an older ticket: then it
wakes the worker that has, which is its turn. A worker that does not take its turn in `PATIENCE_NS`
(it was stopped, or a module keeps its interpreter lock) is passed over until it does.

Called in the worker process, from any of its threads, but for what says otherwise.
"""

import time
from collections.abc import Sequence

from cpanbridge.supervisor.memory.fields import (
    ADMITTED,
    GATE_OPEN,
    WAITS_FOR_CONNECTION,
    WAITS_FOR_LOAD,
    WAITS_FOR_NOTHING,
    WAITS_FOR_RATE,
    WAITS_FOR_REQUEST,
    WAITS_FOR_THREAD,
    WAITS_FOR_TURN,
)
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import (
    Wakeups,
    wake,
    wake_acceptors,
    wake_all_that_wait,
    wake_main_threads,
)

MOST_REJECTED = 64  # clients that a worker rejects at a time, with `overload = "reject"`
LOST_WAKEUP_SECONDS = 0.1
OVERLOAD_RECHECK_SECONDS = 1.0
PATIENCE_NS = 100_000_000


class Gate:
    """One worker's view of the gate. The limits are read each time: a change holds at once.

    `threads` is how many requests this worker may run at a time; 0: as many as it is given.
    """

    def __init__(
        self, shared: Shared, slot: int, wakeups: Sequence[Wakeups], threads: int = 0
    ) -> None:
        self._shared = shared
        self._run = shared.lock.run
        self._header = shared.header
        self._slots = shared.slots
        self._slot = shared.slots[slot]
        self._slot.threads = self.threads = threads
        self._wakeups = wakeups[slot]
        self._all_wakeups = wakeups
        self._windows = shared.rings.windows
        counters = shared.counters
        self._connections = counters.connections.get_obj()
        self._running = counters.running.get_obj()
        self._waiting = counters.waiting.get_obj()
        self._overload_state = counters.overload_state.get_obj()
        self._exiting = False
        self.given_up = 0  # calls whose room `CallTimeouts`, which counts them, has given back
        self.accept_waits_for_thread = False  # the leading thread does, which writes it

    # -- connections --

    def take_connection(self, *, wait: bool = False) -> bool:
        """Take room for one client, which is to be accepted; `release_connection` must follow.

        False when there is none. With `wait` the leading thread is woken, by `Wakeups.room`, when
        there is some again.
        """
        if self._run(self._take_connection, wait):
            return True
        self._slot.full += 1
        return False

    def stop_waiting_for_connection(self) -> None:
        """This worker accepts no more."""
        if self._slot.accept_waits_for:
            self._run(self._register_accept, WAITS_FOR_NOTHING)

    def take_handed_off(self) -> int:
        """Take room for another worker's client; returns its number in this slot.

        It is counted here before the other worker gives it up: twice for a moment, and at every
        moment at least once, whichever process is killed.
        """
        return self._run(self._take_handed_off)

    def accepted(self) -> int:
        """The room that was taken has a client; returns its number in this slot.

        Called by the thread that accepts.
        """
        self._slot.accepted += 1
        return int(self._slot.opened)

    def release_connection(self) -> None:
        """Give back a connection's room, after its socket is closed, or when no client came."""
        self._run(self._release_connection)
        if self._waiting.value:
            wake_acceptors(self._shared, self._all_wakeups)

    # -- requests --

    def admit(self, ticket: int = 0, then: int = 0) -> int:
        """Charge a request that is complete and about to run; `release_request` must follow.

        Returns ADMITTED, or what it has to wait for: WAITS_FOR_... A `ticket` is one that
        `enqueue` has returned; it is used up when the request is admitted, and `then` is this
        worker's oldest one after that (0: none is left).
        """
        code = self._run(self._admit, ticket, then)
        if code == WAITS_FOR_TURN or (ticket and code == ADMITTED and self._waiting.value):
            self.wake_first()
        return code

    def look(self, ticket: int) -> int:
        """As `admit`, but nothing is charged."""
        if (code := self._run(self._look, ticket)) == WAITS_FOR_TURN:
            self.wake_first()
        return code

    def enqueue(self, waits_for: int, ticket: int = 0) -> int:
        """A request begins to wait, at the end, or at the place that it has had; its ticket."""
        return self._run(self._enqueue, waits_for, ticket)

    def dequeue(self, then: int) -> None:
        """A request waits no longer, and has not been admitted; for `then` see `admit`."""
        self._run(self._dequeue, then)
        if self._waiting.value:
            self.wake_first()

    def release_request(self, succeeded: bool) -> None:
        """Give back a request's room, once its function has returned."""
        self._run(self._release_request, succeeded)
        waiting = self._waiting.value
        if waiting:
            self.wake_first()
        if self.accept_waits_for_thread or (waiting and self._slot.first_ticket):
            wake(self._wakeups.room)

    def wake_first(self) -> None:
        """Wake the worker whose request is the next, and those that were passed over."""
        now = time.monotonic_ns()
        first: tuple[int, int] | None = None
        for slot, wakeups in zip(self._shared.used_slots, self._all_wakeups, strict=False):
            ticket = slot.first_ticket
            if not ticket:
                continue
            if slot.passed_over_at and now - slot.passed_over_at > PATIENCE_NS:
                wake(wakeups.room)
            elif first is None or ticket < first[0]:
                first = ticket, wakeups.room
        if first is not None:
            wake(first[1])

    @property
    def has_no_thread(self) -> bool:
        """Whether this worker runs as many requests as it may."""
        return self.threads > 0 and self._slot.running + self.given_up >= self.threads

    def retry_after(self, waits_for: int) -> float:
        """In how many seconds to look again for what a request waits for."""
        if waits_for == WAITS_FOR_RATE:
            return max(0.001, (self._shared.window.free_at() - time.monotonic_ns()) / 1e9)
        return OVERLOAD_RECHECK_SECONDS if waits_for == WAITS_FOR_LOAD else LOST_WAKEUP_SECONDS

    # -- under the lock --

    def _take_connection(self, wait: int) -> int:
        header, slot = self._header, self._slot
        if header.recount:
            self._shared.recount()
        connections = self._connections.value + 1
        if connections > header.max_connections:
            if wait:
                self._register_accept(WAITS_FOR_CONNECTION)
            return 0
        if slot.accept_waits_for:
            self._register_accept(WAITS_FOR_NOTHING)
        self._connections.value = connections
        slot.opened += 1
        if header.peak_connections < connections:
            header.peak_connections = connections
        return 1

    def _register_accept(self, waits_for: int) -> int:
        slot = self._slot
        before = slot.accept_waits_for
        if waits_for and not before:
            self._waiting.value += 1
            slot.accept_waits_for = waits_for
        elif before and not waits_for:
            slot.accept_waits_for = waits_for
            self._waiting.value -= 1
        return 0

    def _take_handed_off(self) -> int:
        # Beyond the limit perhaps, because the client has room twice for a moment.
        slot = self._slot
        self._connections.value += 1
        slot.opened += 1
        slot.taken_over += 1
        return int(slot.opened)

    def _release_connection(self) -> int:
        self._slot.closed += 1
        self._connections.value -= 1
        return 0

    def _admit(self, ticket: int, then: int) -> int:
        code = self._look(ticket) if ticket else self._obstacle(0)
        if code == ADMITTED:
            self._running.value += 1
            self._slot.admitted += 1
            self._windows[self._header.ring_number % 2].record(time.monotonic_ns())
            if ticket:
                self._dequeue(then)
        return code

    def _look(self, ticket: int) -> int:
        slot = self._slot
        code = self._obstacle(ticket)
        if ticket and ticket == slot.first_ticket and not self.has_no_thread:
            slot.passed_over_at = 0  # it takes its turn
        if ticket and code != ADMITTED and code != WAITS_FOR_TURN:
            slot.request_waits_for = code
        return code

    def _obstacle(self, ticket: int) -> int:
        header = self._header
        if header.recount:
            self._shared.recount()
        if self._overload_state.value != GATE_OPEN and not self._exiting:
            return WAITS_FOR_LOAD
        if self._running.value >= header.max_concurrent_requests:
            return WAITS_FOR_REQUEST
        if self.threads and self.has_no_thread:
            return WAITS_FOR_THREAD
        now = time.monotonic_ns()
        if self._windows[header.ring_number % 2].free_at() > now:
            return WAITS_FOR_RATE
        if self._waiting.value and self._others_come_first(ticket, now):
            return WAITS_FOR_TURN
        return ADMITTED

    def _others_come_first(self, ticket: int, now: int) -> bool:
        header, slots, me = self._header, self._slots, self._slot
        if not ticket and me.first_ticket:
            return True
        found = False
        number = 0
        while number < header.slots_used:
            other = slots[number]
            number += 1
            first = other.first_ticket
            if not first or other is me or (ticket and first > ticket):
                continue
            passed_over_at = other.passed_over_at
            if not passed_over_at:
                other.passed_over_at = now
                found = True
            elif now - passed_over_at <= PATIENCE_NS:
                found = True
        return found

    def _enqueue(self, waits_for: int, ticket: int) -> int:
        slot = self._slot
        if not ticket:
            ticket = self._header.tickets = self._header.tickets + 1
        self._waiting.value += 1
        slot.queued += 1
        if not slot.first_ticket or ticket < slot.first_ticket:
            slot.first_ticket = ticket
            slot.passed_over_at = 0
            if waits_for != WAITS_FOR_TURN:
                slot.request_waits_for = waits_for
        return ticket

    def _dequeue(self, then: int) -> int:
        slot = self._slot
        slot.queued -= 1
        self._waiting.value -= 1
        if slot.first_ticket != then:
            slot.first_ticket = then
            slot.passed_over_at = 0
        if not then:
            slot.request_waits_for = WAITS_FOR_NOTHING
        return 0

    def _release_request(self, succeeded: int) -> int:
        if succeeded:
            self._slot.succeeded += 1
        else:
            self._slot.failed += 1
        self._running.value -= 1
        return 0

    # -- others --

    def ignore_overload(self) -> None:
        """This worker exits: it finishes what it has, for the gate may wait for its memory."""
        self._exiting = True
        wake(self._wakeups.room)

    def wake_other_workers(self) -> None:
        """Have all check the listen queue: this worker does not accept."""
        wake_main_threads(self._shared, self._all_wakeups)

    def wake_if_waiting(self, slot: int) -> None:
        """If anything waits for room, wake the main thread of a worker that can give some."""
        if self._waiting.value:
            wake(self._all_wakeups[slot].main)


def set_overload_state(shared: Shared, wakeups: Sequence[Wakeups], state: int) -> None:
    """Open or close the gate for the whole daemon: GATE_OPEN or GATE_CLOSED.

    Called in the master, which is the only writer and waits for no lock.
    """
    header = shared.header
    header.changed_at = time.monotonic_ns()
    header.closings += state != GATE_OPEN
    shared.counters.overload_state.get_obj().value = state
    if state == GATE_OPEN:
        wake_all_that_wait(shared, wakeups)
