"""A worker with more connections than another one passes some on, one at a time."""

import math
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.layout import COMMAND_RETIRE, Shared
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.accept.balance import LOOK_SECONDS, REST_SECONDS, Balance

NOW = 1000.0
OTHERS = range(1, 4)
KEPT = 10


class House:
    """Four workers, the first of which keeps connections, while the others have no client."""

    def __init__(self) -> None:
        self.shared = Shared.create(4, Limits())
        self.slots = self.shared.slots
        for slot in self.slots:
            slot.serves = 1
        self.slots[0].opened = KEPT
        self.outgoing = SimpleNamespace(count=0)
        self.balance = Balance(self.shared, 0, cast(Any, self.outgoing), 0)

    def context(self) -> Owner | None:
        """As soon as it is worth while to ask."""
        return self.balance.better_place(max(NOW, self.balance.next_look), KEPT)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    os.close(house.shared.fd)


def test_each_that_has_fewer_is_given_some(house: House) -> None:
    given = {house.context() for _ in range(200)}
    assert given == {house.shared.owner(slot) for slot in OTHERS}


@pytest.mark.parametrize(("has", "is_given"), [(8, True), (9, False), (10, False), (11, False)])
def test_one_more_is_no_reason(house: House, has: int, is_given: bool) -> None:
    for slot in OTHERS:
        house.slots[slot].opened = has
    assert (house.context() is not None) is is_given


def test_who_does_not_serve_is_given_none(house: House) -> None:
    for slot in OTHERS[1:]:
        house.slots[slot].serves = 0
    assert {house.context() for _ in range(50)} == {house.shared.owner(1)}
    house.slots[1].serves = 0
    assert house.context() is None


def test_while_one_is_on_its_way_no_other_is_given(house: House) -> None:
    house.outgoing.count = 1
    assert house.context() is None
    house.outgoing.count = 0
    assert house.context() is not None


def test_of_two_threads_that_ask_at_once_one_is_given_none(house: House) -> None:
    assert house.balance.better_place(NOW, KEPT) is not None
    assert house.balance.better_place(NOW, KEPT) is None


def test_one_that_was_told_to_leave_is_given_none_before_it_knows(house: House) -> None:
    for slot in OTHERS[1:]:
        house.slots[slot].command = COMMAND_RETIRE
    assert {house.context() for _ in range(50)} == {house.shared.owner(1)}


def test_one_of_another_generation_is_given_none(house: House) -> None:
    for slot in OTHERS[1:]:
        house.slots[slot].generation = 2
    assert {house.context() for _ in range(50)} == {house.shared.owner(1)}


def test_a_worker_with_few_clients_of_its_own_is_not_its_own_better_place(house: House) -> None:
    house.slots[0].opened = 0
    assert house.shared.owner(0) not in {house.context() for _ in range(200)}


def test_where_threads_are_limited_nobody_is_given(house: House) -> None:
    limited = Balance(house.shared, 0, cast(Any, house.outgoing), 3)
    assert limited.next_look == math.inf


@pytest.mark.parametrize(("has", "surplus"), [(0, 9), (7, 2), (8, 1), (9, 1), (20, 1)])
def test_the_more_there_are_too_many_the_sooner_the_next_one_goes(
    house: House, has: int, surplus: int
) -> None:
    for slot in OTHERS:
        house.slots[slot].opened = 30
    house.slots[2].opened = has
    house.context()
    assert house.balance.next_look == pytest.approx(NOW + LOOK_SECONDS / surplus)


def test_after_one_was_not_taken_nobody_is_given_for_a_while(house: House) -> None:
    house.balance.was_not_taken(NOW)
    assert house.balance.next_look == NOW + REST_SECONDS


def test_a_modules_random_numbers_are_its_own(house: House) -> None:
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    found = []
    for _ in range(3):
        found.append(random.random())
        house.context()
    assert found == expected
