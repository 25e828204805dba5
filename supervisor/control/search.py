"""Finding daemons by the configuration file that they read, where the file does not say where.

Called in the `cpanbridged` command.
"""

import os
from collections.abc import Iterator

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.control.client import Target, describe
from cpanbridge.supervisor.listening import listener

_ACCEPTS = 0x10000  # __SO_ACCEPTCON, linux/net.h: the socket listens


def daemons_of(file: str) -> list[tuple[str, int]]:
    """The daemons that say that they read a configuration file: socket path, and user.

    Asked are those that listen anywhere on this host, as far as this user may; another user's only
    by root. Their answers are claims.
    """
    found = []
    for control in _listening():
        path = control.removesuffix(listener.CONTROL)
        try:
            uid = os.stat(control).st_uid
            target = Target(path, uid if os.getuid() == 0 else None)
            if target.trusts(uid) and describe(target).get("configuration") == file:
                found.append((path, uid))
        except (OperatorError, OSError):
            continue
    return found


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
