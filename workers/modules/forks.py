"""What a child that a module forks must not inherit from its worker.

A module may fork without exec, as multiprocessing does. The child has copies of every descriptor
and the worker's signal handlers: a client that reads to the end of its reply would wait for the
child to end too, and a TERM sent to the child would reach the worker, through the wake-up
descriptor. So the interpreter resets the signals in such a child, and replaces every client's
socket and the listening ones by /dev/null. Their numbers stay taken, because the objects that own
them still exist.

A template forks workers, which must inherit all of that: `fork_worker` is for them.
"""

import os
import signal
import socket
import threading
from collections.abc import Collection

from cpanbridge.workers.client.spare_descriptors import spare

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


_forks_a_worker = False  # written in a template, which has one thread


def fork_worker() -> int:
    """As os.fork, for a child that is a process of the daemon."""
    global _forks_a_worker
    _forks_a_worker = True
    try:
        return os.fork()
    finally:
        _forks_a_worker = False


def clean_up_children(sockets: Collection[str], descriptors: Collection[int] = ()) -> None:
    """From now on, other children of this process inherit no signal handler and no client.

    `sockets` are the paths of the daemon's listening sockets, `descriptors` what else keeps such
    sockets open.
    """
    paths = frozenset(sockets)
    masks = threading.local()

    def before() -> None:
        # A signal may reach the child before it has reset the handlers.
        masks.kept = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.kept)

    def after_in_child() -> None:
        if not _forks_a_worker:
            _clean_up(paths, descriptors)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def _clean_up(paths: Collection[str], descriptors: Collection[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    spare.let_go()  # first: the rest needs some
    # With a default timeout, which a module may have set, a socket object makes its socket
    # non-blocking, in the worker too.
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) in descriptors or _is_ours(int(name), paths):
            os.dup2(null, int(name), inheritable=False)
    os.close(null)
    socket.setdefaulttimeout(default)


def _is_ours(descriptor: int, paths: Collection[str]) -> bool:
    try:
        probe = socket.socket(fileno=descriptor)
    except OSError:
        return False  # not a socket, or the listing's own descriptor, closed by now
    try:
        # An accepted socket has the name of the listening one.
        return probe.family == socket.AF_UNIX and probe.getsockname() in paths
    except OSError:
        return False
    finally:
        probe.detach()
