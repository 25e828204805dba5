"""A client's connection in one thread's hands: receiving and sending with limits of time.

The socket is blocking, and the kernel ends a call that takes too long (SO_RCVTIMEO, SO_SNDTIMEO):
unlike poll(2) before each read, that costs a call nothing. A limit is handed to the kernel only
when it differs from the last one.
"""

import contextlib
import select
import struct
import time
from socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    SHUT_RD,
    SHUT_RDWR,
    SHUT_WR,
    SO_PEERCRED,
    SO_RCVTIMEO,
    SO_SNDTIMEO,
    SOCK_STREAM,
    SOL_SOCKET,
    SocketType,
)
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.memory.owners import ClientProcess
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.transfer import Transfer

READ_SIZE = 65536
MOST_DROPPED = 16  # reads; a client that still sends has not understood
_TIMEVAL = struct.Struct("@ll")
_UCRED = struct.Struct("3i")


class Credentials(NamedTuple):
    """Whose a connection was when it was made, as the kernel tells it; -1 each: nobody knows."""

    pid: int  # 0: a process that has no number in this PID namespace
    uid: int
    gid: int


class ClientSocket(msgspec.Struct, eq=False):
    """The other end of a connection. Every method raises OSError when the client has left."""

    descriptor: int  # a blocking socket's; -1 once it is closed
    entry: int  # in the worker's roster
    input_ended: bool = False  # no further request of it is taken up
    stale: bool = False  # because it was silent for too long
    quiet_since: int = 0  # CLOCK_MONOTONIC nanoseconds; 0: it is not the client's turn
    framed: bool = False  # it sends frames; known once it has sent something
    idle: bool = False  # it rests, until it sends something
    rested: bool = False  # `KeepAlive` knows it
    given_up: bool = False  # its room was given back, though a thread still has it
    process: ClientProcess | None = None  # who it is, once somebody needs to know
    taken_over: bool = False  # from another worker
    input_had_ended: bool = False  # perhaps, by a worker that had it before
    lent: bool = False  # another process may hold the socket as well
    transfer: Transfer | None = None  # to another worker, which has not taken it
    _socket: SocketType | None = None
    _receive_limit: float | None = None  # seconds; None: the kernel was told none yet

    @property
    def socket(self) -> SocketType:
        """For what may wait, or needs an option. A quick call needs neither, so it makes none.

        Called by the one that has the connection in its hands.
        """
        if self._socket is None:
            # Without the layer of Python around it, which is of no use to one that is only read
            # from and sent to.
            self._socket = SocketType(AF_UNIX, SOCK_STREAM, 0, self.descriptor)
            self._socket.settimeout(None)  # whatever a module has told socket.setdefaulttimeout
        return self._socket

    @property
    def input_may_have_ended(self) -> bool:
        """Whether the end that was read may be the daemon's doing, which the client is told."""
        return self.input_ended or self.input_had_ended

    def has_left(self) -> bool:
        """Whether nobody would read a reply: the client has closed its end altogether.

        One that has only ended its sending side waits for the reply.
        """
        return syscalls.has_hung_up(self.descriptor)

    def say_last(self, data: bytes) -> None:
        """Send what there is room for, and end the connection both ways. At most `brief.MOST`.

        Called in the place of the thread that serves this client, which still has the connection.
        """
        with contextlib.suppress(OSError):
            syscalls.send(self.descriptor, data)
        with contextlib.suppress(OSError):
            syscalls.shutdown(self.descriptor, SHUT_RDWR)

    def credentials(self) -> Credentials:
        """Who the client is (SO_PEERCRED); -1 each for a socket that is broken already."""
        try:
            told = self.socket.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size)
        except OSError:
            return Credentials(-1, -1, -1)
        return Credentials(*_UCRED.unpack(told))

    def receive(self, seconds: float) -> bytes:
        """Some bytes, or none at the end of file. Raises TimeoutError when none come in time."""
        if seconds != self._receive_limit:
            self._receive_limit = seconds
            _set_timeout(self.socket, SO_RCVTIMEO, seconds)
        try:
            return self.socket.recv(READ_SIZE)
        except BlockingIOError:
            raise TimeoutError from None

    def wait(self, seconds: float, stop: int) -> bool:
        """Wait for the client or for `stop` to be readable; False when neither was in time."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        poll.register(stop, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def send(self, data: bytes, seconds: float) -> None:
        """Send it all. Raises TimeoutError when the client takes nothing for so long."""
        try:
            if len(data) <= syscalls.MOST:
                sent = syscalls.send(self.descriptor, data)
            else:
                sent = self.socket.send(data, MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        _set_timeout(self.socket, SO_SNDTIMEO, seconds)
        rest = memoryview(data)[sent:]
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                raise TimeoutError from None

    def drop_what_follows(self) -> None:
        """Read what a client has sent after its one request, such as a newline.

        Closing with bytes unread makes the kernel reset the connection, and the client would get
        an error after the reply instead of its end.
        """
        for _ in range(MOST_DROPPED):
            if not syscalls.unread(self.descriptor):
                return
            self.socket.recv(READ_SIZE, MSG_DONTWAIT)

    def linger(self, seconds: float) -> None:
        """End the sending side and read on until the client ends its own, but not for longer.

        For a client that may still be sending: closed with bytes unread, it would get an error
        instead of the reply that tells what is wrong.
        """
        syscalls.shutdown(self.descriptor, SHUT_WR)
        until = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := until - time.monotonic()) > 0 and self.receive(left):
                pass

    def close(self) -> None:
        """Close the connection."""
        if self.lent:
            # Closing one of several descriptors would leave the client without an end.
            with contextlib.suppress(OSError):
                syscalls.shutdown(self.descriptor, SHUT_RDWR)
        if self._socket is not None:
            self._socket.detach()
        descriptor, self.descriptor = self.descriptor, -1
        syscalls.close(descriptor)

    def end_input(self, *, stale: bool = False) -> None:
        """Take up no further request: wake a thread that waits in `receive`.

        It reads what was sent before, then the end. May be called from another thread.
        """
        self.stale = stale
        self.input_ended = True
        with contextlib.suppress(OSError):
            syscalls.shutdown(self.descriptor, SHUT_RD)


def _set_timeout(client: SocketType, option: int, seconds: float) -> None:
    # 0 would mean forever, so a time that is over becomes the shortest there is.
    microseconds = max(1, int(seconds * 1e6))
    timeval = _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
    client.setsockopt(SOL_SOCKET, option, timeval)
