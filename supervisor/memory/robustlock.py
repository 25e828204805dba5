"""A lock in shared memory that the kernel frees when its holder dies, at whatever instruction.

It is a robust mutex of the C library (pthread_mutexattr_setrobust(3)), one between processes and
between threads alike. Taking and releasing it are a few instructions each, without a system call
as long as nobody else holds it. When its holder dies, the kernel marks it, and whoever takes it
next is told: that is no error here, for what the lock guards is whole at every instruction.

It has the methods of a `multiprocessing` lock, so `multiprocessing.sharedctypes.synchronized` takes
it for its own. Like theirs it is recursive: `with value.get_lock(): value.value += 1` is right.

No call here gives up the interpreter lock, and so none may block: a thread that did would have to
wait for a busy module of its own process to hand it back, and everybody else with it. A thread that
finds the lock taken tries again. (The interpreter itself may still change threads between two
instructions, if the system has not run this process for longer than the switch interval. What is
guarded takes a few microseconds, so that is rare; a worker that hangs with the lock is killed, see
processes/watchdog.py.)

Workers and master take it by `run`, and what they run under it is a closed set of functions over
plain numbers. They create no container and raise nothing, and the garbage collector is off: it
would run modules' finalizers, which take any time, and while everybody waits.
"""

import ctypes
import errno
import gc
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

SIZE = 64  # bytes; a pthread_mutex_t is at most 48 on the systems that there are

# The lock is held for a few microseconds, and to be put to sleep and woken takes longer. So a
# thread that finds it taken tries so many times at once, then as often after giving its turn to
# others, and sleeps after that, longer each time.
TRIES = 20
FIRST_SLEEP = 0.0001
LONGEST_SLEEP = 0.005

_PROCESS_SHARED = _ROBUST = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_RECURSIVE = 1  # PTHREAD_MUTEX_RECURSIVE

_FUTEX_TID_MASK = 0x3FFFFFFF  # see get_robust_list(2)

_libc = ctypes.PyDLL(None)  # not CDLL: that one gives up the interpreter lock around each call
_collects, _stop_collecting, _collect = gc.isenabled, gc.disable, gc.enable
_trylock = _libc.pthread_mutex_trylock
_unlock = _libc.pthread_mutex_unlock


class SharedLock:
    """`with` it, no other thread of any process that has this memory is inside."""

    def __init__(self, address: int) -> None:
        """`address` is where the lock stands in this process: `SIZE` bytes, made by `create`."""
        self._futex = ctypes.c_uint32.from_address(address + _FUTEX_AT)
        self._mutex = ctypes.byref((ctypes.c_char * SIZE).from_address(address))
        self._turn = threading.Lock()

    @staticmethod
    def create(address: int) -> None:
        """Make a lock in memory that is not used yet.

        Raises OSError where the C library has no robust mutexes.
        """
        attributes = ctypes.byref((ctypes.c_char * SIZE)())
        mutex = ctypes.byref((ctypes.c_char * SIZE).from_address(address))
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
        _check(_libc.pthread_mutexattr_settype(attributes, _RECURSIVE))
        _check(_libc.pthread_mutex_init(mutex, attributes))
        _check(_libc.pthread_mutexattr_destroy(attributes))

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take the lock; False when it is not to be had, at once or in `timeout` seconds."""
        error = _trylock(self._mutex)
        if error == 0 or self._recovered_from_dead_holder(error):
            return True
        return block and self._try_until(timeout)

    def run(self, function: Callable[..., int], *arguments: object) -> int:
        """Run a function of the closed set under the lock, and return the number that it returns.

        Whatever instruction an exception comes at that another thread or a signal handler sends:
        the lock is free when this has returned or raised. (To unlock a mutex that this thread does
        not hold is an error without a consequence.)
        """
        # The collector is turned off for the whole process, so by one of its threads at a time.
        with self._turn:
            collects = _collects()
            try:
                _stop_collecting()
                error = _trylock(self._mutex)
                if error != 0 and not self._recovered_from_dead_holder(error):
                    self._try_until(None)
                return function(*arguments)
            finally:
                try:
                    _unlock(self._mutex)
                finally:
                    if collects:
                        _collect()

    def try_run(self, function: Callable[..., int], *arguments: object) -> int | None:
        """As `run`; None, and nothing is run, when the lock is not to be had at once."""
        try:
            return self.run(function, *arguments) if self.acquire(block=False) else None
        finally:
            _unlock(self._mutex)

    def release(self) -> None:
        """Give the lock back. Called by the thread that has taken it."""
        _check(_unlock(self._mutex))

    def _recovered_from_dead_holder(self, error: int) -> bool:
        """Whether the lock was taken from a holder that has died, as `error` of trylock says."""
        if error == errno.EBUSY:
            return False
        if error != errno.EOWNERDEAD:
            raise OSError(error, os.strerror(error))
        _check(_libc.pthread_mutex_consistent(self._mutex))
        return True

    def _try_until(self, timeout: float | None) -> bool:
        for _ in range(TRIES):
            if self.acquire(block=False):
                return True
        for _ in range(TRIES):
            os.sched_yield()
            if self.acquire(block=False):
                return True
        pause = FIRST_SLEEP
        until = time.monotonic() + timeout if timeout is not None else None
        while not self.acquire(block=False):
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(pause)
            pause = min(LONGEST_SLEEP, 2 * pause)
        return True

    def __enter__(self) -> None:
        error = _trylock(self._mutex)
        if error != 0 and not self._recovered_from_dead_holder(error):
            self._try_until(None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _unlock(self._mutex) != 0:
            self.release()  # raises what is wrong

    def holder(self) -> int:
        """The thread that has the lock, as gettid(2) tells it; 0: none. A glance, without it."""
        return self._futex.value & _FUTEX_TID_MASK


def _check(error: int) -> None:
    if error != 0:
        raise OSError(error, os.strerror(error))


def _find_futex() -> int:
    """Where in a robust mutex its holder's thread id stands, in bytes.

    The kernel must find it to free the mutex, so it is there; C libraries differ in where.
    """
    memory = (ctypes.c_uint32 * (SIZE // 4))()
    address = ctypes.addressof(memory)
    SharedLock.create(address)
    mutex = ctypes.byref(memory)
    _check(_trylock(mutex))
    try:
        thread = threading.get_native_id()
        return 4 * [word & _FUTEX_TID_MASK for word in memory].index(thread)
    finally:
        _check(_unlock(mutex))


_FUTEX_AT = _find_futex()
