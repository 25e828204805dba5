"""A client is left to the worker that is about to look for it: as a rule only, and not for long."""

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.layout import COMMAND_RETIRE, Shared, Slot
from cpanbridge.workers.accept.deference import FIRST_SECONDS, MOST_SECONDS, TIMES, Deference


class Pair:
    """A worker that is told of clients, in slot 0, and the one that had the last one."""

    def __init__(self) -> None:
        self.shared = Shared.create(3, Limits())
        self.told = Deference(self.shared, 0)
        self.last = Deference(self.shared, 1)
        self.other: Slot = self.shared.slots[1]
        for slot in self.shared.slots:
            slot.serves = 1

    def accepted(self) -> None:
        """The other worker lets somebody in, answers them, and is about to look again."""
        self.other.opened += 1
        self.last.has_accepted()
        self.other.closed += 1

    def becomes_a_rule(self) -> None:
        for _ in range(TIMES):
            self.accepted()
            assert self.told.seconds_away() == 0.0


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_where_it_is_a_rule_it_stays_away_longer_and_longer(pair: Pair) -> None:
    pair.becomes_a_rule()
    seconds = []
    for _ in range(6):
        pair.accepted()
        seconds.append(pair.told.seconds_away())
    assert seconds[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert seconds[-2:] == [MOST_SECONDS, MOST_SECONDS]
    for _ in range(5000):
        pair.accepted()
        assert pair.told.seconds_away() == MOST_SECONDS  # however often


def runs_a_call(pair: Pair) -> None:
    pair.other.admitted += 1


def is_to_leave(pair: Pair) -> None:
    pair.other.command = COMMAND_RETIRE


def has_died(pair: Pair) -> None:
    pair.shared.clear(pair.other)


def was_the_last_itself(pair: Pair) -> None:
    pair.told.has_accepted()


@pytest.mark.parametrize("why", [runs_a_call, is_to_leave, has_died, was_the_last_itself])
def test_it_is_needed_where_the_other_one_is_not_about_to_look(pair: Pair, why: object) -> None:
    pair.becomes_a_rule()
    assert callable(why)
    why(pair)
    assert pair.told.seconds_away() == 0.0
    # And from there on it takes another rule.
    pair.other.succeeded = pair.other.admitted
    pair.other.serves, pair.other.command = 1, 0
    pair.becomes_a_rule()
    pair.accepted()
    assert pair.told.seconds_away() == FIRST_SECONDS


def test_who_has_let_nobody_in_since_is_left_nobody_else(pair: Pair) -> None:
    pair.becomes_a_rule()
    pair.accepted()
    assert pair.told.seconds_away() > 0.0
    for _ in range(3):
        assert pair.told.seconds_away() == 0.0
    pair.accepted()
    assert pair.told.seconds_away() > 0.0


def test_nobody_is_left_to_a_worker_that_has_looked_already(pair: Pair) -> None:
    pair.becomes_a_rule()
    pair.accepted()
    pair.last.will_not_look_again()
    assert pair.told.seconds_away() == 0.0
    pair.accepted()  # it is the rule still
    assert pair.told.seconds_away() == FIRST_SECONDS


def test_another_worker_is_another_matter(pair: Pair) -> None:
    pair.becomes_a_rule()
    pair.accepted()
    assert pair.told.seconds_away() > 0.0
    third = Deference(pair.shared, 2)
    pair.shared.slots[2].opened = pair.other.opened
    third.has_accepted()
    assert pair.told.seconds_away() > 0.0
    pair.last.has_accepted()
    assert pair.told.seconds_away() > 0.0


def test_a_dead_worker_does_not_look(pair: Pair) -> None:
    pair.last.has_accepted()
    pair.shared.clear(pair.other)
    assert pair.other.looks_again == 0
