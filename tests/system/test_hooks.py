"""The modules' hooks: `cleanup_stale_resources` and `shutdown`, in every worker."""

import signal
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon
from exposing import write_modules
from plain_client import one_shot, until

UNLIMITED = "workers = 2\nlimits.max_requests_per_minute = 0"

HOOKS = """
import os
def mark(what):
    with open({marks!r}, "a") as stream:
        stream.write(f"{{what}} {{os.getpid()}}\\n")
def cleanup_stale_resources(): mark("cleanup")
def shutdown(): mark("shutdown")
"""
BROKEN_HOOKS = """
def cleanup_stale_resources(): raise SystemExit("cleanup cannot")
def shutdown(): raise ValueError("shutdown cannot")
"""


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def with_hooks(daemon: Daemon, more: str = "", **files: str) -> Path:
    """Expose a folder with hooks, and these modules; returns the file that the hooks write to."""
    marks = daemon.folder / "marks"
    files = {"hooked": HOOKS.format(marks=str(marks)), **files}
    folder = write_modules(daemon.folder / "hooks", **files)
    daemon.write_config(f'{UNLIMITED}\n{more}\n[[module_dirs]]\npath = "{folder}"')
    return marks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_worker_runs_the_shutdown_hooks_when_it_exits(
    new_daemon: NewDaemon, number: signal.Signals
) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon)
    daemon.run()
    workers = daemon.workers()
    assert daemon.stop(number) == 0
    assert sorted(lines_of(marks)) == sorted(f"shutdown {pid}" for pid in workers)


def test_each_worker_runs_the_cleanup_hooks_repeatedly(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon, "limits.cleanup_interval = 0.2")
    daemon.run()
    for pid in daemon.workers():
        until(lambda pid=pid: lines_of(marks).count(f"cleanup {pid}") >= 2)


def test_a_hook_that_fails_keeps_no_other_from_running(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    marks = with_hooks(daemon, "limits.cleanup_interval = 0.2", a_broken=BROKEN_HOOKS)
    daemon.run()
    workers = daemon.workers()
    for pid in workers:
        until(lambda pid=pid: lines_of(marks).count(f"cleanup {pid}") >= 2)
    assert daemon.stop() == 0
    for pid in workers:
        assert f"shutdown {pid}" in lines_of(marks)
    assert "a_broken.cleanup_stale_resources() failed" in daemon.log()
    assert "a_broken.shutdown() failed" in daemon.log()


def test_a_cleanup_hook_that_hangs_holds_up_neither_calls_nor_the_stop(
    new_daemon: NewDaemon,
) -> None:
    hanging = "import time\ndef cleanup_stale_resources():\n    print('hangs', flush=True)\n"
    daemon = new_daemon()
    with_hooks(daemon, "limits.cleanup_interval = 0.1", a_hanging=hanging + "    time.sleep(600)\n")
    daemon.run()
    until(lambda: daemon.log().count("hangs") == 2)
    assert daemon.call("probe", "two", [1]) == [1, "default"]
    assert daemon.stop() == 0
    assert daemon.log().count("hangs") == 2


def test_without_a_thread_for_the_hooks_a_worker_serves_and_stops_as_ever(
    new_daemon: NewDaemon,
) -> None:
    exhausting = """
import threading
def exhaust():
    def start(thread): raise RuntimeError("can't start new thread")
    threading.Thread.start = start
"""
    daemon = new_daemon()
    marks = with_hooks(daemon, "limits.cleanup_interval = 0.1", exhausting=exhausting)
    daemon.replace_config(daemon.config.read_text().replace("workers = 2", "workers = 1"))
    daemon.run()
    (worker,) = daemon.workers()
    daemon.call("exhausting", "exhaust")
    until(lambda: "no thread for cleanup_stale_resources()" in daemon.log())
    assert daemon.call("probe", "worker_pid") == worker
    assert daemon.stop() == 0
    assert lines_of(marks)[-1] == f"shutdown {worker}"


def test_hooks_cannot_be_called_by_clients(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with_hooks(daemon)
    daemon.run()
    for hook in ("shutdown", "cleanup_stale_resources"):
        assert one_shot(daemon.path, "hooked", hook)["error_type"] == "FunctionNotAllowed"
