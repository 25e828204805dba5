"""Where state that nobody has yet is to be: with no worker that is about to leave."""

import os
from collections.abc import Iterator

import pytest
from conftest import take_down

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.connection_table import ConnectionTableWriter
from cpanbridge.supervisor.memory.layout import COMMAND_RETIRE, Shared
from cpanbridge.workers.sessions.affinity import Affinity

MODULES = range(1, 30)


class House:
    """Three workers, of which the first is asked where a module's state is to be."""

    def __init__(self) -> None:
        self.shared = Shared.create(3, Limits())
        self.wakeups = [Wakeups.hang() for _ in self.shared.slots]
        for slot in self.shared.slots:
            slot.serves = 1
        connection_table = ConnectionTableWriter(self.shared.statistics[0].connection_table)
        self.affinity = Affinity(
            self.shared, 0, self.wakeups, Limits(), connection_table, lambda _: None
        )

    def owners(self) -> list[int]:
        """The slots that get the state of modules which nobody has used yet."""
        return [self.affinity._owner_for_module(module).slot for module in MODULES]


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    take_down(house.wakeups)
    os.close(house.affinity.outgoing.descriptor)
    os.close(house.shared.fd)


def test_modules_are_spread_over_those_that_stay(house: House) -> None:
    house.shared.slots[1].command = COMMAND_RETIRE  # it has not seen that yet
    owners = house.owners()
    assert abs(owners.count(0) - owners.count(2)) <= 1
    assert owners.count(1) == 0


def test_where_all_have_just_been_told_to_leave_each_has_the_same_owner(house: House) -> None:
    """In a reload, until the new workers say that they serve."""
    for slot in house.shared.slots:
        slot.command = COMMAND_RETIRE
    connection_table = ConnectionTableWriter(house.shared.statistics[1].connection_table)
    other = Affinity(house.shared, 1, house.wakeups, Limits(), connection_table, lambda _: None)
    assert [other._owner_for_module(module).slot for module in MODULES] == house.owners()
    os.close(other.outgoing.descriptor)
