"""Security events: always counted, and logged as JSON lines, a few per second at most.

An event is a request that an operator may want to examine: for a module or function that is not
exposed, malformed or oversized. The line has the client's credentials as the kernel tells them
(SO_PEERCRED), and of what the client sent only the names.
"""

import logging
import threading
import time
from typing import NamedTuple

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


class SecurityEvent(NamedTuple):
    """An event as the statistics keep it. `pid` and `uid` are the client's; -1: unknown."""

    name: str
    message: str
    pid: int
    uid: int


class SecurityLog:
    """One worker's writer of event lines. Called from the threads that serve clients."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def event(self, refusal: Refusal, client: ClientSocket) -> SecurityEvent | None:
        """Log a refusal that is an event, and return the event; None when it is none.

        Over the limit of lines per second it is not logged, only counted: `suppressed_before` in
        the next line.
        """
        if refusal.kind not in _NAMES:
            return None
        pid, uid, gid = client.credentials()
        event = SecurityEvent(_NAMES[refusal.kind], printable(refusal.message[:500]), pid, uid)
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            self._written += 1
            if self._written > _LINES_PER_SECOND:
                self._suppressed += 1
                return event
            suppressed, self._suppressed = self._suppressed, 0
        line: dict[str, object] = {
            "event": event.name,
            "message": event.message,
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
        LOGGER.warning("%s", json_line(line))
        return event
