"""What the log says of the load: one line when something changes, and then one per interval.

A kind's level as the log tells it rises at once, and falls when it has stayed lower for some time:
what goes over its limit again and again within seconds is told as one violation, not as many.
"""

import logging
import math
from collections.abc import Sequence

from cpanbridge.supervisor.memory.overload_state import CLOSING, Kind, Level, Reading

LOGGER = logging.getLogger("cpanbridge.master")

SETTLE_SECONDS = 5.0
ELEVATED_SHARE = 0.2  # of max_connections: 20 and 50 of the 100 that are the default
HIGH_SHARE = 0.5


class Told:
    """The level of one thing, as the log tells it. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self.level = 0
        self._lower_since = math.inf
        self._next = math.inf

    def is_due(self, level: int, now: float, interval: float) -> bool:
        """Take note of a level, and say whether there is something to tell."""
        if level < self.level:
            self._lower_since = min(self._lower_since, now)
            if now - self._lower_since < SETTLE_SECONDS:
                return self._repeats(now, interval)
        else:
            self._lower_since = math.inf
        changed, self.level = level != self.level, level
        if changed:
            self._lower_since = math.inf
            self._next = now + interval
            return level > 0
        return self._repeats(now, interval)

    def _repeats(self, now: float, interval: float) -> bool:
        if not self.level or now < self._next:
            return False
        self._next = now + interval
        return True

    def was_told(self, now: float, interval: float) -> None:
        """It stood in a line that something else was the reason for."""
        self._next = now + interval


class Alarms:
    """The log's voice. Called in the master after each sample."""

    def __init__(self) -> None:
        self._told = {kind: Told() for kind in Kind}
        self._full = Told()
        self._crowd = Told()
        self._closed = False

    def tell(self, readings: Sequence[Reading], now: float, interval: float) -> None:
        """Log what is new, or has gone on for another `interval`."""
        levels = {
            reading.level
            for reading in readings
            if self._told[reading.kind].is_due(reading.level, now, interval)
        }
        for level in (Level.VIOLATION, Level.WARNING):
            if level not in levels:
                continue
            texts = []
            for reading in readings:
                if reading.level is level:
                    texts.append(str(reading))
                    self._told[reading.kind].was_told(now, interval)
            if level is Level.VIOLATION:
                LOGGER.critical("RESOURCE VIOLATION: %s", texts)
                LOGGER.warning("Resource violations detected, throttling connections: %s", texts)
            else:
                LOGGER.warning("Resource warning: %s", texts)
        self._tell_opening()

    def _tell_opening(self) -> None:
        """That a violation which had closed the gate is over, once for each that was told."""
        closed = any(self._told[kind].level == Level.VIOLATION for kind in CLOSING)
        if self._closed and not closed:
            LOGGER.info("Resource violations are over, connections are accepted again")
        self._closed = closed

    def tell_connections(
        self, connections: int, limit: int, full: bool, now: float, interval: float
    ) -> None:
        """Log when all connections are taken, and when there are many."""
        if self._full.is_due(int(full), now, interval):
            LOGGER.warning("Connection limit reached (%d), rejecting new connections", limit)
        crowd = (connections > ELEVATED_SHARE * limit) + (connections > HIGH_SHARE * limit)
        if self._crowd.is_due(crowd, now, interval):
            if crowd > 1:
                LOGGER.warning(
                    "High connection count detected: %d active connections. "
                    "This may indicate a connection leak.",
                    connections,
                )
            elif crowd:
                LOGGER.info("Elevated connection count: %d active connections.", connections)
