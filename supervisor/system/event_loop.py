"""The master's event loop: it calls handlers when descriptors become ready and timers expire.

Any number of descriptors and timers can be registered. Between two events the process sleeps in one
system call: nothing is polled. A handler must return quickly, because nothing else runs meanwhile.

A timer's action that fails runs again after a pause, until it does not: what was to happen happens
late, and what repeats itself goes on. So an action that sets the next timer does that last.

Times are CLOCK_MONOTONIC seconds: setting the machine's clock changes nothing.
"""

import collections
import heapq
import itertools
import logging
import os
import selectors
import time
from collections.abc import Callable

from cpanbridge.supervisor.wording import explain_start

LOGGER = logging.getLogger("cpanbridge.master")

MOST_FAULTS = 10  # in a second; after more, going on would be a busy loop
FAULT_SECONDS = 1.0  # before a timer's action that has failed runs again

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """An action that is to run once without failing, unless it is cancelled before."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    @property
    def pending(self) -> bool:
        """Whether it has neither run to its end nor been cancelled."""
        return self._action is not None

    def cancel(self) -> None:
        """Prevent the action; without effect when it has run."""
        self._action = None

    def run(self) -> None:
        """Called by the loop when the timer expires."""
        if self._action is not None:
            self._action()
            self._action = None


class Loop:
    """Watched descriptors and pending timers. Called in the master only."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # The number keeps timers for the same instant in the order in which they were set.
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._faults: collections.deque[float] = collections.deque(maxlen=MOST_FAULTS + 1)

    def watch(self, descriptor: int, handler: Callable[[], None], events: int = READ) -> None:
        """Call `handler` whenever the descriptor is ready; replaces an earlier handler."""
        if descriptor in self._selector.get_map():
            self._selector.modify(descriptor, events, handler)
        else:
            self._selector.register(descriptor, events, handler)

    def forget(self, descriptor: int) -> None:
        """Stop watching a descriptor, if it is watched. To be called before it is closed."""
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once, in so many seconds."""
        timer = Timer(action)
        self._set(timer, seconds)
        return timer

    def _set(self, timer: Timer, seconds: float) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))

    def turn(self) -> None:
        """Sleep until a descriptor is ready or a timer expires, and call the handlers."""
        watched = self._selector.get_map()
        for key, _ in self._selector.select(self._until_next_timer()):
            # An earlier handler may have closed it, and another file may have its number now.
            if watched.get(key.fd) is key:
                self.attempt(key.data)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            self.attempt(timer.run)
            if timer.pending:
                self._set(timer, FAULT_SECONDS)

    def attempt(self, step: Callable[[], None]) -> None:
        """One step. A fault in one of them does not end the daemon; many in a row do."""
        try:
            step()
        except Exception as error:
            why = ", by a fault of the daemon's own"
            if isinstance(error, OSError):
                why = f": {explain_start(error)}"
            LOGGER.exception("A step of the master failed%s", why)
            self._faults.append(time.monotonic())
            if len(self._faults) > MOST_FAULTS and self._faults[-1] - self._faults[0] < 1.0:
                raise

    def let_go(self) -> None:
        """Called in a forked child: close all descriptors that the master watches."""
        watched = [key.fd for key in self._selector.get_map().values()]
        self._selector.close()
        for descriptor in watched:
            os.close(descriptor)

    def _until_next_timer(self) -> float | None:
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
