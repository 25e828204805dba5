"""A lock in shared memory that the kernel frees when its holder dies, at whatever instruction.

It is a robust mutex of the C library (pthread_mutexattr_setrobust(3)), one between processes and
between threads alike. Taking and giving it back are a few instructions each, without a system call
as long as nobody else holds it. When its holder dies, the kernel marks it, and whoever takes it
next is told so: that is no error here, for what the lock guards is whole at every instruction.

No call gives up the interpreter lock, and so none may block: a thread that did would have to wait
for a busy module of its own process to hand it back, and everybody else with it. Who finds the lock
taken tries again. (The interpreter itself may still change threads between two instructions, if
the system has kept this process from running for longer than the switch interval in between. What
is guarded is a few microseconds long, so that is rare; a worker that hangs with the lock is killed,
see hangs.py.)
"""

import ctypes
import errno
import os
import time
from types import TracebackType

SIZE = 64  # bytes; a pthread_mutex_t is at most 48 on the systems that there are

# It is held for a few microseconds, and it takes longer to be put to sleep and woken. So who finds
# it taken tries so many times at once, then as often with its turn given to others between, and
# sleeps after that, for longer each time.
TRIES = 20
FIRST_SLEEP = 0.0001
LONGEST_SLEEP = 0.005

_PROCESS_SHARED = _ROBUST = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST

_libc = ctypes.PyDLL(None)  # not CDLL: that one gives up the interpreter lock around each call
_trylock = _libc.pthread_mutex_trylock
_unlock = _libc.pthread_mutex_unlock


class SharedLock:
    """`with` it, no other thread of any process that has this memory is inside."""

    def __init__(self, address: int) -> None:
        """`address` is where the lock stands in this process: `SIZE` bytes, made by `create`."""
        self._mutex = ctypes.byref((ctypes.c_char * SIZE).from_address(address))

    @staticmethod
    def create(address: int) -> None:
        """Make a lock in memory that nobody uses yet. Raises OSError where there is no such."""
        attributes = ctypes.byref((ctypes.c_char * SIZE)())
        mutex = ctypes.byref((ctypes.c_char * SIZE).from_address(address))
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
        _check(_libc.pthread_mutex_init(mutex, attributes))
        _check(_libc.pthread_mutexattr_destroy(attributes))

    def take(self) -> bool:
        """Whether it is ours now; False when somebody else holds it."""
        error = _trylock(self._mutex)
        return error == 0 or self._is_ours_all_the_same(error)

    def _is_ours_all_the_same(self, error: int) -> bool:
        """Whether its last holder has died, of what `_trylock` has said."""
        if error == errno.EBUSY:
            return False
        if error != errno.EOWNERDEAD:
            raise OSError(error, os.strerror(error))
        _check(_libc.pthread_mutex_consistent(self._mutex))
        return True

    def give_back(self) -> None:
        """Let the next one have it. Called by the thread that has taken it."""
        error = _unlock(self._mutex)
        if error != 0:
            raise OSError(error, os.strerror(error))

    def __enter__(self) -> None:
        error = _trylock(self._mutex)
        if error != 0 and not self._is_ours_all_the_same(error):
            self._take_patiently()

    def _take_patiently(self) -> None:
        for _ in range(TRIES):
            if self.take():
                return
        for _ in range(TRIES):
            os.sched_yield()
            if self.take():
                return
        pause = FIRST_SLEEP
        while not self.take():
            time.sleep(pause)
            pause = min(LONGEST_SLEEP, 2 * pause)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _unlock(self._mutex) != 0:
            self.give_back()  # says why it cannot be


def _check(error: int) -> None:
    if error != 0:
        raise OSError(error, os.strerror(error))
