"""Under the gate's lock are numbers alone, nothing that takes long, and it ends in any case."""

import dis
import gc
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import ADMITTED, WAITS_FOR_REQUEST
from cpanbridge.supervisor.memory.handoff_claims import ClaimIssuer
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import ClientProcess
from cpanbridge.supervisor.memory.robustlock import SharedLock
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.modules.registry import FOR_CLIENT
from cpanbridge.workers.sessions.ownership import Ownership

# Instructions that create a container, an iterator or a generator, raise, or import.
_FORBIDDEN = re.compile(
    "BUILD_|LIST_|SET_|DICT_|MAP_|MAKE_|RETURN_GENERATOR|YIELD|RAISE|IMPORT|FORMAT|GET_ITER"
    "|CALL_FUNCTION_EX|CALL_KW|BINARY_SLICE|STORE_SLICE|BEFORE_WITH|UNPACK_EX|LOAD_CLOSURE"
)
# Of the functions in C, those that neither wait nor give up the interpreter lock.
_ALLOWED = {"monotonic_ns", "count", "bytes"}


def do_everything() -> None:
    """Everything that takes the lock, once with each outcome."""
    limits = Limits(max_connections=2, max_concurrent_requests=2, max_requests_per_minute=5)
    shared = Shared.create(3, limits)
    wakeups = [Wakeups.create() for _ in shared.slots]
    gates = [Gate(shared, slot, wakeups, threads=2) for slot in range(3)]
    for slot in shared.slots:
        slot.serves = 1

    def requests() -> None:
        first, second, third = gates
        assert first.take_connection(wait=True)
        assert first.take_connection()
        assert not second.take_connection(wait=True)
        second.stop_waiting_for_connection()
        third.take_handed_off()
        for gate in (first, first, third):
            gate.release_connection()
        assert (first.admit(), second.admit()) == (ADMITTED, ADMITTED)
        assert third.admit() == WAITS_FOR_REQUEST
        tickets = [gate.enqueue(WAITS_FOR_REQUEST) for gate in (third, second, second)]
        first.release_request(True)
        assert second.look(tickets[1])  # it is the third worker's turn
        assert third.admit(tickets[0]) == ADMITTED
        assert second.admit(tickets[1], tickets[2])
        second.dequeue(tickets[2])
        second.dequeue(0)
        second.release_request(False)
        third.release_request(True)

    def state() -> None:
        here, there = Ownership(shared, 0), Ownership(shared, 1)
        client = ClientProcess(4711, 99)
        for owned_as in (FOR_CLIENT, 17):
            owner = here.find(client, owned_as, may_move=owned_as == FOR_CLIENT).owner
            assert (here if owner == here.me else there).take(client, owned_as)
            assert there.find(client, owned_as, may_move=False).known
        for ownership in (here, there):
            ownership.forget(client)
        claims = shared.claims[0]
        issuer = ClaimIssuer(claims)
        for decide in (claims.take, claims.refuse, claims.withdraw):
            claim = issuer.issue()
            assert claim is not None
            assert shared.lock.run(decide, claim)
        assert shared.names.number_of("a.new_one")

    def master() -> None:
        shared.clear(shared.slots[2])  # the next decision counts anew
        shared.lock.run(shared.request_cleanup)
        for limit in (7, 0, 5):
            assert gates[0].admit() == ADMITTED
            assert shared.rings.try_to_resize(limit)
            gates[0].release_request(True)

    requests()
    state()
    master()
    for descriptor in (shared.fd, *(each for one in wakeups for each in one)):
        os.close(descriptor)


