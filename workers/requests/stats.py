"""What a worker writes down of its work, for the reports that any worker may be asked for.

Called from any thread that serves clients. A request is written down before its room is given back
and before its reply is sent, so that a client finds what it has done itself in every report.
"""

import threading
import time

from cpanbridge.supervisor.memory.layout import Shared, Slot
from cpanbridge.workers.requests.security_log import SecurityEvent


class StatisticsWriter:
    """The one writer of a slot's books."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._slot = shared.slots[slot]
        self._statistics = shared.statistics[slot]
        self._lock = threading.Lock()

    def ran(self, function: int, succeeded: bool, duration_ns: int, ended: int) -> None:
        """A request has run; `ended` is CLOCK_MONOTONIC nanoseconds."""
        statistics = self._statistics
        with self._lock:
            self._slot.busy_ns += duration_ns
            statistics.histogram.add(duration_ns, succeeded, ended)
            statistics.function_stats.add(function, succeeded, duration_ns, ended)

    def error(self, function: int, duration_ns: int, message: str) -> None:
        """A request has failed in this way."""
        with self._lock:
            self._statistics.errors.add(time.time_ns(), duration_ns, function, message)

    def refused(self) -> None:
        """A request is answered with an error without having run."""
        with self._lock:
            self._slot.refused += 1

    def event(self, event: SecurityEvent) -> None:
        """A request was one that somebody should perhaps look at."""
        with self._lock:
            _count(self._slot, event.name)
            text = f"{event.name}\n{event.message}"
            self._statistics.events.add(time.time_ns(), event.pid, event.uid, text)

    def overloaded(self, reason: str) -> None:
        """A request is told Overloaded for this reason (see gate.Obstacle)."""
        with self._lock:
            _count(self._slot, f"overloaded_{reason}")

    def rejected(self) -> None:
        """A client is told so instead of being let in."""
        with self._lock:
            self._slot.rejected += 1


def _count(slot: Slot, field: str) -> None:
    setattr(slot, field, getattr(slot, field) + 1)
