"""The thread at the door hears that the door closes, whenever that is."""

import os
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Bells, Gate
from cpanbridge.supervisor.shared import Shared
from cpanbridge.workers import door
from cpanbridge.workers.door import Door
from cpanbridge.workers.keepalive import KeepAlive
from cpanbridge.workers.restraint import Restraint


def lonely_door() -> Door[None]:
    """One where nobody comes, from anywhere."""
    shared = Shared.create(1, Limits())

    def nobody() -> Any:
        return SimpleNamespace(
            descriptor=os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            waiting=False,
            settle=lambda most: None,
            away=0,
        )

    return Door(
        listeners=[],
        gate=Gate(shared, 0, [Bells.hang()]),
        prepare=lambda data, arrived: None,
        incoming=nobody(),
        outgoing=nobody(),
        keep_alive=KeepAlive(),
        restraint=Restraint(nobody()),
    )


@pytest.mark.parametrize("read_first", [False, True], ids=["before", "after"])
def test_a_door_that_closes_while_the_bell_is_silenced_is_left(
    monkeypatch: pytest.MonkeyPatch, read_first: bool
) -> None:
    """The main thread shuts it, and closes it just when the other one reads that it was shut."""
    lonely = lonely_door()
    closed = threading.Event()

    def read(descriptor: int) -> int:
        if closed.is_set():
            return os.eventfd_read(descriptor)
        closed.set()
        if not read_first:
            lonely.close()
        count = os.eventfd_read(descriptor)
        if read_first:
            lonely.close()
        return count

    fake = SimpleNamespace(**{**vars(os), "eventfd_read": read})
    monkeypatch.setattr(door, "os", cast(Any, fake))
    lonely.shut()
    left = threading.Thread(target=lonely.next, daemon=True)
    left.start()
    left.join(20)
    assert closed.is_set()
    assert not left.is_alive()
