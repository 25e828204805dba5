"""The check of the daemon's paths, which repeats itself every second."""

from typing import Any, cast
from unittest import mock

import pytest

from cpanbridge.supervisor.lifecycle import path_watch
from cpanbridge.supervisor.lifecycle.path_watch import PathWatch
from cpanbridge.supervisor.system import event_loop
from cpanbridge.supervisor.system.event_loop import Loop


def test_a_check_that_fails_is_not_made_twice_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "FAULT_SECONDS", 0.0)
    monkeypatch.setattr(path_watch, "SECONDS", 0.0)
    loop = Loop()
    spawner = mock.Mock(loop=loop)
    watch = PathWatch(cast(Any, None), spawner, lambda: "running", lambda: None)
    watch.repair = mock.Mock()
    watch.repair.check.side_effect = [ValueError] * 3 + [False] * 100
    loop.after(0.0, watch.check)
    for _ in range(6):
        loop.turn()
    assert watch.repair.check.call_count <= 6
