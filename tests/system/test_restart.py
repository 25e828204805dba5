"""Restart: the sockets pass to a master that begins anew, or nothing has changed."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, until

CONFIG = "workers = 2\nlimits.max_requests_per_minute = 0"


def restart(daemon: Daemon, *flags: str) -> str:
    """Have it restarted by the command; what that prints."""
    done = daemon.command("restart", *flags)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_no_client_meets_a_closed_socket_or_an_error_and_all_begins_anew(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(CONFIG)
    daemon.will_run("")
    daemon.run()
    file = os.lstat(daemon.path)
    first = daemon.pid
    daemon.will_run(
        "from cpanbridge.supervisor import version\nversion.__version__ = '9.8.7'\n"
        # Other code may lay the shared memory out in another way.
        "from cpanbridge.supervisor.memory import layout\nlayout.LAYOUT = -1\n"
    )
    over = threading.Event()

    def call_all_the_time() -> int:
        calls = 0
        while not over.is_set():
            assert one_shot(daemon.path, "test", "echo", [calls])["result"] == [calls]
            calls += 1
        return calls

    event = daemon.folder / "runs"
    with ThreadPoolExecutor(4) as pool, Framed(daemon.path) as kept:
        assert kept.call("test", "echo", [1]) is not None
        callers = [pool.submit(call_all_the_time) for _ in range(3)]
        long = pool.submit(one_shot, daemon.path, "probe", "span", [1.0, str(event)])
        until(event.exists)
        began = time.monotonic()
        said = restart(daemon)
        assert long.result()["success"]
        assert kept.receive() is None
        before = daemon.metrics()["performance_metrics"]["total_requests"]
        until(lambda: daemon.metrics()["performance_metrics"]["total_requests"] > before + 10)
        over.set()
        assert all(each.result() > 10 for each in callers)
    assert daemon.pid != first
    assert said.startswith(f"Restarted: pid {daemon.pid}, 2 workers, listening on {daemon.path}")
    assert os.path.samestat(os.lstat(daemon.path), file)
    status = daemon.status()
    assert (status["version"], status["generation"]) == ("9.8.7", 1)
    assert status["uptime_seconds"] < time.monotonic() - began
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    daemon.end()
    assert not any(Path(f"{daemon.path}{suffix}").exists() for suffix in ("", ".pid", ".ctl"))


def test_it_restarts_with_what_it_was_started_with_or_with_another_file(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1")
    started = daemon.command("start", "--set", "limits.max_connections=7")
    assert started.returncode == 0, started
    other = daemon.folder / "other.toml"
    other.write_text(daemon.config.read_text().replace("workers = 1", "workers = 3"))

    def has() -> tuple[str, int, int]:
        status = daemon.status()
        found = status["workers_wanted"], status["gate"]["max_connections"]
        return status["configuration"], *found

    flags = ["--set", "workers=2", "--socket", daemon.path]
    subprocess.run([COMMAND, "restart", *flags], env=daemon.environment, check=True)
    assert has() == (str(daemon.config), 2, 7)
    restart(daemon, f"--config={other}")
    assert has() == (str(other), 3, 100)
    daemon.command("stop", "--socket", daemon.path)


def broken_file(daemon: Daemon) -> str:
    daemon.write_config("workers = -1")
    return "workers = -1"


def broken_module(daemon: Daemon) -> str:
    folder = daemon.folder / "helpers"
    folder.mkdir()
    (folder / "bad.py").write_text("def broken(:")
    daemon.write_config(f'{CONFIG}\n[[module_dirs]]\npath = "{folder}"')
    return "SyntaxError"


def broken_code(daemon: Daemon) -> str:
    daemon.will_run("import os\nos._exit(9)\n")
    return "the new master ended: exit status 9"


def another_user(daemon: Daemon) -> str:
    daemon.write_config(f'user = "daemon"\n{CONFIG}')
    return "user = 'daemon': the running daemon has None and cannot become another"


@pytest.mark.parametrize("spoil", [broken_file, broken_module, broken_code, another_user])
def test_a_restart_that_would_not_start_again_changes_nothing(
    new_daemon: NewDaemon, spoil: Callable[[Daemon], str]
) -> None:
    daemon = new_daemon(CONFIG)
    daemon.will_run("")
    daemon.run()
    before = daemon.pid, sorted(daemon.workers())
    said = spoil(daemon)
    daemon.environment.pop("PYTHONPATH")  # the command itself runs
    with Framed(daemon.path) as kept:
        assert kept.call("test", "echo", [1]) is not None
        done = daemon.command("restart")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("cpanbridged: not restarted, nothing has changed: ")
        assert said in done.stderr
        assert kept.call("test", "echo", [2]) is not None
    assert (daemon.pid, sorted(daemon.workers())) == before
    assert daemon.status()["state"] == "running"
    assert daemon.stop() == 0


@contextlib.contextmanager
def ending_its_workers(
    daemon: Daemon, pool: ThreadPoolExecutor
) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """While the old master of a restart waits for a call, which runs until the file `go`."""
    event, go = daemon.folder / "runs", daemon.folder / "go"
    call = pool.submit(one_shot, daemon.path, "probe", "run_until", [str(go), str(event)])
    until(event.exists)
    command = pool.submit(daemon.command, "restart")
    until(lambda: "Restarting: running requests may take" in daemon.log())
    try:
        yield command
    finally:
        go.touch()
    assert call.result()["success"]


def successor(daemon: Daemon) -> int:
    line = next(line for line in daemon.log().splitlines() if "Restarting: the new" in line)
    return int(line.rpartition(" ")[2])


def test_when_the_new_master_dies_last_the_old_one_serves_on(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(CONFIG).run()
    with ThreadPoolExecutor(2) as pool, ending_its_workers(daemon, pool) as command:
        os.kill(successor(daemon), signal.SIGKILL)
        assert daemon.call("test", "echo", [1]) == [1]
        assert "nothing has changed: the new master ended" in command.result().stderr
    until(lambda: len(daemon.workers()) == 2)
    assert daemon.status()["state"] == "running"
    assert "restart" in restart(daemon).lower()
    daemon.end()


def test_when_the_old_master_dies_the_new_one_has_the_sockets(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(CONFIG).run()
    first, file = daemon.pid, os.lstat(daemon.path)
    with ThreadPoolExecutor(2) as pool, ending_its_workers(daemon, pool):
        new = successor(daemon)
        os.kill(first, signal.SIGKILL)
        assert daemon.call("test", "echo", [1]) == [1]
        until(lambda: daemon.status()["pid"] == new)
        connect(daemon.path).close()
        assert os.path.samestat(os.lstat(daemon.path), file)
    daemon.end()


def test_a_stop_ends_a_restart(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(CONFIG).run()
    with ThreadPoolExecutor(3) as pool, ending_its_workers(daemon, pool) as command:
        new = successor(daemon)
        stopped = pool.submit(daemon.command, "stop")
        refused = command.result().stderr
        assert "the daemon is stopping" in refused
        (daemon.folder / "go").touch()
        assert stopped.result().returncode == 0
    assert not psutil.pid_exists(new)
    assert not os.path.exists(daemon.path)
