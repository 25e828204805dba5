"""What the kernel does to a daemon in a control group: no more processes, no more memory."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import one_shot, until

ROOT = Path("/sys/fs/cgroup")
MEGABYTE = 1 << 20

# Starts a daemon in a group of its own, with one limit by the name of its file.
RunWithin = Callable[[Daemon, str, int], Daemon]


@pytest.fixture
def run_within() -> Iterator[RunWithin]:
    groups: list[Path] = []

    def run(daemon: Daemon, name: str, value: int) -> Daemon:
        controller = name.split(".")[0]
        version1 = (ROOT / controller).is_dir()
        hierarchy = ROOT / controller if version1 else ROOT
        lines = [each.split(":", 2) for each in Path("/proc/self/cgroup").read_text().splitlines()]
        (own,) = [group for _, each, group in lines if each == (controller if version1 else "")]
        group = hierarchy / f"cpanbridged-test-{os.getpid()}"
        if version1 and name == "memory.max":
            name = "memory.limit_in_bytes"
        try:
            group.mkdir()
            groups.append(group)
            (group / name).write_text(str(value))
            (group / "cgroup.procs").write_text(str(os.getpid()))  # children begin in it
        except OSError as error:
            pytest.skip(f"no control group to be had here: {error}")
        try:
            return daemon.run()
        finally:
            (hierarchy / own.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    yield run
    for group in groups:
        with contextlib.suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        until(lambda group=group: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_a_fork_bomb_takes_no_other_worker_with_it(
    new_daemon: NewDaemon, run_within: RunWithin
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_memory_mb = 4096")
    run_within(daemon, "pids.max", 60)
    bomb = daemon.call("probe", "fork_bomb")
    assert len(bomb) > 20
    for _ in range(20):
        assert one_shot(daemon.path, "test", "ping")["success"]
    # A worker that dies now is replaced when there is room for it again.
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: "died: killed by signal 9 (SIGKILL); replacing it" in daemon.log())
    assert one_shot(daemon.path, "test", "ping")["success"]
    for pid in bomb:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(daemon.workers()) - {victim}) == 2)
    until(lambda: daemon.call("system", "health")["checks"]["workers"]["status"] != "fail")
    for _ in range(20):
        assert one_shot(daemon.path, "test", "ping")["success"]


def test_the_gate_closes_before_a_cgroup_is_full(
    new_daemon: NewDaemon, run_within: RunWithin
) -> None:
    """`max_memory_mb` is left at its default, which is more than the cgroup allows."""
    limits = "limits = {sample_interval = 0.1, memory_grace = 600}"
    daemon = new_daemon(f'workers = 2\noverload = "reject"\n{limits}')
    run_within(daemon, "memory.max", 200 * MEGABYTE)

    def load() -> dict[str, Any]:
        found: dict[str, Any] = daemon.status()["resource_status"]
        return found

    until(lambda: load()["memory_limit"] == {"mb": 180, "from": "cgroup"})
    info = daemon.call("system", "info")
    assert info["memory_limit"] == {"mb": 180, "from": "cgroup"}
    assert info["cgroup_memory"]["limit_mb"] == 200

    def is_closed() -> bool:
        return bool(daemon.status()["gate"]["verdict"] == "closed")

    before, more = load()["memory_mb"], 90
    while (reply := one_shot(daemon.path, "probe", "hoard", [more]))["success"]:
        enough = before + more - 1
        until(lambda enough=enough: load()["memory_mb"] > enough or is_closed())
        before, more = load()["memory_mb"], 8
    assert reply["error_type"] == "Overloaded"
    assert "exceeds limit 180MB" in daemon.log()
    assert "died" not in daemon.log()
    status = daemon.command("status").stdout
    assert re.search(r"\n +memory limit: 180 MB, nine tenths of the 200 MB of /\S+\n", status)


def test_a_worker_that_the_kernel_kills_for_its_memory_is_replaced(
    new_daemon: NewDaemon, run_within: RunWithin
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_memory_mb = 8192")
    run_within(daemon, "memory.max", 300 * MEGABYTE)
    before = set(daemon.workers())
    with pytest.raises(ValueError, match="Expecting value"):  # its connection ends without a reply
        one_shot(daemon.path, "probe", "hoard", [1000])
    until(lambda: "died: killed by signal 9 (SIGKILL)" in daemon.log())
    assert re.search(
        r" died: killed by signal 9 \(SIGKILL\) by the kernel, for want of memory \(counted in "
        r"/\S+\): give /\S+ more than 300 MB, .*; replacing it; it ran probe\.hoard ",
        daemon.log(),
    )
    until(lambda: len(daemon.workers()) == 2)
    assert len(before & set(daemon.workers())) == 1
    assert one_shot(daemon.path, "test", "ping")["success"]
    # A client sees its end before its connection is counted as closed.
    until(lambda: daemon.metrics()["gate"]["connections"] == 1)
    # Anybody may send that signal.
    os.kill(daemon.workers()[0], signal.SIGKILL)
    until(lambda: "died: killed by signal 9 (SIGKILL); replacing it" in daemon.log())
