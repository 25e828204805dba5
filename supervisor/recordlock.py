"""A lock between processes that the kernel frees when its holder dies, at whatever instruction."""

import ctypes
import errno
import fcntl
import os


class _Flock(ctypes.Structure):
    """struct flock of fcntl(2)."""

    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_long),
        ("l_len", ctypes.c_long),
        ("l_pid", ctypes.c_int),
    )


class RecordLock:
    """The first byte of a file, locked by fcntl(2) without giving up the interpreter lock.

    `fcntl.lockf` gives it up around each call. Neither call here ever blocks (F_SETLK).
    """

    _fcntl = ctypes.PyDLL(None, use_errno=True).fcntl

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._locked = ctypes.byref(_Flock(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        self._unlocked = ctypes.byref(_Flock(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0))

    def take(self) -> bool:
        """Whether it is ours now; False when another process holds it."""
        if self._fcntl(self._descriptor, fcntl.F_SETLK, self._locked) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EAGAIN, errno.EACCES, errno.EINTR):
            return False
        raise OSError(number, os.strerror(number))

    def give_back(self) -> None:
        """Let the next one have it."""
        if self._fcntl(self._descriptor, fcntl.F_SETLK, self._unlocked) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
