"""The lock between processes: it excludes, and outlives whoever holds it."""

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Callable

import pytest

from cpanbridge.supervisor.memory.robustlock import SharedLock


class Memory:
    """Shared with children; beside the lock there is a number."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._bytes = (ctypes.c_char * mmap.PAGESIZE).from_buffer(self._map)
        self.number = ctypes.c_int64.from_buffer(self._map, 1024)
        address = ctypes.addressof(self._bytes)
        SharedLock.create(address)
        self.lock = SharedLock(address)

    def try_to_take(self) -> bool:
        return self.lock.acquire(block=False)


def in_child(work: Callable[[], object]) -> int:
    """What `work` returns in another process, as a small number; minus a signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = int(work())  # type: ignore[call-overload]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_one_process_keeps_another_out() -> None:
    memory = Memory()
    with memory.lock:
        assert in_child(memory.try_to_take) == 0
    assert in_child(memory.try_to_take) == 1


def test_one_thread_keeps_another_out() -> None:
    memory = Memory()
    taken = []
    with memory.lock:
        thread = threading.Thread(target=lambda: taken.append(memory.lock.acquire(block=False)))
        thread.start()
        thread.join()
    assert taken == [False]


def test_nothing_is_lost_that_many_processes_and_threads_count() -> None:
    memory = Memory()
    rounds = 2000

    def count() -> None:
        for _ in range(rounds):
            with memory.lock:
                memory.number.value += 1

    def count_in_threads() -> int:
        threads = [threading.Thread(target=count) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = count_in_threads()
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert memory.number.value == 4 * 3 * rounds


def test_the_next_one_gets_it_when_its_holder_is_killed() -> None:
    memory = Memory()

    def die_inside() -> None:
        with memory.lock:
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(3):
        assert in_child(die_inside) == -signal.SIGKILL
        with memory.lock:
            assert in_child(memory.try_to_take) == 0
        # And again, without waiting: as the master takes it.
        assert in_child(die_inside) == -signal.SIGKILL
        assert memory.lock.acquire(block=False)
        memory.lock.release()


def test_one_that_waits_gets_it_when_its_holder_is_killed() -> None:
    memory = Memory()
    inside, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with memory.lock:
            os.write(inside[1], b"+")
            os.read(go_on[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.read(inside[0], 1)
    got = threading.Event()

    def wait() -> None:
        with memory.lock:
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.is_set()
    os.write(go_on[1], b"+")
    os.waitpid(pid, 0)
    thread.join()
    assert got.is_set()


def test_a_child_of_a_process_that_is_inside_has_nothing_of_it() -> None:
    memory = Memory()
    with memory.lock:
        assert in_child(memory.try_to_take) == 0
    assert in_child(memory.try_to_take) == 1


def test_its_holder_may_take_it_again() -> None:
    memory = Memory()
    with memory.lock:
        with memory.lock:
            pass
        assert in_child(memory.try_to_take) == 0  # it is held until the outer end
    assert in_child(memory.try_to_take) == 1


def test_a_wait_ends_when_its_time_is_over() -> None:
    memory = Memory()
    with memory.lock:
        assert in_child(lambda: memory.lock.acquire(timeout=0.05)) == 0
    assert in_child(lambda: memory.lock.acquire(timeout=0.05)) == 1


def test_who_does_not_have_it_cannot_give_it_back() -> None:
    memory = Memory()
    with pytest.raises(OSError, match="not permitted"):
        memory.lock.release()


def test_the_lock_tells_which_thread_has_it() -> None:
    memory = Memory()
    assert memory.lock.holder() == 0
    with memory.lock, memory.lock:
        assert memory.lock.holder() == threading.get_native_id()
        assert in_child(lambda: memory.lock.holder() == os.getppid()) == 1
    assert memory.lock.holder() == 0
