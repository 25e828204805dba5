"""Where state that no worker has yet is to be: with none that is about to exit."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.fields import COMMAND_RETIRE, Slot
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import ClientProcess
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

    class EndsBeforeItIsChosen:
        """Its worker ends when somebody has seen that it serves."""

        def __init__(self, slot: Slot) -> None:
            self.slot = slot

        def __getattr__(self, name: str) -> Any:
            value = getattr(self.slot, name)
            if name == "is_staying" and value:
                self.slot.serves = 0
                self.slot.incarnation += 1
            return value

    slots = shared.slots
    monkeypatch.setattr(shared, "slots", [slots[0], *map(EndsBeforeItIsChosen, slots[1:])])
    found = [Ownership(shared, 0).find(PROCESS, module, may_move=False).owner for module in MODULES]
    assert all(owner.slot == 0 or not shared.is_there(owner) for owner in found)
