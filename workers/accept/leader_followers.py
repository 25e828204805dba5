"""A worker's threads. There are as many as the calls need, and one of them waits at the door.

Each connection is served by a thread of its own, in plain blocking code. What threads cost is not
waiting but changing over: each system call gives up the interpreter lock, and with two threads at
work it goes to the other one and has to be waited for. So the thread that has taken a connection
does one of two things, by what `is_quick` says of it:

- It is likely to be quick: the thread keeps the door while it serves, and is back before anybody
  else could have got there. Fast calls run in one thread, with nobody woken.
- It is not: another thread is sent to the door first, a parked one or a new one. Slow calls and
  long connections run in as many threads as there are of them.

A quick call that turns out slow does not shut the door. Where it finds that it has to wait, its
thread leaves the door (`step_aside`); for any other the worker's main thread looks after the door
(`look_after_door`) and sends another thread there after `TAKEOVER_SECONDS`.

A thread that comes back while somebody else is at the door parks, and ends when nobody has called
it for `PARKED_SECONDS`.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cpanbridge.workers.accept.own_threads import OwnThread

LOGGER = logging.getLogger("cpanbridge.worker")

TAKEOVER_SECONDS = 0.01
LOOK_SECONDS = 1.0
PARKED_SECONDS = 60.0
COMPLAIN_SECONDS = 60.0

A = TypeVar("A")


class ThreadPool(Generic[A]):
    """Threads that each repeat: `fetch` an arrival, `serve` it; `fetch` returns None at the end.

    `limit` is how many may serve at the same time. `left` is called when they do, so that nobody is
    left to be at the door.
    """

    def __init__(
        self,
        limit: int,
        fetch: Callable[[], A | None],
        is_quick: Callable[[A], bool],
        serve: Callable[[A], None],
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._fetch = fetch
        self._is_quick = is_quick
        self._serve = serve
        self._left = left
        self._lock = threading.Lock()  # over all that follows
        self._idle = threading.Condition(self._lock)
        self._started = False
        self._at_door = 0  # there, on the way there, or keeping it: 0 or 1
        self._kept_since = 0.0  # when the thread that keeps the door began to serve; 0: it is there
        self._keeper = 0  # which thread that is
        self._keeps = 0
        self._keeps_seen = 0
        self._looked_after = False
        self._serving = 0  # away from the door
        self._parked = 0
        self._over = False
        self._complained = -COMPLAIN_SECONDS
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.broken = False  # the worker must leave
        # Readable when the main thread should look after the door sooner than it meant to.
        self.attention = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def serving(self) -> int:
        """How many connections are being served."""
        return self._serving + (1 if self._kept_since else 0)

    @property
    def door_is_left(self) -> bool:
        """Whether nobody is at the door, who could let a client in."""
        with self._lock:
            return self._at_door == 0

    @property
    def idle(self) -> bool:
        """After `close_door`: whether nothing is served any more and nobody is at the door."""
        with self._lock:
            return self._is_idle()

    def start(self) -> None:
        """Send the first thread to the door."""
        with self._lock:
            self._started = True
            self._at_door = 1
            self._start_thread()

    def look_after_door(self) -> float:
        """See that the door is not left alone; returns in how many seconds to call it again.

        Called in the worker's main thread, then, and when `attention` is readable.
        """
        left = False
        with self._lock:
            if self._kept_since and time.monotonic() - self._kept_since >= TAKEOVER_SECONDS:
                self._kept_since = 0.0
                left = self._leave_door()
            open_ = self._started and not self._over
            if open_ and not self._at_door and self._serving < self._limit:
                self._send_to_door()  # no thread was to be had before
            self._looked_after = bool(self._kept_since) or self._keeps != self._keeps_seen
            self._keeps_seen = self._keeps
            seconds = TAKEOVER_SECONDS if self._looked_after else LOOK_SECONDS
        if left:
            self._left()
        return seconds

    def step_aside(self) -> None:
        """This thread is about to wait for something: it keeps the door no longer, if it does."""
        left = False
        with self._lock:
            if self._kept_since and self._keeper == threading.get_ident():
                self._kept_since = 0.0
                left = self._leave_door()
        if left:
            self._left()

    def close_door(self) -> None:
        """Nobody goes to the door any more; who keeps it while serving does not come back."""
        with self._lock:
            self._over = True
            if self._kept_since:
                self._kept_since = 0.0
                self._leave_door()

    def wait_until_door_is_left(self, seconds: float) -> bool:
        """After `fetch` has ended: wait until nobody fetches any more. False: not in time."""
        with self._lock:
            return self._idle.wait_for(lambda: self._at_door == 0, timeout=max(0.0, seconds))

    def wait_until_idle(self, seconds: float) -> bool:
        """After `fetch` has ended: wait until nothing is served any more. False: not in time."""
        with self._lock:
            return self._idle.wait_for(self._is_idle, timeout=max(0.0, seconds))

    def _is_idle(self) -> bool:
        return self._serving == 0 and self._at_door == 0

    def _tell_idle(self) -> None:
        """Wake whoever waits for the end. Called under the lock, when there is to be no more."""
        self._idle.notify_all()
        os.eventfd_write(self.attention, 1)

    def _run(self) -> None:
        """A thread's life."""
        try:
            while (arrival := self._fetch()) is not None:
                self._go_and_serve(arrival)
                if not self._return_to_door() and not self._park():
                    return
        except BaseException:
            # Whoever is at the door next would fail as well, and the worker be deaf.
            LOGGER.exception("No more clients can be let in, by a fault of the daemon's own")
            self.broken = True
            os.eventfd_write(self.attention, 1)
        with self._lock:
            self._over = True
            self._at_door = 0
            self._tell_idle()

    def _go_and_serve(self, arrival: A) -> None:
        if self._is_quick(arrival):
            self._keep_door()
        else:
            with self._lock:
                left = self._leave_door()
            if left:
                self._left()
        try:
            self._serve(arrival)
        except Exception:
            LOGGER.exception("A connection ended by a fault of the daemon's own")

    def _keep_door(self) -> None:
        with self._lock:
            if self._over:
                self._leave_door()
                return
            self._kept_since = time.monotonic()
            self._keeper = threading.get_ident()
            self._keeps += 1
            looked_after, self._looked_after = self._looked_after, True
        if not looked_after:
            os.eventfd_write(self.attention, 1)

    def _leave_door(self) -> bool:
        """The one at the door is serving now: send another there. Called under the lock.

        Whether there is nobody to be sent, and so `left` is to be called when the lock is free.
        """
        self._serving += 1
        self._at_door = 0
        if self._over:
            self._tell_idle()
            return False
        if self._serving < self._limit:
            self._send_to_door()
        return not self._at_door

    def _send_to_door(self) -> None:
        self._at_door = 1
        if self._parked:
            self._parked -= 1
            self._calls.put(None)
            return
        try:
            self._start_thread()
        except RuntimeError:
            # Whoever comes back first takes the place, or the main thread finds it empty.
            self._at_door = 0
            now = time.monotonic()
            if now - self._complained >= COMPLAIN_SECONDS:
                self._complained = now
                LOGGER.warning("Cannot start another thread; clients wait for one that is there")

    def _start_thread(self) -> None:
        OwnThread(target=self._run, name="client", daemon=True).start()

    def _return_to_door(self) -> bool:
        """Whether this thread, done with serving, is at the door again; it is to park otherwise."""
        with self._lock:
            if self._kept_since:
                self._kept_since = 0.0
                return True
            self._serving -= 1
            if self._over:
                self._tell_idle()
            elif not self._at_door:
                self._at_door = 1  # nobody was to be had when it was left
                return True
            self._parked += 1
            return False

    def _park(self) -> bool:
        """Wait to be called to the door; False when nobody called for long."""
        try:
            self._calls.get(timeout=PARKED_SECONDS)
        except queue.Empty:
            with self._lock:
                if self._parked:
                    self._parked -= 1
                    return False
            self._calls.get()  # called at the very last moment
        return True
