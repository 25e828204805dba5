"""Where state that nobody has yet is to be: with no worker that is about to leave."""

import os
from collections.abc import Iterator

import pytest
from conftest import take_down

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.roster import RosterWriter
from cpanbridge.supervisor.shared import ORDER_RETIRE, Shared
from cpanbridge.workers.affinity import Affinity

MODULES = range(1, 30)


class House:
    """Three workers, of which the first is asked where a module's state is to be."""

    def __init__(self) -> None:
        self.shared = Shared.create(3, Limits())
        self.bells = [Bells.hang() for _ in self.shared.slots]
        for slot in self.shared.slots:
            slot.serves = 1
        roster = RosterWriter(self.shared.books[0].roster)
        self.affinity = Affinity(self.shared, 0, self.bells, Limits(), roster, lambda _: None)

    def owners(self) -> list[int]:
        """The slots that get the state of modules which nobody has used yet."""
        return [self.affinity._owner_for_module(module).slot for module in MODULES]


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    take_down(house.bells)
    os.close(house.affinity.outgoing.descriptor)
    os.close(house.shared.fd)


def test_modules_are_spread_over_those_that_stay(house: House) -> None:
    house.shared.slots[1].order = ORDER_RETIRE  # it has not seen that yet
    owners = house.owners()
    assert abs(owners.count(0) - owners.count(2)) <= 1
    assert owners.count(1) == 0


def test_where_all_have_just_been_told_to_leave_each_has_the_same_owner(house: House) -> None:
    """In a reload, until the new workers say that they serve."""
    for slot in house.shared.slots:
        slot.order = ORDER_RETIRE
    roster = RosterWriter(house.shared.books[1].roster)
    other = Affinity(house.shared, 1, house.bells, Limits(), roster, lambda _: None)
    assert [other._owner_for_module(module).slot for module in MODULES] == house.owners()
    os.close(other.outgoing.descriptor)
