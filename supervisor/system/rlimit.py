"""The limit of open file descriptors (RLIMIT_NOFILE), raised to what the settings need."""

import contextlib
import logging
import resource

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import MOST_REJECTED
from cpanbridge.supervisor.memory.wakeups import Wakeups

LOGGER = logging.getLogger("cpanbridge.master")

_SPARE = 128


def raise_limit(limits: Limits, slots: int) -> None:
    """Raise the soft limit to what a worker may need, or to the hard limit. Workers inherit it.

    A worker has a descriptor for each connection and for each client process that has state in it.
    Called in the master.
    """
    clients = limits.max_connections + MOST_REJECTED + limits.max_sessions
    needed = clients + len(Wakeups._fields) * slots + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    if hard < needed:
        LOGGER.warning(
            "limits.max_connections = %d and limits.max_sessions = %d need %d file descriptors, "
            "but only %d are allowed: raise the limit (ulimit -n, LimitNOFILE=)",
            *(limits.max_connections, limits.max_sessions, needed, hard),
        )
