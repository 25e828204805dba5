"""Where state that no worker has yet is to be: with none that is about to exit."""

import os
from collections.abc import Callable, Iterator

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.fields import COMMAND_RETIRE
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import ClientProcess, Owner
from cpanbridge.workers.sessions.ownership import Ownership

MODULES = range(1, 30)
PROCESS = ClientProcess(1, 1)


@pytest.fixture
def shared() -> Iterator[Shared]:
    shared = Shared.create(3, Limits())
    for slot in shared.slots:
        slot.serves = 1
    yield shared
    os.close(shared.fd)


def owners(shared: Shared, slot: int = 0) -> list[int]:
    """The slots that get the state of modules which no client has used yet, asked in one worker."""
    ownership = Ownership(shared, slot)
    return [ownership.find(PROCESS, module, may_move=False).owner.slot for module in MODULES]


def test_modules_are_spread_over_those_that_stay(shared: Shared) -> None:
    shared.slots[1].command = COMMAND_RETIRE  # it has not seen that yet
    found = owners(shared)
    assert abs(found.count(0) - found.count(2)) <= 1
    assert found.count(1) == 0


def test_if_all_have_just_been_told_to_exit_each_finds_the_same_owner(shared: Shared) -> None:
    """In a reload, until the new workers say that they serve."""
    for slot in shared.slots:
        slot.command = COMMAND_RETIRE
    assert owners(shared, slot=1) == owners(shared, slot=0)


def test_a_worker_that_ends_while_an_owner_is_chosen_is_not_taken_for_the_next_in_its_slot(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one does not serve yet, and may never come: a client that waits for it waits long."""
    shared.slots[0].serves = 0
    name: Callable[[int], Owner] = shared.owner

    def ends_before_it_is_named(slot: int) -> Owner:
        if slot != 0 and shared.slots[slot].serves:
            shared.clear(shared.slots[slot])
        return name(slot)

    monkeypatch.setattr(shared, "owner", ends_before_it_is_named)
    assert set(owners(shared)) == {0}
