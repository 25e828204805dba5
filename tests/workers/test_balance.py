"""A worker that has more clients than another one lets that one go first, but not for long."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.shared import Shared
from cpanbridge.workers import balance
from cpanbridge.workers.balance import HOLD_SECONDS, RELIEF_SECONDS, SHARE_SECONDS, Balance


class House:
    """Two workers, the first of which has more clients, and the time."""

    def __init__(self) -> None:
        self.shared = Shared.create(2, Limits())
        self.full, self.empty = self.shared.slots
        for slot in self.shared.slots:
            slot.serves = 1
        self.full.opened = 10
        self.balance = Balance(self.shared, 0)
        self.now = 1000.0


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    house = House()
    monkeypatch.setattr(balance, "time", SimpleNamespace(monotonic=lambda: house.now))
    yield house
    os.close(house.shared.fd)


def waits_out_a_hold(house: House) -> None:
    assert house.balance.holds_back()
    house.now += HOLD_SECONDS * 0.9
    assert house.balance.holds_back()
    house.now += HOLD_SECONDS * 0.2
    assert not house.balance.holds_back()


def test_who_has_as_many_as_others_does_not_hold_back(house: House) -> None:
    house.empty.opened = 9
    assert not house.balance.holds_back()


def test_where_others_do_not_come_it_takes_all_for_a_while(house: House) -> None:
    waits_out_a_hold(house)
    house.balance.let_in()
    house.now += RELIEF_SECONDS * 0.9
    assert not house.balance.holds_back()
    house.now += RELIEF_SECONDS * 0.2
    waits_out_a_hold(house)


def test_where_clients_wait_though_others_come_it_takes_its_part(house: House) -> None:
    waits_out_a_hold(house)
    house.empty.opened, house.empty.closed = 500, 499
    house.balance.let_in()
    assert SHARE_SECONDS >= 2 * HOLD_SECONDS  # a part that is worth the name
    house.now += SHARE_SECONDS * 0.9
    assert not house.balance.holds_back()
    house.now += SHARE_SECONDS * 0.2
    waits_out_a_hold(house)
