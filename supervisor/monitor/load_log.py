"""The load in the log: one line when something changes, and then one per interval.

The level that is logged rises at once, and falls when the measured one has stayed lower for some
time: what exceeds its limit again and again within seconds is logged as one violation, not as many.
"""

import logging
import math
from collections.abc import Sequence

from cpanbridge.supervisor.memory.overload_state import CLOSING, Kind, Level, Reading

LOGGER = logging.getLogger("cpanbridge.master")

SETTLE_SECONDS = 5.0
ELEVATED_SHARE = 0.2  # of max_connections: 20 and 50 of the 100 that are the default
HIGH_SHARE = 0.5


class LoggedLevel:
    """The level of one thing as it was logged last. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self) -> None:
        self.level = 0
        self._lower_since = math.inf
        self._next = math.inf

    def is_due(self, level: int, now: float, interval: float) -> bool:
        """Record a level; returns whether a line is to be logged."""
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

    def was_logged(self, now: float, interval: float) -> None:
        """Called when it was logged in a line that another thing was the reason for."""
        self._next = now + interval


class Alarms:
    """Logs the load. Called in the master after each sample."""

    def __init__(self) -> None:
        self._logged = {kind: LoggedLevel() for kind in Kind}
        self._full = LoggedLevel()
        self._many = LoggedLevel()
        self._closed = False

    def log(self, readings: Sequence[Reading], now: float, interval: float) -> None:
        """Log what is new, or has gone on for another `interval`."""
        levels = {
            reading.level
            for reading in readings
            if self._logged[reading.kind].is_due(reading.level, now, interval)
        }
        for level in (Level.VIOLATION, Level.WARNING):
            if level not in levels:
                continue
            texts = []
            for reading in readings:
                if reading.level is level:
                    texts.append(str(reading))
                    self._logged[reading.kind].was_logged(now, interval)
            if level is Level.VIOLATION:
                LOGGER.critical("RESOURCE VIOLATION: %s", texts)
                LOGGER.warning("Resource violations detected, throttling connections: %s", texts)
            else:
                LOGGER.warning("Resource warning: %s", texts)
        self._log_opening()

    def _log_opening(self) -> None:
        """Log once that the violations which had closed the gate are over."""
        closed = any(self._logged[kind].level == Level.VIOLATION for kind in CLOSING)
        if self._closed and not closed:
            LOGGER.info("Resource violations are over, connections are accepted again")
        self._closed = closed

    def log_connections(
        self, connections: int, limit: int, full: bool, now: float, interval: float
    ) -> None:
        """Log when all connections are taken, and when there are many."""
        if self._full.is_due(int(full), now, interval):
            LOGGER.warning("Connection limit reached (%d), rejecting new connections", limit)
        level = (connections > ELEVATED_SHARE * limit) + (connections > HIGH_SHARE * limit)
        if self._many.is_due(level, now, interval):
            if level > 1:
                LOGGER.warning(
                    "High connection count detected: %d active connections. "
                    "This may indicate a connection leak.",
                    connections,
                )
            elif level:
                LOGGER.info("Elevated connection count: %d active connections.", connections)
