"""Finding daemons by the configuration file that they read, where the file does not say where.

Called in the `cpanbridged` command.
"""

import contextlib
import os
from collections.abc import Iterator

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.control.client import Target, describe
from cpanbridge.supervisor.listening import listener

_ACCEPTS = 0x10000  # __SO_ACCEPTCON, linux/net.h: the socket listens


def daemons_of(file: str) -> list[Target]:
    """The daemons of this user, or root's, that say that they read a configuration file.

    No other user's are asked, who could answer anything.
    """
    found: dict[object, Target] = {}  # by process: one may listen at several paths
    for control in _listening():
        target = Target(control.removesuffix(listener.CONTROL))
        with contextlib.suppress(OperatorError, OSError):
            state = describe(target) if target.trusts(os.stat(control).st_uid) else {}
            if state.get("configuration") == file:
                found.setdefault((state["pid"], state["own_pid"]), target)
    return list(found.values())


def _listening() -> Iterator[str]:
    """The paths of all control sockets of this host (of its network namespace), by proc(5)."""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        next(table)
        for line in table:
            fields = line.rstrip("\n").split(maxsplit=7)
            path = fields[7] if len(fields) == 8 else ""
            accepts = int(fields[3], 16) & _ACCEPTS
            if accepts and path.startswith("/") and path.endswith(listener.CONTROL):
                yield path
