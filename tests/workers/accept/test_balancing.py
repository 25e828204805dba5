"""A worker with more connections than another one hands some over, one at a time."""

import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.fields import COMMAND_RETIRE
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.accept.balancing import PAUSE_SECONDS, REST_SECONDS, Balancer

NOW = 1000.0
OTHERS = range(1, 4)
KEPT = 10


class Workers:
    """Four workers, the first of which keeps connections, while the others have no client."""

    def __init__(self) -> None:
        self.shared = Shared.create(4, Limits())
        self.slots = self.shared.slots
        for slot in self.slots:
            slot.serves = 1
        self.slots[0].opened = KEPT
        self.outgoing = SimpleNamespace(count=0)
        self.balancer = Balancer(self.shared, 0, cast(Any, self.outgoing))

    def ask(self) -> Owner | None:
        """As soon as it is worth while to ask."""
        return self.balancer.worker_with_fewer(max(NOW, self.balancer.next_check), KEPT)


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    os.close(workers.shared.fd)


def test_each_worker_with_fewer_is_given_some(workers: Workers) -> None:
    given = {workers.ask() for _ in range(200)}
    assert given == {workers.shared.owner(slot) for slot in OTHERS}


@pytest.mark.parametrize(("has", "is_given"), [(8, True), (9, False), (10, False), (11, False)])
def test_one_more_is_no_reason(workers: Workers, has: int, is_given: bool) -> None:
    for slot in OTHERS:
        workers.slots[slot].opened = has
    assert (workers.ask() is not None) is is_given


def test_a_worker_that_does_not_serve_is_given_none(workers: Workers) -> None:
    for slot in OTHERS[1:]:
        workers.slots[slot].serves = 0
    assert {workers.ask() for _ in range(50)} == {workers.shared.owner(1)}
    workers.slots[1].serves = 0
    assert workers.ask() is None


def test_a_worker_that_ends_meanwhile_is_not_taken_for_the_next_in_its_slot(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one does not serve yet, and may never come."""
    shared, name = workers.shared, workers.shared.owner

    def ends_before_it_is_named(slot: int) -> Owner:
        if slot != 0 and shared.slots[slot].serves:
            shared.clear(shared.slots[slot])
        return name(slot)

    monkeypatch.setattr(shared, "owner", ends_before_it_is_named)
    assert workers.ask() is None
    for slot in OTHERS:
        shared.slots[slot].serves = 1
    workers.balancer.next_check = 0.0
    assert workers.balancer.worker_with_a_thread(many=True) is None


def test_while_one_is_on_its_way_no_other_is_given(workers: Workers) -> None:
    workers.outgoing.count = 1
    assert workers.ask() is None
    workers.outgoing.count = 0
    assert workers.ask() is not None


def test_of_two_threads_that_ask_at_once_one_is_given_none(workers: Workers) -> None:
    assert workers.balancer.worker_with_fewer(NOW, KEPT) is not None
    assert workers.balancer.worker_with_fewer(NOW, KEPT) is None


def test_a_worker_that_was_told_to_exit_is_given_none_before_it_knows(workers: Workers) -> None:
    for slot in OTHERS[1:]:
        workers.slots[slot].command = COMMAND_RETIRE
    assert {workers.ask() for _ in range(50)} == {workers.shared.owner(1)}


def test_one_of_another_generation_is_given_none(workers: Workers) -> None:
    for slot in OTHERS[1:]:
        workers.slots[slot].generation = 2
    assert {workers.ask() for _ in range(50)} == {workers.shared.owner(1)}


def test_a_worker_with_few_clients_of_its_own_gives_itself_none(workers: Workers) -> None:
    workers.slots[0].opened = 0
    assert workers.shared.owner(0) not in {workers.ask() for _ in range(200)}


@pytest.mark.parametrize(("has", "surplus"), [(0, 9), (7, 2), (8, 1), (9, 1), (20, 1)])
def test_the_more_there_are_too_many_the_sooner_the_next_one_goes(
    workers: Workers, has: int, surplus: int
) -> None:
    for slot in OTHERS:
        workers.slots[slot].opened = 30
    workers.slots[2].opened = has
    workers.ask()
    assert workers.balancer.next_check == pytest.approx(NOW + PAUSE_SECONDS / surplus)


def test_after_one_was_not_taken_none_is_given_for_a_while(workers: Workers) -> None:
    workers.balancer.was_not_taken(NOW)
    assert workers.balancer.next_check == NOW + REST_SECONDS


def test_what_waits_goes_to_a_worker_with_a_thread_and_from_one_that_exits_to_any(
    workers: Workers,
) -> None:
    first, second, third = (workers.slots[slot] for slot in OTHERS)
    for slot in (first, second, third):
        slot.threads = slot.admitted = 1
    third.serves = 0
    first.queued = 1
    assert workers.balancer.worker_with_a_thread(many=False) is None
    assert workers.balancer.worker_with_a_thread(many=True) == workers.shared.owner(2)
    first.succeeded = 1
    for many in (False, True):
        assert workers.balancer.worker_with_a_thread(many=many) == workers.shared.owner(1)


def test_a_modules_random_numbers_are_its_own(workers: Workers) -> None:
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    found = []
    for _ in range(3):
        found.append(random.random())
        workers.ask()
    assert found == expected
