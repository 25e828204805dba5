"""Where a request that waits goes to, from a worker that has no room for it."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.memory.owners import Owner
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.client.draining import ConnectionDrainer
from cpanbridge.workers.protocol.requests import Request
from cpanbridge.workers.requests.calls import Call
from cpanbridge.workers.sessions.dispatch import HandedOver
from cpanbridge.workers.sessions.placement import Placement


class Worker:
    """One that exits, and another one that stays."""

    def __init__(self) -> None:
        self.drainer = ConnectionDrainer(Limits(), lambda _: False)
        self.drainer.exiting = True
        self.works = True
        self.rests = False
        target = SimpleNamespace(owned_as=None, request_timeout=0.0)
        now = time.monotonic()
        self.call = Call(Request("m", "f"), cast(Any, target), now, ticket=7)
        self.client = ClientSocket(-1, 0, framed=True)
        balancer = SimpleNamespace(
            worker_with_a_thread=lambda many: Owner(1, 1), was_not_taken=self._was_not_taken
        )
        dispatcher = SimpleNamespace(moving=self._moving, send=self._send)
        others: Any = None
        self.placement = Placement(
            *(others, others, cast(Any, balancer), cast(Any, dispatcher)),
            *(self.drainer, lambda: True),
        )

    def _was_not_taken(self, _: float) -> None:
        self.rests = True

    def _moving(self, *_: object, input_may_have_ended: bool) -> object:
        return input_may_have_ended

    def _send(self, client: ClientSocket) -> None:
        if self.works:
            raise HandedOver
        client.transfer = None  # as when that cannot be now

    def enter(self) -> None:
        self.placement.enter(self.call, self.client, lambda: b"")


def test_a_client_whose_input_has_ended_is_passed_on_and_that_is_told() -> None:
    worker = Worker()
    worker.client.end_input()
    with pytest.raises(HandedOver):
        worker.enter()
    assert worker.client.transfer is not None
    assert worker.client.transfer.moving  # it may have ended


def test_where_none_can_be_passed_on_that_is_not_tried_again_at_once() -> None:
    worker = Worker()
    worker.works = False
    worker.enter()
    assert worker.rests
