"""What a worker records of its requests, for reports that any worker may be asked for.

Called from any thread that serves clients. A request is recorded before its room is given back and
before its reply is sent, so every report includes the requests that its client has made before.
"""

import threading
import time

from cpanbridge.supervisor.memory.fields import EVENT_KINDS, REASONS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.requests.security_log import SecurityEvent


class StatisticsWriter:
    """The only writer of a slot's statistics."""

    def __init__(self, shared: Shared, slot: int) -> None:
        self._slot = shared.slots[slot]
        self._statistics = shared.statistics[slot]
        self._lock = threading.Lock()

    def ran(self, function: int, succeeded: bool, duration_ns: int, ended: int) -> None:
        """Record a request that has run; `ended` is CLOCK_MONOTONIC nanoseconds."""
        statistics = self._statistics
        with self._lock:
            self._slot.busy_ns += duration_ns
            statistics.histogram.add(duration_ns, succeeded, ended)
            statistics.function_stats.add(function, succeeded, duration_ns, ended)

    def error(self, function: int, duration_ns: int, message: str) -> None:
        """Record the error message of a request that has failed."""
        with self._lock:
            self._statistics.errors.add(time.time_ns(), duration_ns, function, message)

    def refused(self) -> None:
        """Count a request that is answered with an error without having run."""
        with self._lock:
            self._slot.refused += 1

    def event(self, event: SecurityEvent) -> None:
        """Count and record a security event."""
        with self._lock:
            self._slot.security_events[EVENT_KINDS.index(event.name)] += 1
            text = f"{event.name}\n{event.message}"
            self._statistics.events.add(time.time_ns(), event.pid, event.uid, text)

    def overloaded(self, reason: str) -> None:
        """Count a request that is answered Overloaded, by its reason: one of `fields.REASONS`."""
        with self._lock:
            self._slot.overloaded[REASONS.index(reason)] += 1

    def rejected(self) -> None:
        """Count a client that is answered Overloaded instead of being accepted."""
        with self._lock:
            self._slot.rejected += 1
