"""A worker whose clients are on their way leaves those outside to others, but not for long."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.workers.accept import restraint
from cpanbridge.workers.accept.restraint import HOLD_SECONDS, RELIEF_SECONDS, Restraint


class Worker:
    """One with clients on their way, and the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.outgoing = SimpleNamespace(away=2, away_to_doors=2)
        self.restraint = Restraint(cast(Any, self.outgoing))

    def waits_out_a_hold(self) -> None:
        assert self.restraint.holds_back()
        self.now += HOLD_SECONDS * 0.9
        assert self.restraint.holds_back()
        self.now += HOLD_SECONDS * 0.2
        assert not self.restraint.holds_back()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    worker = Worker()
    monkeypatch.setattr(restraint, "time", SimpleNamespace(monotonic=lambda: worker.now))
    return worker


def test_one_on_its_way_is_no_reason(worker: Worker) -> None:
    worker.outgoing.away = worker.outgoing.away_to_doors = 1
    assert not worker.restraint.holds_back()


def test_those_on_their_way_to_a_worker_that_lets_nobody_in_are_no_reason(worker: Worker) -> None:
    worker.outgoing.away, worker.outgoing.away_to_doors = 5, 1
    assert not worker.restraint.holds_back()


def test_where_they_are_not_taken_it_takes_all_for_a_while(worker: Worker) -> None:
    worker.waits_out_a_hold()
    worker.now += RELIEF_SECONDS * 0.9
    assert not worker.restraint.holds_back()
    worker.now += RELIEF_SECONDS * 0.2
    worker.waits_out_a_hold()


def test_where_they_are_taken_the_next_hold_is_a_whole_one(worker: Worker) -> None:
    assert worker.restraint.holds_back()
    worker.outgoing.away = worker.outgoing.away_to_doors = 0
    worker.now += HOLD_SECONDS
    assert not worker.restraint.holds_back()
    worker.outgoing.away = worker.outgoing.away_to_doors = 2
    worker.waits_out_a_hold()
