"""How many clients wait in the listen queue of a socket, from the kernel (sock_diag(7)).

Their connect(2) has returned, and they may have sent their request, but they are not accepted yet.
No system call on the socket tells their number. The netlink interface that ss(8) uses does.
"""

import os
import socket
import struct
from collections.abc import Sequence

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_UDIAG_SHOW_RQLEN = 0x10
_UNIX_DIAG_RQLEN = 4
_ANY_COOKIE = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_REPLY_SIZE = 16  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr


class Backlog:
    """Asks the kernel for the listen queues of sockets. Called in the master."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._kernel = socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG)

    def waiting(self, listeners: Sequence[socket.socket]) -> int:
        """Clients in all these queues together. Raises OSError where the kernel does not tell."""
        return sum(self._waiting(os.fstat(listener.fileno()).st_ino) for listener in listeners)

    def _waiting(self, inode: int) -> int:
        request = _REQUEST.pack(
            *(socket.AF_UNIX, 0, 0, 0xFFFFFFFF),
            *(inode & 0xFFFFFFFF, _UDIAG_SHOW_RQLEN, _ANY_COOKIE, _ANY_COOKIE),
        )
        size = _HEADER.size + len(request)
        self._kernel.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + request)
        reply = self._kernel.recv(8192)  # the kernel has replied within send(2)
        length, kind, *_ = _HEADER.unpack_from(reply)
        if kind == _NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", reply, _HEADER.size)
            raise OSError(-number, os.strerror(-number))
        at = _HEADER.size + _REPLY_SIZE
        while kind == _SOCK_DIAG_BY_FAMILY and at < length:
            attribute_length, attribute = _ATTRIBUTE.unpack_from(reply, at)
            if attribute == _UNIX_DIAG_RQLEN:
                queued, _ = struct.unpack_from("=II", reply, at + _ATTRIBUTE.size)
                return int(queued)
            at += (attribute_length + 3) & ~3
        return 0
