"""A worker with more connections than another one passes some on, one at a time."""

import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.owners import Owner
from cpanbridge.supervisor.shared import Shared
from cpanbridge.workers.balance import LOOK_SECONDS, REST_SECONDS, Balance

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
        self.balance = Balance(self.shared, 0, cast(Any, self.outgoing))

    def place_for_new(self, now: float = NOW) -> Owner | None:
        return self.balance.better_place(now, KEPT, is_new=True)

    def place_for_old(self, now: float = NOW) -> Owner | None:
        return self.balance.better_place(now, KEPT, is_new=False)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    os.close(house.shared.fd)


def test_each_that_has_fewer_is_given_some(house: House) -> None:
    given = {house.place_for_new() for _ in range(200)}
    assert given == {house.shared.owner(slot) for slot in OTHERS}


@pytest.mark.parametrize(("has", "is_given"), [(8, True), (9, False), (10, False), (11, False)])
def test_one_more_is_no_reason(house: House, has: int, is_given: bool) -> None:
    for slot in OTHERS:
        house.slots[slot].opened = has
    assert (house.place_for_old() is not None) is is_given
    assert (house.place_for_new() is not None) is is_given


def test_who_does_not_serve_is_given_none(house: House) -> None:
    for slot in OTHERS[1:]:
        house.slots[slot].serves = 0
    assert {house.place_for_new() for _ in range(50)} == {house.shared.owner(1)}
    house.slots[1].serves = 0
    assert house.place_for_new() is None


def test_those_on_their_way_are_not_given_twice(house: House) -> None:
    house.outgoing.count = 8
    assert house.place_for_new() is not None
    house.outgoing.count = 9
    assert house.place_for_new() is None


def test_of_those_that_it_has_it_gives_one_at_a_time(house: House) -> None:
    assert house.place_for_old() is not None
    assert house.place_for_old(NOW + LOOK_SECONDS * 0.9) is None
    assert house.place_for_new(NOW + LOOK_SECONDS * 0.9) is not None
    assert house.place_for_old(NOW + LOOK_SECONDS * 1.8) is None
    assert house.place_for_old(NOW + LOOK_SECONDS * 2) is not None


def test_after_one_was_not_taken_nobody_is_given_for_a_while(house: House) -> None:
    house.balance.was_not_taken(NOW)
    assert house.place_for_new(NOW + REST_SECONDS * 0.9) is None
    assert house.place_for_old(NOW + REST_SECONDS * 0.9) is None
    assert house.place_for_new(NOW + REST_SECONDS * 1.1) is not None


def test_a_modules_random_numbers_are_its_own(house: House) -> None:
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    found = []
    for _ in range(3):
        found.append(random.random())
        house.place_for_new()
    assert found == expected
