"""A worker's threads: one leads, the others serve or wait (the Leader/Followers pattern).

Each connection is served by one thread, in plain blocking code. What threads cost is not waiting
but changing over: each system call gives up the interpreter lock, and with two threads at work it
goes to the other one and has to be waited for. So the thread that leads, and has found a client,
does one of two things, by what `is_quick` says of it:

- The call is likely to be quick: the leader serves it in place, and leads again before another
  thread could have been woken. Fast calls run in one thread.
- It is not: the leader promotes a follower first, an idle thread or a new one. Slow calls and
  long connections run in as many threads as there are of them.

A call that was served in place and turns out slow does not keep the worker from accepting. A thread
that finds that it has to wait promotes a follower by itself (`step_aside`); for any other the main
thread does it after `TAKEOVER_SECONDS` (`watch_leader`).
"""

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cpanbridge.workers.accept.own_threads import OwnThread

LOGGER = logging.getLogger("cpanbridge.worker")

TAKEOVER_SECONDS = 0.01
COMPLAIN_SECONDS = 60.0

A = TypeVar("A")


class ThreadPool(Generic[A]):
    """Threads that each repeat: `fetch` an arrival, `serve` it; `fetch` returns None at the end.

    `limit` is how many may serve at the same time. `no_thread_left` is called when they do, and no
    thread is left to lead.
    """

    def __init__(
        self,
        limit: int,
        fetch: Callable[[], A | None],
        is_quick: Callable[[A], bool],
        serve: Callable[[A], None],
        no_thread_left: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._fetch = fetch
        self._is_quick = is_quick
        self._serve = serve
        self._no_thread_left = no_thread_left
        self._lock = threading.Lock()  # over all that follows
        self._changed = threading.Condition(self._lock)
        self._started = self._over = False
        self._has_leader = False  # that fetches, is about to, or serves in place
        self._in_place_since = 0.0  # CLOCK_MONOTONIC; 0: the leader does not serve
        self._in_place_thread = 0
        self._in_place_lately = False  # since the main thread's last check
        self._watched = False  # by the main thread, every TAKEOVER_SECONDS
        self._serving = 0  # threads, besides a leader that serves in place
        self._idle = 0  # threads that wait to be promoted
        self._promotions: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._complained = -COMPLAIN_SECONDS
        self.broken = False  # the worker must exit
        # Readable when the main thread should call `watch_leader` sooner than it meant to.
        self.attention = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def serving(self) -> int:
        """How many connections are being served."""
        return self._serving + (1 if self._in_place_since else 0)

    @property
    def has_leader(self) -> bool:
        """Whether a thread accepts, or will when it has served in place."""
        with self._lock:
            return self._has_leader

    @property
    def is_finished(self) -> bool:
        """After `close`: whether no thread serves or leads any more."""
        with self._lock:
            return self._is_finished()

    def start(self) -> None:
        """Start the first leader."""
        with self._lock:
            self._started = True
            self._promote()

    def watch_leader(self) -> float:
        """Promote a follower if the leader serves for too long, or if there is no leader.

        Returns in how many seconds to call it again. Called in the worker's main thread, then, and
        when `attention` is readable.
        """
        with self._lock:
            in_place = self._in_place_since
            if in_place and time.monotonic() - in_place >= TAKEOVER_SECONDS:
                left = self._leave_lead()
            else:
                left = False
                if self._started and not self._has_leader and self._serving < self._limit:
                    self._promote()  # no thread could be started before
            self._watched = bool(self._in_place_since) or self._in_place_lately
            self._in_place_lately = False
            seconds = TAKEOVER_SECONDS if self._watched else math.inf
        if left:
            self._no_thread_left()
        return seconds

    def step_aside(self) -> None:
        """This thread is about to wait: if it leads, promote a follower."""
        with self._lock:
            leads = self._in_place_since and self._in_place_thread == threading.get_ident()
            left = bool(leads) and self._leave_lead()
        if left:
            self._no_thread_left()

    def close(self) -> None:
        """Promote no thread any more; a leader that serves in place does not lead again."""
        with self._lock:
            self._over = True
            if self._in_place_since:
                self._leave_lead()

    def wait_until_no_leader(self, seconds: float) -> bool:
        """After `fetch` has ended: wait until no thread fetches. False: not in time."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._has_leader, max(0.0, seconds))

    def wait_until_finished(self, seconds: float) -> bool:
        """After `fetch` has ended: wait until no thread serves. False: not in time."""
        with self._lock:
            return self._changed.wait_for(self._is_finished, max(0.0, seconds))

    def _is_finished(self) -> bool:
        return self._serving == 0 and not self._has_leader

    def _tell_change(self) -> None:
        """Wake whoever waits for the end. Called under the lock, once it is over."""
        self._changed.notify_all()
        os.eventfd_write(self.attention, 1)

    # -- a thread's life --

    def _run(self) -> None:
        try:
            while (arrival := self._fetch()) is not None:
                self._serve_one(arrival)
                del arrival  # which may be large, and this thread be idle for long
                if not self._lead_again():
                    self._promotions.get()
        except BaseException:
            # The next leader would fail as well, and the worker accept nobody.
            LOGGER.exception("No more clients can be accepted, by a fault of the daemon's own")
            self.broken = True
            os.eventfd_write(self.attention, 1)
        with self._lock:
            self._over = True
            self._has_leader = False
            self._tell_change()

    def _serve_one(self, arrival: A) -> None:
        if self._is_quick(arrival):
            self._begin_in_place()
        else:
            with self._lock:
                left = self._leave_lead()
            if left:
                self._no_thread_left()
        try:
            self._serve(arrival)
        except Exception:
            LOGGER.exception("A connection ended by a fault of the daemon's own")

    def _begin_in_place(self) -> None:
        with self._lock:
            if self._over:
                self._leave_lead()
                return
            self._in_place_since = time.monotonic()
            self._in_place_thread = threading.get_ident()
            self._in_place_lately = True
            watched, self._watched = self._watched, True
        if not watched:
            os.eventfd_write(self.attention, 1)

    def _leave_lead(self) -> bool:
        """The leader serves, and leads no more: promote a follower. Called under the lock.

        Returns whether there is none, so that `no_thread_left` is to be called without the lock.
        """
        self._in_place_since = 0.0
        self._has_leader = False
        self._serving += 1
        if self._over:
            self._tell_change()
            return False
        if self._serving < self._limit:
            self._promote()
        return not self._has_leader

    def _promote(self) -> None:
        """Make an idle thread the leader, or start one. Called under the lock."""
        if self._over:
            return
        self._has_leader = True
        if self._idle:
            self._idle -= 1
            self._promotions.put(None)
            return
        try:
            self._start_thread()
        except RuntimeError:
            # The next thread that has served leads, or the main thread tries again.
            self._has_leader = False
            now = time.monotonic()
            if now - self._complained >= COMPLAIN_SECONDS:
                self._complained = now
                LOGGER.warning("Cannot start another thread; clients wait for one that is there")

    def _start_thread(self) -> None:
        OwnThread(target=self._run, name="client", daemon=True).start()

    def _lead_again(self) -> bool:
        """Whether this thread, which has served, is the leader; it is idle otherwise."""
        with self._lock:
            if self._in_place_since:
                # If it is another thread that serves in place, the two change roles.
                self._in_place_since = 0.0
                return True
            self._serving -= 1
            if self._over:
                self._tell_change()
            elif not self._has_leader:
                self._has_leader = True
                return True
            self._idle += 1
            return False
