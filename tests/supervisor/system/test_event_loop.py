"""The loop calls every handler and timer when it should, and none that was removed."""

import os
import time

import pytest

from cpanbridge.supervisor.system import event_loop
from cpanbridge.supervisor.system.event_loop import MOST_FAULTS, WRITE, Loop


def test_timers_run_in_the_order_of_their_times() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.after(0.02, lambda: ran.append("later"))
    loop.after(0.0, lambda: ran.append("first"))
    loop.after(0.0, lambda: ran.append("second"))
    while len(ran) < 3:
        loop.turn()
    assert ran == ["first", "second", "later"]


def test_a_cancelled_timer_does_not_run_nor_wake_the_loop() -> None:
    loop = Loop()
    ran: list[str] = []
    timer = loop.after(0.0, lambda: ran.append("cancelled"))
    assert timer.pending
    timer.cancel()
    assert not timer.pending
    loop.after(0.05, lambda: ran.append("kept"))
    began = time.monotonic()
    loop.turn()
    assert ran == ["kept"]
    assert time.monotonic() - began >= 0.05


def test_a_timer_that_another_cancels_in_the_same_turn_does_not_run() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.after(0.0, lambda: victim.cancel())
    victim = loop.after(0.0, lambda: ran.append("victim"))
    loop.after(0.0, lambda: ran.append("end"))
    loop.turn()
    assert ran == ["end"]


def test_a_descriptor_that_another_handler_closed_is_not_handled() -> None:
    loop = Loop()
    pipes = [os.pipe(), os.pipe()]
    handled: list[int] = []

    def handle(mine: int, other: int) -> None:
        handled.append(mine)
        loop.forget(other)
        os.close(other)
        # The number is another file's now, which is not ready.
        assert os.dup2(quiet[0], other) == other
        loop.watch(other, lambda: handled.append(-1))

    quiet = os.pipe()
    (first, _), (second, _) = pipes
    loop.watch(first, lambda: handle(first, second))
    loop.watch(second, lambda: handle(second, first))
    for _, write_end in pipes:
        os.write(write_end, b"x")
    loop.turn()
    assert len(handled) == 1
    for descriptor in (first, second, *(end for _, end in pipes), *quiet):
        os.close(descriptor)


def test_watching_again_replaces_handler_and_events() -> None:
    loop = Loop()
    read_end, write_end = os.pipe()
    seen: list[str] = []
    loop.watch(write_end, lambda: seen.append("readable"))
    loop.watch(write_end, lambda: seen.append("writable"), WRITE)
    loop.turn()
    assert seen == ["writable"]
    os.close(read_end)
    os.close(write_end)


def test_a_step_that_fails_is_logged_and_the_next_ones_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop()
    ran: list[str] = []
    loop.after(0.0, lambda: [][0])
    loop.after(0.0, lambda: ran.append("next"))
    loop.turn()
    assert ran == ["next"]
    assert "by a fault of the daemon's own" in caplog.text
    assert "IndexError" in caplog.text


def test_a_step_that_keeps_failing_ends_the_loop() -> None:
    loop = Loop()
    read_end, write_end = os.pipe()
    loop.watch(write_end, lambda: [][0], WRITE)
    for _ in range(MOST_FAULTS):
        loop.turn()
    with pytest.raises(IndexError):
        loop.turn()
    os.close(read_end)
    os.close(write_end)


def test_what_repeats_itself_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "FAULT_SECONDS", 0.01)
    loop = Loop()
    runs: list[int] = []

    def repeat() -> None:
        runs.append(len(runs))
        if len(runs) == 2:
            raise ValueError("once")
        loop.after(0.0, repeat)

    loop.after(0.0, repeat)
    while len(runs) < 4:
        loop.turn()


def test_a_failed_timer_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "FAULT_SECONDS", 0.0)
    loop = Loop()
    ran: list[str] = []

    def fail() -> None:
        ran.append("failed")
        raise ValueError

    timer = loop.after(0.0, fail)
    loop.turn()
    timer.cancel()
    loop.after(0.0, lambda: ran.append("end"))
    while ran[-1] != "end":
        loop.turn()
    assert ran == ["failed", "end"]
