"""Which process a client is: the one that connected, by its pid, start time and user.

A pid alone tells nothing: its process may have ended since it connected, and another one have the
number now, while a child still uses the connection. Since Linux 6.5 the kernel gives a pidfd of the
process that connected, whenever it is asked for it; while that process lives, nobody else has its
number. An older kernel tells the number alone: then a process that started after the connection was
accepted is another one.

That no descriptor is left to ask by says nothing of a process: it is an OSError.
"""

import errno
import socket
import time

from cpanbridge.supervisor.memory.owners import BY_CONNECTION, ClientProcess
from cpanbridge.supervisor.system.exhaustion import is_exhausted
from cpanbridge.supervisor.system.start_time import start_time
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.client_socket import ClientSocket

SO_PEERPIDFD = 77  # see unix(7); Python has no name for it
_TICKS = 100  # of a start time in a second: USER_HZ


def has_connected(client: ClientSocket, start: int) -> bool:
    """Whether the process that has the client's pid, and started then, is the one that connected.

    `start` is to be asked first. Raises OSError when that cannot be told for now.
    """
    try:
        pidfd = client.socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return _started_before_accept(client, start)
        if is_exhausted(error):
            raise
        return False  # it has ended, and been waited for
    try:
        return not syscalls.is_readable(pidfd)  # that is how a pidfd says that its process ended
    finally:
        syscalls.close(pidfd)


def _started_before_accept(client: ClientSocket, start: int) -> bool:
    """The same before Linux 6.5.

    A number that is given anew between connecting and being accepted, or within the hundredth of a
    second that a start time tells, is not seen. A process of another user is never mistaken.
    """
    since = time.monotonic_ns() - client.accepted_at
    accepted_at = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since
    return start <= accepted_at * _TICKS // 1_000_000_000


def has_ended(process: ClientProcess) -> bool:
    """Whether a client that stands in the shared table has certainly ended.

    One that is known by its connection has, when the worker that has the connection has ended.
    """
    if process.pid == BY_CONNECTION:
        return True
    try:
        return start_time(process.pid) != process.start
    except OSError:
        return False  # it cannot be told for now
