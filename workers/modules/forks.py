"""What a child that a module forks must not keep of its worker.

A module may fork without exec: multiprocessing does. The child has copies of every descriptor and
the worker's signal handlers. As long as it lives, a client that waits for the end of its reply
would wait too; and a TERM meant for it would be heard by the worker, through the wake-up
descriptor. So in such a child the signals go back to their defaults, and every client's socket and
the listening ones give way to /dev/null, which keeps their numbers taken: the objects that own
them are still about.

A template forks workers, which are to keep all of that: `fork_worker` is for them.

Called in the child of a worker or a template, by the interpreter.
"""

import os
import signal
import socket
import threading
from collections.abc import Collection

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Now:
    """What this process is at."""

    forks_a_worker = False


def fork_worker() -> int:
    """As os.fork, for a child that goes on as a part of the daemon."""
    _Now.forks_a_worker = True
    try:
        return os.fork()
    finally:
        _Now.forks_a_worker = False


def let_go_in_children(sockets: Collection[str]) -> None:
    """From now on, children that this process forks keep nothing of the worker on these paths."""
    paths = frozenset(sockets)
    masks = threading.local()

    def before() -> None:
        # A signal may reach the child before it has let go of the handlers.
        masks.kept = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.kept)

    def after_in_child() -> None:
        if not _Now.forks_a_worker:
            _let_go(paths)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def _let_go(paths: Collection[str]) -> None:
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    # Where a module has set this, looking at a socket makes it non-blocking, in the worker too.
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if _is_ours(int(name), paths):
            os.dup2(null, int(name), inheritable=False)
    os.close(null)
    socket.setdefaulttimeout(default)


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
