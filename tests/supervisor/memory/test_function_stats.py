"""How often each function was called: a name has one number in all processes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from killing import trace_opcodes

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory import function_stats as tally_module
from cpanbridge.supervisor.memory.function_stats import (
    FUNCTIONS,
    OTHERS,
    SIZE,
    Count,
    FunctionStats,
    counts,
)
from cpanbridge.supervisor.memory.layout import Shared


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared.create(2, Limits())
    yield shared
    os.close(shared.fd)


def number_of(shared: Shared, name: str) -> int:
    with shared.lock:
        return shared.names.number_of(name)


def new_tally() -> FunctionStats:
    return FunctionStats(memoryview(bytearray(SIZE)).cast("q"))


def test_a_function_keeps_its_number(shared: Shared) -> None:
    first, second = number_of(shared, "m.first"), number_of(shared, "m.second")
    assert first != second
    assert 0 not in (first, second)
    assert number_of(shared, "m.first") == first
    names = shared.names.all()
    assert (names[0], names[first], names[second]) == (OTHERS, "m.first", "m.second")


def test_numbers_are_the_same_in_all_processes(shared: Shared) -> None:
    number_of(shared, "m.before")
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                for each in range(50):  # some are called in all of them, and some in one alone
                    name = f"shared.f{each}" if each % 2 else f"m{child}.f{each}"
                    number = number_of(shared, name)
                    if number != number_of(shared, name) or shared.names.all()[number] != name:
                        os._exit(2)
                os._exit(0)
            os._exit(1)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert statuses == [0] * 4
    expected = {OTHERS, "m.before"}
    expected |= {f"shared.f{n}" for n in range(1, 50, 2)}
    expected |= {f"m{child}.f{n}" for child in range(4) for n in range(0, 50, 2)}
    names = list(shared.names.all())
    assert len(names) == len(expected)  # none stands there twice
    assert set(names) == expected
    other = Shared.attach(os.dup(shared.fd))  # a process that knows nothing yet
    assert list(other.names.all()) == names
    assert number_of(other, "shared.f1") == names.index("shared.f1")
    os.close(other.fd)


def test_the_longest_name_fits(shared: Shared) -> None:
    longest = f"{'m' * 50}.{'f' * 100}"
    number = number_of(shared, longest)
    number_of(shared, "m.next")
    other = Shared.attach(os.dup(shared.fd))
    assert other.names.all()[number] == longest
    assert other.names.all()[number + 1] == "m.next"
    os.close(other.fd)


def test_functions_beyond_the_tables_end_are_counted_together(shared: Shared) -> None:
    numbers = [number_of(shared, f"m.f{n}") for n in range(FUNCTIONS - 1)]
    assert numbers == list(range(1, FUNCTIONS))
    assert number_of(shared, "late.one") == number_of(shared, "late.two") == 0
    assert number_of(shared, "m.f7") == numbers[7]
    function_stats = shared.statistics[0].function_stats
    for name in ("m.f0", f"m.f{FUNCTIONS - 2}", "late.one", "late.two"):
        function_stats.add(number_of(shared, name), True, 1, 1)
    assert counts(shared.names.all(), [function_stats]) == [
        Count(OTHERS, 2, 0, 2),
        Count("m.f0", 1, 0, 1),
        Count(f"m.f{FUNCTIONS - 2}", 1, 0, 1),
    ]


def test_a_process_that_is_killed_before_a_name_is_counted_leaves_the_number_free(
    shared: Shared,
) -> None:
    pid = os.fork()
    if pid == 0:

        class Dying:
            functions = 0

            def __setattr__(self, name: str, value: int) -> None:
                os._exit(0)

        shared.names._header = Dying()
        number_of(shared, "killed.halfway_through")
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(shared.names.all()) == [OTHERS]
    number = number_of(shared, "short.name")
    assert number_of(shared, "another.one") == number + 1
    assert list(shared.names.all()) == [OTHERS, "short.name", "another.one"]


def test_threads_that_look_at_the_same_time_number_no_function_twice(shared: Shared) -> None:
    """At each step of one thread's look another thread of the process looks as well."""
    elsewhere = Shared.attach(os.dup(shared.fd))
    looks = 0

    def look_again(frame: FrameType, event: str, _: object) -> Any:
        nonlocal looks
        if frame.f_code.co_filename != tally_module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            looks += 1
            if looks == step:
                reader = threading.Thread(target=shared.names.all)
                reader.start()
                reader.join()
        return look_again

    step, added = 0, [OTHERS]
    tracer = sys.gettrace()
    while looks >= step:
        step, looks = step + 1, 0
        added.append(f"m.f{step}")
        number_of(elsewhere, added[-1])
        trace_opcodes(look_again)
        try:
            shared.names.all()
        finally:
            sys.settrace(tracer)
        assert list(shared.names.all()) == added
        assert number_of(shared, added[-1]) == len(added) - 1
    assert step > 10
    os.close(elsewhere.fd)


# -- counts --


def test_counts_are_added_over_all_workers() -> None:
    first, second = new_tally(), new_tally()
    names = [OTHERS, "m.quick", "m.never", "m.slow"]
    first.add(1, True, 10, 1)
    first.add(1, False, 20, 2)
    second.add(1, True, 30, 3)
    second.add(3, False, 500, 4)
    assert first.read(1) == (2, 1, 30)
    assert second.read(2) == (0, 0, 0)
    assert counts(names, [first, second]) == [
        Count("m.quick", 3, 1, 60),
        Count("m.slow", 1, 1, 500),
    ]
    assert counts(names, [second, first]) == counts(names, [first, second])
    assert counts([OTHERS], [new_tally()]) == []


def test_a_replacement_goes_on_counting_in_its_slot() -> None:
    memory = memoryview(bytearray(SIZE)).cast("q")
    FunctionStats(memory).add(1, True, 10, 1)
    FunctionStats(memory).add(1, True, 10, 2)
    assert FunctionStats(memory).read(1) == (2, 0, 20)


def test_the_latest_functions_are_told_the_newest_first() -> None:
    function_stats = new_tally()
    names = [OTHERS, "m.a", "m.b", "m.c", "m.d"]
    for at, number in enumerate([1, 2, 3, 1, 2], 100):
        function_stats.add(number, True, 1, at)
    assert function_stats.latest(names, 0, 5) == ["m.b", "m.a", "m.c"]
    assert function_stats.latest(names, 0, 2) == ["m.b", "m.a"]


def test_the_latest_functions_are_those_of_the_worker_that_is_there_now() -> None:
    function_stats = new_tally()
    names = [OTHERS, "m.before", "m.since"]
    function_stats.add(1, True, 1, 100)
    function_stats.add(2, True, 1, 200)
    assert function_stats.latest(names, 150, 5) == ["m.since"]
    assert function_stats.latest(names, 200, 5) == []


def test_a_name_that_is_counted_before_it_is_seen_is_not_there_yet(shared: Shared) -> None:
    """As on a machine that reorders stores."""
    number_of(shared, "m.first")
    number_of(shared, "m.second")
    at = 2 * tally_module._NAME_SIZE
    entry = bytes(shared.names._memory[at : at + 20])
    for missing in (slice(0, 20), slice(0, 8), slice(8, 20), slice(9, 10)):
        other = Shared.attach(os.dup(shared.fd))
        shared.names._memory[at : at + 20][missing] = bytes(len(entry[missing]))
        assert other.names.all() == (OTHERS, "m.first")
        shared.names._memory[at : at + 20] = entry
        assert other.names.all() == (OTHERS, "m.first", "m.second")
        os.close(other.fd)
