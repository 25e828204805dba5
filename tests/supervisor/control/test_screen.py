"""How the tables of a screen share its rows."""

from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.control.screen import shared_out

WANTED = st.lists(st.integers(0, 100), min_size=3, max_size=3)


@given(st.integers(-10, 200), WANTED)
def test_rows_are_shared_as_evenly_as_the_wanted_numbers_allow(
    room: int, wanted: list[int]
) -> None:
    rows = shared_out(room, wanted)
    fewest = [min(2, each) for each in wanted]
    assert sum(rows) == max(sum(fewest), min(room, sum(wanted)))
    for number, least, most in zip(rows, fewest, wanted, strict=True):
        assert least <= number <= most
        assert number in (most, max(rows), max(rows) - 1)


def test_a_large_screen_shows_every_row() -> None:
    assert shared_out(100, [2, 30, 20]) == [2, 30, 20]


def test_a_small_screen_shows_some_rows_of_each_table() -> None:
    assert shared_out(10, [2, 30, 20]) == [2, 4, 4]
    assert shared_out(0, [8, 30, 0]) == [2, 2, 0]
