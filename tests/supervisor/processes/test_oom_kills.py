"""What the kernel has killed for want of memory, told from what anybody else has killed."""

import os
import signal
import types
from typing import cast

import pytest

from cpanbridge.supervisor.cgroup import Memory
from cpanbridge.supervisor.processes import oom_kills
from cpanbridge.supervisor.processes.oom_kills import RECENT_SECONDS, OomKills
from cpanbridge.supervisor.processes.spawner import Process, Spawner
from cpanbridge.supervisor.system.event_loop import Loop, Timer


class Kernel:
    """The kernel's count, its clock, and a loop without a timer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 7  # before the daemon was started
        self.file = "/c/memory.events"
        self.now = 5.0  # the machine has just booted
        self.groups = [Memory("/c", 300 << 20, 0)]
        cgroups = types.SimpleNamespace(
            oom_kills=lambda: (self.count, self.file), memory=lambda: self.groups
        )
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        loop = types.SimpleNamespace(after=lambda seconds, action: Timer(action))
        monkeypatch.setattr(oom_kills, "Cgroups", lambda: cgroups)
        monkeypatch.setattr(oom_kills, "time", clock)
        monkeypatch.setattr(os, "kill", lambda pid, number: None)
        self.kills = OomKills(cast(Loop, loop))
        self.spawner = cast(Spawner, types.SimpleNamespace(loop=loop, oom_kills=self.kills))

    def end_of_a_process(self, number: int, *, by_the_master: bool = False) -> str:
        process = Process(self.spawner)  # a worker or a template
        process._started(4711)
        if by_the_master:
            process.kill()
        return process.describe_end(number)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def test_each_count_is_one_process(kernel: Kernel) -> None:
    killed = "killed by signal 9 (SIGKILL)"
    assert kernel.end_of_a_process(signal.SIGKILL) == killed
    kernel.count += 1
    assert kernel.end_of_a_process(signal.SIGTERM) == "killed by signal 15 (SIGTERM)"
    assert kernel.end_of_a_process(signal.SIGKILL, by_the_master=True) == killed
    assert kernel.end_of_a_process(signal.SIGKILL) == (
        f"{killed} by the kernel, for want of memory (counted in /c/memory.events): give /c more "
        "than 300 MB, or lower limits.max_memory_mb, so that the gate closes earlier"
    )
    assert kernel.end_of_a_process(signal.SIGKILL) == killed


def test_what_was_counted_long_before_explains_nothing(kernel: Kernel) -> None:
    kernel.count += 1  # a program that a worker had started, say
    kernel.kills._look_again()
    kernel.now += RECENT_SECONDS - 1
    assert kernel.kills.explain() is not None
    kernel.count += 1
    kernel.kills._look_again()
    kernel.now += RECENT_SECONDS + 1
    assert kernel.kills.explain() is None


def test_another_cgroup_has_another_count(kernel: Kernel) -> None:
    kernel.count, kernel.file = 9, "/d/memory.events"  # the daemon was moved
    assert kernel.kills.explain() is None
    kernel.count, kernel.groups = 10, []
    explanation = kernel.kills.explain()
    assert explanation is not None
    assert explanation.endswith(
        "the machine needs more memory, or limits.max_memory_mb a lower value"
    )
