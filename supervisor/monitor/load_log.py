"""The load in the log: one line when something changes, and then one per interval.

The level that is logged rises at once, and falls when the measured one has stayed lower for some
time: what exceeds its limit again and again within seconds is logged as one violation, not as many.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpanbridge.supervisor.memory.overload_state import CLOSING, Kind, Level, Reading, at_level
from cpanbridge.supervisor.wording import count_of

LOGGER = logging.getLogger("cpanbridge.master")

SETTLE_SECONDS = 5.0
ELEVATED_SHARE = 0.2  # of max_connections: 20 and 50 of the 100 that are the default
HIGH_SHARE = 0.5
_TOLD_BESIDES = {Kind.CONNECTIONS}  # "Connection limit reached" says that clients wait
_MANY = {
    1: (logging.INFO, "Elevated connection count: %s."),
    2: (
        logging.WARNING,
        "High connection count detected: %s. This may indicate a connection leak.",
    ),
}


@dataclass
class LoggedLevel:
    """The level of one thing as it was logged last. Times are CLOCK_MONOTONIC seconds."""

    level: int = 0
    lower_since: float = math.inf
    next_at: float = math.inf  # when a line is due, if the level stays

    def is_due(self, level: int, now: float, interval: float) -> bool:
        """Record a level; returns whether a line is to be logged."""
        self.lower_since = min(self.lower_since, now) if level < self.level else math.inf
        if level > self.level or now - self.lower_since >= SETTLE_SECONDS:
            self.level, self.lower_since, self.next_at = level, math.inf, now
        if not self.level or now < self.next_at:
            return False
        self.next_at = now + interval
        return True


class Alarms:
    """Logs the load. Called in the master after each sample."""

    def __init__(self) -> None:
        self._logged = {kind: LoggedLevel() for kind in Kind}
        self._full = LoggedLevel()
        self._many = LoggedLevel()

    def log(self, readings: Sequence[Reading], now: float, interval: float) -> None:
        """Log what is new, or has gone on for another `interval`."""
        before = self._violations()
        levels = {
            reading.level
            for reading in readings
            if self._logged[reading.kind].is_due(reading.level, now, interval)
        }
        for reading in readings:
            if reading.level in levels:  # it is in the line that another was the reason for
                self._logged[reading.kind].next_at = now + interval
        if Level.VIOLATION in levels:
            LOGGER.critical("RESOURCE VIOLATION: %s", at_level(readings, Level.VIOLATION))
        begun = self._violations() - before
        if not begun <= _TOLD_BESIDES:
            # Once, in the words that are asked for; while it lasts, the line above says it.
            throttling = [each for each in readings if each.kind not in _TOLD_BESIDES]
            texts = at_level(throttling, Level.VIOLATION)
            LOGGER.warning("Resource violations detected, throttling connections: %s", texts)
        if Level.WARNING in levels:
            LOGGER.warning("Resource warning: %s", at_level(readings, Level.WARNING))
        self._log_ends(readings, before)

    def _violations(self) -> set[Kind]:
        """What is logged to be over its limit."""
        return {kind for kind, logged in self._logged.items() if logged.level == Level.VIOLATION}

    def _log_ends(self, readings: Sequence[Reading], before: set[Kind]) -> None:
        """Log once that violations are over; those that close the gate when all of them are."""
        now = self._violations()
        if not before.isdisjoint(CLOSING) and now.isdisjoint(CLOSING):
            LOGGER.info("Resource violations are over, requests run again")
        ended = before - now - set(CLOSING)
        if ended:
            texts = [str(each) for each in readings if each.kind in ended]
            LOGGER.info("Resource violations are over: %s", texts)

    def log_connections(
        self, connections: int, limit: int, full: bool, now: float, interval: float
    ) -> None:
        """Log when all connections are taken, and when there are many."""
        if self._full.is_due(int(full), now, interval):
            LOGGER.warning("Connection limit reached (%d), rejecting new connections", limit)
        level = (connections > ELEVATED_SHARE * limit) + (connections > HIGH_SHARE * limit)
        if self._many.is_due(level, now, interval) and level:
            LOGGER.log(*_MANY[level], count_of(connections, "active connection"))
