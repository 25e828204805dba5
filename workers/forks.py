"""What a module's own fork must not keep.

A module may fork without exec: multiprocessing does. The child has copies of every descriptor, and
as long as it lives, a client that waits for the end of its reply would wait too. So in such a child
every client's socket and the listening ones give way to /dev/null, which keeps the numbers taken,
since Python objects that own them are still about.

Called in the child of a worker, by the interpreter.
"""

import os
import socket
from collections.abc import Collection


def let_go_in_children(sockets: Collection[str]) -> None:
    """From now on, children that this process forks let go of connections on these paths."""
    paths = frozenset(sockets)
    os.register_at_fork(after_in_child=lambda: _let_go(paths))


def _let_go(paths: Collection[str]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if _is_ours(int(name), paths):
            os.dup2(null, int(name), inheritable=False)
    os.close(null)


def _is_ours(descriptor: int, paths: Collection[str]) -> bool:
    try:
        probe = socket.socket(fileno=descriptor)
    except OSError:
        return False  # not a socket, or the listing's own descriptor, closed by now
    try:
        # An accepted socket has the name of the one that it was accepted from.
        return probe.family == socket.AF_UNIX and probe.getsockname() in paths
    except OSError:
        return False
    finally:
        probe.detach()
