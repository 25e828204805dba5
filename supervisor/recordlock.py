"""A lock between processes that the kernel frees when its holder dies, at whatever instruction."""

import ctypes
import errno
import fcntl
import os
import threading
import time
from types import TracebackType

# The gate's lock is held for a few microseconds, and it takes longer to be put to sleep and woken.
# So who finds it taken tries again so many times before it sleeps, for longer each time.
TRIES = 20
FIRST_SLEEP = 0.0001
LONGEST_SLEEP = 0.005


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


class SharedLock:
    """`with` it, no other thread of any process that locks the same file is inside.

    A record lock is held per process, so a thread lock comes before it; and so a process must have
    only one of these for a file.
    """

    def __init__(self, descriptor: int) -> None:
        self._lock = RecordLock(descriptor)
        self._threads = threading.Lock()

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            if not self._lock.take():
                self._take_patiently()
        except BaseException:
            self._threads.release()
            raise

    def _take_patiently(self) -> None:
        for _ in range(TRIES):
            os.sched_yield()
            if self._lock.take():
                return
        pause = FIRST_SLEEP
        while not self._lock.take():
            time.sleep(pause)
            pause = min(LONGEST_SLEEP, 2 * pause)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.give_back()
        self._threads.release()
