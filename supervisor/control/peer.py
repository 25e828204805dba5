"""Who is at the other end of a control connection, as the kernel tells it.

A number in a file may be a stranger's by now, or mean another process in this PID namespace. The
kernel names the process that listens (`SO_PEERCRED`, unix(7)), which is the master: a new master
listens anew on the sockets that it takes over. To the master it names the one that has connected.
"""

import os
import socket
import struct
from typing import NamedTuple

_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5; the socket module does not have it yet
_UCRED = struct.Struct("3i")


class Peer(NamedTuple):
    """A process, as this one may call it."""

    pid: int  # 0: it has none in this PID namespace
    uid: int

    def describe(self, told: int) -> str:
        """Its process id in words; `told` is the one that it says it has."""
        return f"pid {self.pid}" if self.pid else f"pid {told} of another PID namespace"


def peer_of(connection: socket.socket) -> Peer:
    """Who listens where this connection was made; for who listens: who has made it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return Peer(pid, uid)


def open_pidfd(connection: socket.socket) -> int | None:
    """A pidfd of who listens; None if it has ended, or there is none in this PID namespace.

    Before Linux 6.5 it is made from the process id: then the caller has to know that the process
    has not ended since it listened.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pid = peer_of(connection).pid
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None
