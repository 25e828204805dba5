"""Security events: counted always, logged as JSON lines, and no more than a few a second.

An event is a request that somebody should perhaps look at: a module or function that is not
exposed, a malformed or oversized request. The line says who it was (the kernel's word for it,
SO_PEERCRED), and of what the client sent only the names.
"""

import logging
import threading
import time
from typing import NamedTuple

from cpanbridge.supervisor.system.log_text import json_line, printable
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.protocol.messages import Refusal

LOGGER = logging.getLogger("cpanbridge.security")
LINES_PER_SECOND = 10

_NAMES = {
    "InvalidRequest": "invalid_request",
    "ModuleNotAllowed": "module_not_allowed",
    "FunctionNotAllowed": "function_not_allowed",
    "PermissionDenied": "permission_denied",
}


class SecurityEvent(NamedTuple):
    """What is remembered of one; `pid` and `uid` are the client's, -1 when they are not known."""

    name: str
    message: str
    pid: int
    uid: int


class SecurityLog:
    """One worker's writer of event lines. Called from any of its threads."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def event(self, refusal: Refusal, client: ClientSocket) -> SecurityEvent | None:
        """Log a refusal that is an event, and return the event; None when it is none.

        It is only counted as suppressed when this second has had enough lines.
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
            if self._written > LINES_PER_SECOND:
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
