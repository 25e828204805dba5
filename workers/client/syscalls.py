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
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_EPOLL_CTL_ADD, _EPOLL_CTL_DEL, _EPOLL_CTL_MOD = 1, 2, 3
_READABLE_ONCE = select.EPOLLIN | select.EPOLLONESHOT

# struct epoll_event of epoll_wait(2): the events, and 64 bits of data, in which `select.epoll`
# stores the descriptor. There is no padding between them on x86-64 (EPOLL_PACKED).
_IS_PACKED = platform.machine() == "x86_64"
_EVENT = struct.Struct("@Iixxxx" if _IS_PACKED else "@Ixxxxixxxx")
_WORDS = _EVENT.size // 4
_DESCRIPTOR_AT = 1 if _IS_PACKED else 2
_POLLFD = struct.Struct("@ihh")  # of poll(2): descriptor, events, returned events

# Not CDLL, which releases the interpreter lock around each call.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.recv.restype = _libc.send.restype = ctypes.c_ssize_t
# Those of each request, looked up once.
_recv, _send, _epoll_ctl, _epoll_wait = _libc.recv, _libc.send, _libc.epoll_ctl, _libc.epoll_wait


def accept(listener: int) -> int:
    """Accept a client from a non-blocking listener; its descriptor, which is closed on exec."""
    return _checked(_libc.accept4(listener, None, None, socket.SOCK_CLOEXEC))


class Receiver:
    """Receives into a buffer of its own, so one thread at a time may use it."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(MOST)
        self._view = memoryview(self._memory).cast("B")
        self._address = ctypes.c_void_p(ctypes.addressof(self._memory))

    def receive(self, descriptor: int) -> bytes:
        """The bytes that have arrived, up to `MOST`; none at the end of file."""
        length = _recv(descriptor, self._address, _MOST, socket.MSG_DONTWAIT)
        if length < 0:
            _checked(length)
        return self._view[:length].tobytes()


def send(descriptor: int, data: bytes) -> int:
    """Send what the socket has room for; returns how many bytes. `data` has at most `MOST`."""
    sent: int = _send(descriptor, data, ctypes.c_size_t(len(data)), _SEND_FLAGS)
    return sent if sent >= 0 else _checked(sent)


def shutdown(descriptor: int, how: int) -> None:
    """Shut down a socket's receiving side (SHUT_RD), sending side (SHUT_WR) or both (SHUT_RDWR)."""
    _checked(_libc.shutdown(descriptor, how))


def close(descriptor: int) -> None:
    """Close a descriptor whose closing never waits: not that of a socket with SO_LINGER."""
    _checked(_libc.close(descriptor))


def unread(descriptor: int) -> int:
    """How many bytes have arrived and were not received yet."""
    count = ctypes.c_int()
    _checked(_libc.ioctl(descriptor, FIONREAD, ctypes.byref(count)))
    return count.value


def has_hung_up(descriptor: int) -> bool:
    """Whether the other end of a socket is closed in both directions, so nobody can read a reply.

    A client that has only shut down its sending side waits for the reply.
    """
    # poll(2) counts a descriptor without any events asked for only if it has a hang-up or an error.
    # It writes the returned events into the packed bytes, which nothing else refers to.
    return bool(_libc.poll(_POLLFD.pack(descriptor, 0, 0), 1, 0) == 1)


def is_readable(descriptor: int) -> bool:
    """Whether a descriptor is readable now."""
    return bool(_libc.poll(_POLLFD.pack(descriptor, select.POLLIN, 0), 1, 0) == 1)


def watch_once(epoll: int, descriptor: int, *, again: bool) -> None:
    """Have an epoll report a descriptor when it is readable, once; `again`: it is in it already."""
    event = _EVENT.pack(_READABLE_ONCE, descriptor)
    operation = _EPOLL_CTL_MOD if again else _EPOLL_CTL_ADD
    if _epoll_ctl(epoll, operation, descriptor, event) < 0:
        _checked(-1)


def unwatch(epoll: int, descriptor: int) -> None:
    """As `select.epoll.unregister`."""
    _checked(_libc.epoll_ctl(epoll, _EPOLL_CTL_DEL, descriptor, None))


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
            _checked(count)
        return self._words[_DESCRIPTOR_AT : count * _WORDS : _WORDS].tolist()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
