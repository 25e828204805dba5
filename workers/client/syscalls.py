"""Non-blocking system calls, made without releasing the interpreter lock.

Python releases the lock around each system call. While a module's function computes in another
thread, the lock is then lost for a whole switch interval (`SWITCH_SECONDS`), and a quick call, with
five system calls or more, would wait for as many intervals. A call that never waits has no need to
release the lock.

Nothing here may be called with a descriptor or a length that could make it wait. (Before Linux 6.16
a client can make `receive` and `close` wait: it sends a lingering socket along as ancillary data,
see listening/listener.py.) Errors are those of the `socket` module: BlockingIOError when there is
nothing yet, else OSError by its number.
"""

import ctypes
import os
import platform
import select
import socket
import struct
from termios import FIONREAD

MOST = 65536  # bytes at a time: copying more would hold the interpreter lock for too long

_MOST = ctypes.c_size_t(MOST)
_RECEIVE_FLAGS = socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_GONE = select.POLLHUP | select.POLLERR
_EPOLL_CTL_ADD, _EPOLL_CTL_DEL = 1, 2

# struct epoll_event of epoll_wait(2): the events, and 64 bits of data, in which `select.epoll`
# stores the descriptor. There is no padding between them on x86-64 (EPOLL_PACKED).
_IS_PACKED = platform.machine() == "x86_64"
_EVENT = struct.Struct("@Iixxxx" if _IS_PACKED else "@Ixxxxixxxx")
_WORDS = _EVENT.size // 4
_DESCRIPTOR_AT = 1 if _IS_PACKED else 2


class _PollDescriptor(ctypes.Structure):
    """struct pollfd of poll(2)."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


# Not CDLL, which releases the interpreter lock around each call.
_libc = ctypes.PyDLL(None, use_errno=True)
_accept4 = _libc.accept4
_recv = _libc.recv
_recv.restype = ctypes.c_ssize_t
_send = _libc.send
_send.restype = ctypes.c_ssize_t
_close = _libc.close
_shutdown = _libc.shutdown
_epoll_ctl = _libc.epoll_ctl
_epoll_wait = _libc.epoll_wait
_ioctl = _libc.ioctl
_poll = _libc.poll


def accept(listener: int) -> int:
    """Accept a client from a non-blocking listener; its descriptor, which is closed on exec."""
    client: int = _accept4(listener, None, None, socket.SOCK_CLOEXEC)
    if client < 0:
        raise _error()
    return client


class Receiver:
    """Receives into a buffer of its own, so one thread at a time may use it."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(MOST)
        self._view = memoryview(self._memory).cast("B")
        self._address = ctypes.c_void_p(ctypes.addressof(self._memory))

    def receive(self, descriptor: int) -> bytes:
        """The bytes that have arrived, up to `MOST`; none at the end of file."""
        length = _recv(descriptor, self._address, _MOST, _RECEIVE_FLAGS)
        if length < 0:
            raise _error()
        return self._view[:length].tobytes()


def send(descriptor: int, data: bytes) -> int:
    """Send what the socket has room for; returns how many bytes. `data` has at most `MOST`."""
    sent: int = _send(descriptor, data, ctypes.c_size_t(len(data)), _SEND_FLAGS)
    if sent < 0:
        raise _error()
    return sent


def shutdown(descriptor: int, how: int) -> None:
    """Shut down a socket's receiving side (SHUT_RD), sending side (SHUT_WR) or both (SHUT_RDWR)."""
    if _shutdown(descriptor, how) < 0:
        raise _error()


def close(descriptor: int) -> None:
    """Close a socket without SO_LINGER."""
    if _close(descriptor) < 0:
        raise _error()


def unread(descriptor: int) -> int:
    """How many bytes have arrived and were not received yet."""
    count = ctypes.c_int()
    if _ioctl(descriptor, FIONREAD, ctypes.byref(count)) < 0:
        raise _error()
    return count.value


def has_hung_up(descriptor: int) -> bool:
    """Whether the other end of a socket is closed in both directions."""
    polled = _PollDescriptor(descriptor, 0, 0)
    return _poll(ctypes.byref(polled), 1, 0) == 1 and bool(polled.revents & _GONE)


def watch(epoll: int, descriptor: int) -> None:
    """As `select.epoll.register` with EPOLLIN."""
    event = _EVENT.pack(select.EPOLLIN, descriptor)
    if _epoll_ctl(epoll, _EPOLL_CTL_ADD, descriptor, event) < 0:
        raise _error()


def unwatch(epoll: int, descriptor: int) -> None:
    """As `select.epoll.unregister`."""
    if _epoll_ctl(epoll, _EPOLL_CTL_DEL, descriptor, None) < 0:
        raise _error()


class ReadySet:
    """The readable descriptors of an epoll. One thread at a time may use it."""

    def __init__(self, epoll: select.epoll, most: int) -> None:
        self._epoll = epoll
        self._descriptor = epoll.fileno()
        self._most = most
        self._events = ctypes.create_string_buffer(most * _EVENT.size)
        self._words = memoryview(self._events).cast("B").cast("i")

    def poll(self) -> list[int]:
        """The descriptors that are readable now, at most `most`; as `select.epoll.poll(0)`."""
        count = _epoll_wait(self._descriptor, self._events, self._most, 0)
        if count < 0:
            raise _error()
        return self._words[_DESCRIPTOR_AT : count * _WORDS : _WORDS].tolist()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
