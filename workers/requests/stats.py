"""What a worker records of its requests, for reports that any worker may be asked for.

Called from any thread that serves clients. A request is recorded before its room is given back and
before its reply is sent, so every report includes the requests that its client has made before.
"""

import logging
import threading
import time

from cpanbridge.supervisor.memory.fields import EVENT_KINDS, REASONS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.system.log_text import json_line, printable
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.protocol.refusal import Refusal

LOGGER = logging.getLogger("cpanbridge.security")
_LINES_PER_SECOND = 10

_NAMES = {
    "InvalidRequest": "invalid_request",
    "ModuleNotAllowed": "module_not_allowed",
    "FunctionNotAllowed": "function_not_allowed",
    "PermissionDenied": "permission_denied",
}


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

    def event(self, kind: str, message: str, pid: int, uid: int) -> None:
        """Count and record a security event. `pid` and `uid` are the client's; -1: unknown."""
        with self._lock:
            self._slot.security_events[EVENT_KINDS.index(kind)] += 1
            self._statistics.events.add(time.time_ns(), pid, uid, f"{kind}\n{message}")

    def overloaded(self, reason: str) -> None:
        """Count a request that is answered Overloaded, by its reason: one of `fields.REASONS`."""
        with self._lock:
            self._slot.overloaded[REASONS.index(reason)] += 1

    def pinged(self) -> None:
        """Count a ping, which is no request."""
        with self._lock:
            self._slot.pings += 1

    def waited(self, reason: str, duration_ns: int) -> None:
        """Record that a request has waited for so long; for the reason see `fields.REASONS`."""
        number = REASONS.index(reason)
        with self._lock:
            self._slot.waits[number] += 1
            self._slot.waited_ns[number] += duration_ns
            self._statistics.waits[number].add(duration_ns, True, time.monotonic_ns())

    def rejected(self) -> None:
        """Count a client that is answered Overloaded instead of being accepted."""
        with self._lock:
            self._slot.rejected += 1


class SecurityLog:
    """Security events: always counted, and logged as JSON lines, a few per second at most.

    An event is a request that an operator may want to examine: for a module or function that is not
    exposed, malformed or oversized. The line has the client's credentials as the kernel tells them
    (SO_PEERCRED), and of what the client sent only the names.
    """

    def __init__(self, worker: int, statistics: StatisticsWriter) -> None:
        self._worker = worker
        self._statistics = statistics
        self._lock = threading.Lock()
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def record(self, refusal: Refusal, client: ClientSocket) -> None:
        """Count and log a refusal if it is an event.

        Over the limit of lines per second it is not logged, only counted: `suppressed_before` in
        the next line.
        """
        event = _NAMES.get(refusal.kind)
        if event is None:
            return
        pid, uid, gid = client.credentials()
        message = printable(refusal.message[:500])
        self._statistics.event(event, message, pid, uid)
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            self._written += 1
            if self._written > _LINES_PER_SECOND:
                self._suppressed += 1
                return
            suppressed, self._suppressed = self._suppressed, 0
        line: dict[str, object] = {
            "event": event,
            "message": message,
            "request_id": refusal.request_id,
            "perl_caller": refusal.perl_caller,
            "pid": pid,
            "uid": uid,
            "gid": gid,
            "worker": self._worker,
            "timestamp": time.time(),
        }
        if suppressed:
            line["suppressed_before"] = suppressed
        # In a log whose lines are objects it is one.
        fields = {"message": f"Security event: {message}", "security_event": line}
        LOGGER.warning("%s", json_line(line), extra={"fields": fields})
