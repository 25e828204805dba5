"""The table of owners: rows are found, taken out, and whole whatever process is killed when."""

import mmap
from collections.abc import Callable
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st
from killing import kill_at

from cpanbridge.supervisor.owners import Client, Owner, OwnerTable, size_for

ONE, TWO = Owner(3, 7), Owner(0, 1)
STEPS = st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 3), st.sampled_from([ONE, TWO]))


def table(rows: int = 8) -> OwnerTable:
    return OwnerTable(memoryview(mmap.mmap(-1, size_for(rows))), rows)


def test_a_row_is_found_until_it_is_taken_out() -> None:
    here = table()
    client = Client(4711, 99)
    assert here.find(client, 5) is None
    assert here.insert(client, 5, ONE)
    assert here.insert(client, 6, TWO)
    assert (here.find(client, 5), here.find(client, 6)) == (ONE, TWO)
    here.remove(client, ONE)
    assert (here.find(client, 5), here.find(client, 6)) == (None, TWO)


def test_a_process_that_has_the_pid_of_another_is_another() -> None:
    here = table()
    assert here.insert(Client(4711, 99), 0, ONE)
    assert here.find(Client(4711, 100), 0) is None


def test_it_holds_so_many_rows_and_no_more() -> None:
    here = table(3)
    assert [here.insert(Client(n, n), 0, ONE) for n in range(5)] == [True] * 3 + [False] * 2
    here.remove(Client(1, 1), ONE)
    assert here.insert(Client(9, 9), 0, ONE)
    assert not here.insert(Client(8, 8), 0, ONE)


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
    steps: list[tuple[bool, int, int, Owner]],
) -> None:
    here = table(30)
    model: dict[tuple[Client, int], Owner] = {}
    for add, number, module, owner in steps:
        client = Client(number, number % 3)
        if not add:
            here.remove(client, owner)
            model = {k: o for k, o in model.items() if k[0] != client or o != owner}
        elif (client, module) not in model and here.insert(client, module, owner):
            model[client, module] = owner
        assert len(model) <= 30
        for (each, number_of_module), found in model.items():
            assert here.find(each, number_of_module) == found
        assert sorted(here.all()) == sorted((k[0], o) for k, o in model.items())
    for client in {each for each, _ in model}:
        for owner in (ONE, TWO):
            here.remove(client, owner)
    assert not any(bytes(here._states))  # no search is longer for what once was there


def killed_everywhere(work: Callable[[OwnerTable], None]) -> int:
    """Kill a process before each thing that `work` does; after each, the rows must be whole."""
    step, killed = 0, True
    stay = [(Client(n, n), n, TWO) for n in range(6)]
    while killed:
        here = table(8)
        for row in stay:
            assert here.insert(*row)
        killed = kill_at(step, partial(work, here))
        for client, module, owner in stay:
            assert here.find(client, module) == owner
        assert here.find(Client(77, 1), 5) in (None, ONE)
        here.remove(Client(77, 1), ONE)
        assert here.insert(Client(77, 1), 5, ONE)
        assert here.find(Client(77, 1), 5) == ONE
        step += 1
    return step


def test_a_process_killed_anywhere_leaves_whole_rows() -> None:
    def come_and_go(here: OwnerTable) -> None:
        here.insert(Client(77, 1), 5, ONE)
        here.remove(Client(77, 1), ONE)

    assert killed_everywhere(come_and_go) > 15
