"""Which process a client is: as the kernel says, and never mistaken for a later one."""

import gc
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from plain_client import until

from cpanbridge.supervisor.memory.owners import ClientProcess
from cpanbridge.workers.client import identity
from cpanbridge.workers.client.identity import REMEMBERED, Identities, start_time


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for each in started:
        each.kill()
        each.wait()


def sleeper(sleepers: list[subprocess.Popen[bytes]]) -> int:
    sleepers.append(subprocess.Popen(["sleep", "60"]))
    return sleepers[-1].pid


def descriptors() -> int:
    gc.collect()  # what other tests have left must not be closed during this one
    return len(os.listdir("/proc/self/fd"))


def test_a_process_is_known_by_pid_and_start_time(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = Identities()
    pid = sleeper(sleepers)
    process = identities.process(pid)
    assert process == ClientProcess(pid, start_time(pid) or -1)
    monkeypatch.setattr(identity, "start_time", lambda _: pytest.fail("it is read again"))
    assert identities.process(pid) == process


def test_a_process_that_has_ended_is_not_found_though_it_was_cached(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    identities = Identities()
    pid = sleeper(sleepers)
    assert identities.process(pid) is not None
    os.kill(pid, signal.SIGKILL)
    sleepers[-1].wait()
    assert until(lambda: identities.process(pid) is None)


def test_a_pid_that_was_given_to_another_process_is_another_client(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = Identities()
    first, second = sleeper(sleepers), sleeper(sleepers)
    old = identities.process(first)
    # As if the kernel had given the first one's number to the second one.
    os.kill(first, signal.SIGKILL)
    sleepers[0].wait()
    monkeypatch.setattr(identity, "start_time", lambda pid: start_time(second))
    monkeypatch.setattr(os, "pidfd_open", lambda pid, open_=os.pidfd_open: open_(second))
    new = identities.process(first)
    assert old is not None
    assert new == ClientProcess(first, start_time(second) or -1)
    assert new != old or start_time(second) == old.start


def test_only_so_many_are_cached_and_none_leaks_a_descriptor(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    identities = Identities()
    before = descriptors()
    for _ in range(REMEMBERED + 10):
        assert identities.process(sleeper(sleepers)) is not None
    assert descriptors() - before == REMEMBERED
    assert identities.process(sleepers[0].pid) is not None


def test_without_a_descriptor_a_process_is_still_identified(
    sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", lacks)
    identities = Identities()
    pid = sleeper(sleepers)
    assert (
        identities.process(pid)
        == identities.process(pid)
        == ClientProcess(pid, start_time(pid) or -1)
    )
