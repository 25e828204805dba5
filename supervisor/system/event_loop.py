"""The master's event loop: what is done when a descriptor becomes readable, or when a time comes.

Any number of descriptors and timers can be registered, by whoever owns them; the loop knows nothing
of what they are for. Between two events the process sleeps in one system call: nothing is polled.
A handler must return quickly, for nothing else happens meanwhile.

Times are CLOCK_MONOTONIC seconds: setting the machine's clock changes nothing.
"""

import heapq
import itertools
import logging
import os
import selectors
import time
from collections.abc import Callable

LOGGER = logging.getLogger("cpanbridge.master")

MOST_FAULTS = 10  # in a second: more, and going on is a busy loop

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Timer:
    """Something to be done once at a time to come, unless it is cancelled before."""

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    @property
    def pending(self) -> bool:
        """Whether it is still to come."""
        return self._action is not None

    def cancel(self) -> None:
        """It will not happen; without effect when it has."""
        self._action = None

    def run(self) -> None:
        """Called by the loop when the time has come."""
        action, self._action = self._action, None
        if action is not None:
            action()


class Loop:
    """Descriptors that are watched and timers that are to come. Called in the master only."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # The number keeps those for the same instant in the order in which they were set.
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._faults: list[float] = []

    def watch(self, descriptor: int, handler: Callable[[], None], events: int = READ) -> None:
        """Call `handler` whenever the descriptor is ready; watched already: from now on so."""
        if descriptor in self._selector.get_map():
            self._selector.modify(descriptor, events, handler)
        else:
            self._selector.register(descriptor, events, handler)

    def forget(self, descriptor: int) -> None:
        """Watch it no longer. To be called before it is closed."""
        self._selector.unregister(descriptor)

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once, in so many seconds."""
        timer = Timer(action)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))
        return timer

    def turn(self) -> None:
        """Sleep until something is to be done, and do it."""
        watched = self._selector.get_map()
        for key, _ in self._selector.select(self._until_next_timer()):
            # A handler before this one may have closed it, and another may have its number now.
            if watched.get(key.fd) is key:
                self._do(key.data)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            self._do(heapq.heappop(self._timers)[2].run)

    def _do(self, step: Callable[[], None]) -> None:
        """One step. A fault of our own in one of them is no reason to end all that is served."""
        try:
            step()
        except Exception:
            LOGGER.exception("A step of the master failed, by a fault of the daemon's own")
            now = time.monotonic()
            self._faults = [at for at in self._faults if now - at < 1.0] + [now]
            if len(self._faults) > MOST_FAULTS:
                raise

    def let_go(self) -> None:
        """Called in a forked child: close all that the master watches, which is its alone."""
        watched = [key.fd for key in self._selector.get_map().values()]
        self._selector.close()
        for descriptor in watched:
            os.close(descriptor)

    def _until_next_timer(self) -> float | None:
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
