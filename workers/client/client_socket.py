"""A client's socket: receiving and sending with time limits, and what a worker knows of the client.

The socket is blocking, and the kernel ends a call that takes too long (SO_RCVTIMEO, SO_SNDTIMEO).

One thread at a time owns a client: the one that serves it, or the main thread where no thread does.
Only that thread may use the socket, but for what says otherwise.
"""

import contextlib
import select
import socket
import struct
import time
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.memory.owners import ClientProcess
from cpanbridge.workers.client import syscalls
from cpanbridge.workers.client.transfer import Transfer

READ_SIZE = 65536
_MOST_DISCARDED = 16  # reads; a client that sends even more breaks the protocol
_TIMEVAL = struct.Struct("@ll")
_UCRED = struct.Struct("3i")


class Credentials(NamedTuple):
    """The client process when it connected, as the kernel says (SO_PEERCRED)."""

    pid: int = -1  # 0: a process that has no number in this PID namespace; -1: unknown
    uid: int = -1
    gid: int = -1


class ClientSocket(msgspec.Struct, eq=False):
    """A client's socket and state. Receiving and sending raise OSError when it has disconnected.

    Of the fields, those without a writer named are written by the thread that owns the client.
    """

    descriptor: int  # a blocking socket's; -1 once it is closed
    entry: int  # in the worker's connection table
    accepted_at: int = 0  # CLOCK_MONOTONIC nanoseconds, by the worker that accepted it

    # Written by `ConnectionDrainer` under its lock, in any thread.
    input_ended: bool = False  # this worker has ended the input: no further request can come
    stale: bool = False  # it did so because the client was silent for `stale_timeout`
    framed: bool = False  # the framed form, with keep-alive; known once a byte has come

    # Read by `ConnectionDrainer`, in the main thread, for the stale and idle timeouts.
    quiet_since: int = 0  # CLOCK_MONOTONIC nanoseconds; 0: the daemon does not wait for the client
    idle: bool = False  # between two requests; no thread serves it
    # Read there when the worker drains: its request waits for room, and may be handed over.
    waits: bool = False

    in_keep_alive: bool = False  # it was idle before, so `KeepAlive` may watch it; written there
    released: bool = False  # `CallTimeouts` has given its connection's room back, under its lock
    process: ClientProcess | None = None  # written by `Affinity` with the first call that needs it

    # Written when the client was handed over by another worker, before anything is read.
    taken_over: bool = False
    input_ended_before: bool = False  # perhaps: a worker that had the client may have ended it
    # Other descriptors of the socket may be open: in another worker, or in a session of this one.
    duplicated: bool = False
    # It is on its way to another worker, which has not taken it, or it was returned.
    transfer: Transfer | None = None

    _socket: socket.SocketType | None = None

    @property
    def socket(self) -> socket.SocketType:
        """A socket object, for what may wait or needs an option. A quick call creates none."""
        if self._socket is None:
            # The C type: the Python class around it adds nothing to receiving and sending.
            self._socket = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, self.descriptor)
            self._socket.settimeout(None)  # whatever a module has told socket.setdefaulttimeout
        return self._socket

    @property
    def input_may_have_ended(self) -> bool:
        """Whether an end of file may be the daemon's doing; then the client is told about it."""
        return self.input_ended or self.input_ended_before

    def send_last(self, data: bytes) -> None:
        """Send what the socket has room for, and shut it down both ways, without waiting.

        `data` has at most `syscalls.MOST` bytes. Called in the main thread, even while another
        thread owns the client.
        """
        with contextlib.suppress(OSError):
            syscalls.send(self.descriptor, data)
        with contextlib.suppress(OSError):
            syscalls.shutdown(self.descriptor, socket.SHUT_RDWR)

    def credentials(self) -> Credentials:
        """The client process; unknown when the socket is broken already."""
        try:
            credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError:
            return Credentials()
        return Credentials(*_UCRED.unpack(credentials))

    def receive(self, seconds: float) -> bytes:
        """Some bytes; none at the end of file. Raises TimeoutError when none come in `seconds`."""
        self._set_timeout(socket.SO_RCVTIMEO, seconds)
        try:
            return self.socket.recv(READ_SIZE)
        except BlockingIOError:
            raise TimeoutError from None

    def wait(self, seconds: float, stop: int) -> bool:
        """Wait until the client or `stop` is readable; False when neither is in `seconds`."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        poll.register(stop, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def send(self, data: bytes, seconds: float) -> None:
        """Send all of `data`. Raises TimeoutError when the client reads nothing for `seconds`."""
        try:
            sent = syscalls.send(self.descriptor, data[: syscalls.MOST])
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        self._set_timeout(socket.SO_SNDTIMEO, seconds)
        rest = memoryview(data)[sent:]
        while rest:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                raise TimeoutError from None

    def discard_input(self) -> None:
        """Read and discard what a client has sent after its one request, such as a newline.

        Closed with unread bytes, it would receive an error after the reply, not the end of file.
        """
        for _ in range(_MOST_DISCARDED):
            if not syscalls.unread(self.descriptor):
                return
            self.socket.recv(READ_SIZE, socket.MSG_DONTWAIT)

    def linger(self, seconds: float) -> None:
        """Shut down the sending side, and read until the client ends or `seconds` are over.

        For a client that may still be sending, and would receive an error instead of the reply.
        """
        syscalls.shutdown(self.descriptor, socket.SHUT_WR)
        until = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := until - time.monotonic()) > 0 and self.receive(left):
                pass

    def close(self) -> None:
        """Close the connection, which closing one of several descriptors alone would not."""
        if self.duplicated:
            with contextlib.suppress(OSError):
                syscalls.shutdown(self.descriptor, socket.SHUT_RDWR)
        if self._socket is not None:
            self._socket.detach()
        descriptor, self.descriptor = self.descriptor, -1
        syscalls.close(descriptor)

    def end_input(self, *, stale: bool = False) -> None:
        """Shut down the receiving side, so that no further request can come.

        A thread that waits in `receive` wakes. It reads what was sent before, then an end of file.
        Called in any thread.
        """
        self.stale = stale
        self.input_ended = True
        with contextlib.suppress(OSError):
            syscalls.shutdown(self.descriptor, socket.SHUT_RD)

    def _set_timeout(self, option: int, seconds: float) -> None:
        # 0 would mean no limit, so a time that is over becomes the shortest possible one.
        microseconds = max(1, int(seconds * 1e6))
        timeval = _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
        self.socket.setsockopt(socket.SOL_SOCKET, option, timeval)
