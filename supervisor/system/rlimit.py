"""How many file descriptors a process may have open, in proportion to what the daemon is set to."""

import contextlib
import logging
import resource

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import MOST_REJECTED, Wakeups

LOGGER = logging.getLogger("cpanbridge.master")

_BELLS = len(Wakeups._fields)  # of each slot
_SPARE = 128


def raise_limit(limits: Limits, slots: int) -> None:
    """Allow as many as a worker may need, as far as the system lets us. Workers inherit it.

    A worker has one for each connection, and one for each client process that has state in it.
    """
    clients = limits.max_connections + MOST_REJECTED + limits.max_sessions
    needed = clients + _BELLS * slots + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    if hard < needed:
        LOGGER.warning(
            "limits.max_connections = %d and limits.max_sessions = %d need %d file descriptors, "
            "but only %d are allowed: raise the limit (ulimit -n, LimitNOFILE=)",
            limits.max_connections,
            limits.max_sessions,
            needed,
            hard,
        )