def test_nothing_is_created_raised_or_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    functions: set[CodeType] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        functions.add(frame.f_code)
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if event == "opcode" and _FORBIDDEN.match(name):
            found.add(f"{frame.f_code.co_qualname}, line {frame.f_lineno}: {name}")
        return trace

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ not in {*_ALLOWED, "settrace", "setprofile"}:
            found.add(f"{frame.f_code.co_qualname}, line {frame.f_lineno}: {called.__name__}()")

    def watched(function: Callable[..., int], *arguments: object) -> int:
        sys.setprofile(profile)
        sys.settrace(trace)
        try:
            return function(*arguments)
        finally:
            sys.settrace(None)
            sys.setprofile(None)

    run = SharedLock.run
    monkeypatch.setattr(SharedLock, "run", lambda self, *each: run(self, watched, *each))
    do_everything()
    assert found == set()
    assert len(functions) > 25  # it did look at them


def test_no_object_is_created_that_the_collector_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So none of modules' finalizers can run under the lock."""

    class Counted:
        """One of these brings the collector to its threshold."""

    inside = False
    found: list[FrameType | None] = []

    def note(phase: str, _: object) -> None:
        if inside and phase == "start":
            found.append(sys._getframe(1))

    def watched(function: Callable[..., int], *arguments: object) -> int:
        nonlocal inside
        assert not gc.isenabled()  # besides, it is off
        gc.collect()
        one = Counted()
        gc.set_threshold(1)
        gc.enable()
        inside = True
        try:
            return function(*arguments)
        finally:
            inside = False
            gc.disable()
            gc.set_threshold(*thresholds)
            del one

    thresholds = gc.get_threshold()
    run = SharedLock.run
    monkeypatch.setattr(SharedLock, "run", lambda self, *each: run(self, watched, *each))
    gc.collect()
    gc.freeze()
    gc.callbacks.append(note)
    try:
        do_everything()
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    assert [frame and frame.f_code.co_qualname for frame in found] == []
    assert gc.isenabled()


class Interrupt(BaseException):
    """Sent by another thread, as PyThreadState_SetAsyncExc does."""


def is_interrupted(work: Callable[[], object], step: int) -> bool:
    """Do the work, and raise at the n-th place where an exception may come; whether it came.

    The interpreter looks for one after each call, where a function begins, and in loops.
    """
    places = iter(range(step, -1, -1))
    may_come = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal may_come
        frame.f_trace_opcodes = True
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if (may_come or name in ("RESUME", "JUMP_BACKWARD")) and next(places) == 0:
                raise Interrupt
            may_come = name.startswith("CALL")
        return trace

    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def is_free(lock: SharedLock) -> bool:
    """Whether this thread can have a lock."""
    taken = lock.acquire(block=False)
    if taken:
        lock.release()
    return taken


def test_an_exception_from_outside_keeps_no_lock_wherever_it_comes() -> None:
    shared = Shared.create(1, Limits())
    wakeups = [Wakeups.create()]
    gate = Gate(shared, 0, wakeups)
    step = 0
    while is_interrupted(gate.admit, step):
        with ThreadPoolExecutor(1) as other:
            assert other.submit(is_free, shared.lock).result(), f"kept after {step} places"
        assert gc.isenabled()
        step += 1
    assert step > 10
    for descriptor in (shared.fd, *wakeups[0]):
        os.close(descriptor)


def test_finalizers_of_modules_keep_nobody_waiting_at_the_gate() -> None:
    """Objects in cycles, whose finalizers take a while, are thrown away at every call."""
    shared = Shared.create(2, Limits(max_requests_per_minute=0))
    wakeups = [Wakeups.create() for _ in shared.slots]
    gate = Gate(shared, 0, wakeups)
    held: list[bool] = []

    class Slow:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            with ThreadPoolExecutor(1) as other:
                held.append(not other.submit(is_free, shared.lock).result())

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        until = time.monotonic() + 20
        while len(held) < 20 and time.monotonic() < until:
            Slow()
            assert gate.admit() == ADMITTED
            gate.release_request(True)
    finally:
        gc.set_threshold(*thresholds)
    assert len(held) >= 20
    assert not any(held)
    for descriptor in (shared.fd, *(each for one in wakeups for each in one)):
        os.close(descriptor)
