"""The table of owners: rows are found, taken out, and whole whatever process is killed when."""

import mmap
from collections.abc import Callable
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st
from killing import kill_at

from cpanbridge.supervisor.memory.owners import (
    NOBODY,
    ClientProcess,
    Owner,
    OwnerTable,
    size_for,
)

ONE, TWO = Owner(3, 7).number, Owner(0, 1).number
STEPS = st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 3), st.sampled_from([ONE, TWO]))


def table(rows: int = 8) -> OwnerTable:
    return OwnerTable(memoryview(mmap.mmap(-1, size_for(rows))), rows)


def test_a_row_is_found_until_it_is_taken_out() -> None:
    here = table()
    process = ClientProcess(4711, 99)
    assert here.find(process, 5) == NOBODY
    assert here.insert(process, 5, ONE)
    assert here.insert(process, 6, TWO)
    assert (here.find(process, 5), here.find(process, 6)) == (ONE, TWO)
    here.remove(process, ONE)
    assert (here.find(process, 5), here.find(process, 6)) == (NOBODY, TWO)


def test_a_process_that_has_the_pid_of_another_is_another() -> None:
    here = table()
    assert here.insert(ClientProcess(4711, 99), 0, ONE)
    assert here.find(ClientProcess(4711, 100), 0) == NOBODY
    assert here.find(ClientProcess(4711, 99, uid=1), 0) == NOBODY


def test_it_holds_so_many_rows_and_no_more() -> None:
    here = table(3)
    assert [here.insert(ClientProcess(n, n), 0, ONE) for n in range(5)] == [True] * 3 + [False] * 2
    here.remove(ClientProcess(1, 1), ONE)
    assert here.insert(ClientProcess(9, 9), 0, ONE)
    assert not here.insert(ClientProcess(8, 8), 0, ONE)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 40), st.integers(0, 3), st.sampled_from([ONE, TWO])
        ),
        max_size=200,
    )
)
def test_it_is_a_dictionary_whatever_comes_and_goes(
    steps: list[tuple[bool, int, int, int]],
) -> None:
    here = table(30)
    model: dict[tuple[ClientProcess, int], int] = {}
    for add, number, module, owner in steps:
        process = ClientProcess(number, number % 3)
        if not add:
            here.remove(process, owner)
            model = {k: o for k, o in model.items() if k[0] != process or o != owner}
        elif (process, module) not in model and here.insert(process, module, owner):
            model[process, module] = owner
        assert len(model) <= 30
        for (each, number_of_module), found in model.items():
            assert here.find(each, number_of_module) == found
        assert sorted(here.all()) == sorted((k[0], Owner.of(o)) for k, o in model.items())
    for process in {each for each, _ in model}:
        for owner in (ONE, TWO):
            here.remove(process, owner)
    assert not any(bytes(here._states))  # no search is longer for what once was there


def killed_everywhere(work: Callable[[OwnerTable], None]) -> int:
    """Kill a process before each thing that `work` does; after each, the rows must be whole."""
    step, killed = 0, True
    stay = [(ClientProcess(n, n), n, TWO) for n in range(6)]
    while killed:
        here = table(8)
        for row in stay:
            assert here.insert(*row)
        killed = kill_at(step, partial(work, here))
        for process, module, owner in stay:
            assert here.find(process, module) == owner
        assert here.find(ClientProcess(77, 1), 5) in (NOBODY, ONE)
        here.remove(ClientProcess(77, 1), ONE)
        assert here.insert(ClientProcess(77, 1), 5, ONE)
        assert here.find(ClientProcess(77, 1), 5) == ONE
        step += 1
    return step


def test_a_process_killed_anywhere_leaves_whole_rows() -> None:
    def come_and_go(here: OwnerTable) -> None:
        here.insert(ClientProcess(77, 1), 5, ONE)
        here.remove(ClientProcess(77, 1), ONE)

    assert killed_everywhere(come_and_go) > 15
