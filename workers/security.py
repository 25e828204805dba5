"""Security events: counted always, logged as JSON lines, and no more than a few a second.

An event is a request that somebody should perhaps look at: a module or function that is not
exposed, a malformed or oversized request. The line says who it was (the kernel's word for it,
SO_PEERCRED), and of what the client sent only the names.
"""

import logging
import socket
import struct
import threading
import time

from cpanbridge.supervisor.text import json_line, printable
from cpanbridge.workers.protocol import Refusal

LOGGER = logging.getLogger("cpanbridge.security")
LINES_PER_SECOND = 10

_KINDS = {
    "InvalidRequest": "invalid_request",
    "ModuleNotAllowed": "module_not_allowed",
    "FunctionNotAllowed": "function_not_allowed",
    "PermissionDenied": "permission_denied",
}
_UCRED = struct.Struct("3i")


def is_event(error_type: str) -> bool:
    """Whether a refusal of this kind is a security event."""
    return error_type in _KINDS


class SecurityLog:
    """One worker's writer of event lines. Called from any of its threads."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._second = 0
        self._written = 0
        self._suppressed = 0

    def event(self, refusal: Refusal, client: socket.socket) -> None:
        """Log one event, or count it as suppressed when this second has had enough lines."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            self._written += 1
            if self._written > LINES_PER_SECOND:
                self._suppressed += 1
                return
            suppressed, self._suppressed = self._suppressed, 0
        try:
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, gid = _UCRED.unpack(credentials)
        except OSError:
            pid = uid = gid = -1  # the socket is broken already
        line: dict[str, object] = {
            "event": _KINDS[refusal.kind],
            "message": printable(refusal.message[:500]),
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
