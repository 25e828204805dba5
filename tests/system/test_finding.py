"""A command finds its daemon, acts on it, and on no other process, whatever the files say."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND, Daemon, NewDaemon
from plain_client import until

CONFIG = "workers = 1\npreload = false"
OWN_NAMESPACE = ["unshare", "-mpf", "--mount-proc"]


def in_own_namespace(*command: str) -> list[str]:
    """The command line that runs a command as process 1 of a PID namespace of its own."""
    return [*OWN_NAMESPACE, *command]


@pytest.fixture
def namespaces() -> None:
    """Skip where this user may make no PID namespaces."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is missing")
    tried = subprocess.run(in_own_namespace("true"), capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no PID namespace can be made: {tried.stderr.strip()}")


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with the daemon."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("namespaces")
def test_a_daemon_that_is_process_1_of_its_namespace_is_found_and_stopped_from_outside(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(CONFIG)
    command = in_own_namespace(COMMAND, "run", "--config", str(daemon.config))
    with subprocess.Popen(command, env=daemon.environment, stdin=subprocess.DEVNULL) as outer:
        try:
            until(lambda: " ready: pid 1," in daemon.log(), 60)
            assert Path(f"{daemon.path}.pid").read_text() == "1\n"
            (outside,) = (int(pid) for pid in children(outer.pid))
            status = daemon.command("status")
            assert status.returncode == 0, status
            assert status.stdout.startswith(f"running: pid {outside} (1 in its own), up ")
            found = json.loads(daemon.command("status", "--json").stdout)
            assert (found["pid"], found["own_pid"]) == (outside, 1)
            stopped = daemon.command("stop")
            assert (stopped.returncode, stopped.stderr) == (0, "")
            assert stopped.stdout == f"Stopped: pid {outside}\n"
            assert outer.wait(20) == 0
            assert "Stopped" in daemon.log()
        finally:
            outer.kill()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.usefixtures("namespaces")
def test_a_daemon_outside_of_the_commands_namespace_is_found_and_stopped(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(CONFIG).run()
    pid = daemon.pid

    def inside(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = in_own_namespace(COMMAND, name, "--config", str(daemon.config), *flags)
        return subprocess.run(
            command, capture_output=True, text=True, env=daemon.environment, check=False
        )

    status = inside("status")
    assert status.returncode == 0, status
    assert status.stdout.startswith(f"running: pid {pid} of another PID namespace, up ")
    assert json.loads(inside("status", "--json").stdout)["pid"] is None
    assert inside("reload").returncode == 0
    stopped = inside("stop")
    assert (stopped.returncode, stopped.stdout) == (
        0,
        f"Stopped: pid {pid} of another PID namespace\n",
    )
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0


def test_a_pid_file_that_names_a_stranger_harms_nobody(
    new_daemon: NewDaemon, stranger: subprocess.Popen[bytes]
) -> None:
    daemon = new_daemon(CONFIG).run()
    assert daemon.process is not None
    Path(f"{daemon.path}.pid").write_text(f"{stranger.pid}\n")
    assert daemon.command("status").stdout.startswith(f"running: pid {daemon.process.pid}, up ")
    assert daemon.command("stop").stdout == f"Stopped: pid {daemon.process.pid}\n"
    assert daemon.process.wait(20) == 0
    assert stranger.poll() is None


def test_after_an_upgrade_the_kernel_names_the_new_master(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(CONFIG).run()
    first = daemon.pid
    assert daemon.command("upgrade").returncode == 0
    assert daemon.pid != first
    assert daemon.command("status").stdout.startswith(f"running: pid {daemon.pid}, up ")
    assert daemon.command("stop").returncode == 0


def test_a_master_that_is_stopped_is_not_guessed_about(
    new_daemon: NewDaemon, stranger: subprocess.Popen[bytes]
) -> None:
    daemon = new_daemon(CONFIG).run()
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        Path(f"{daemon.path}.pid").write_text(f"{stranger.pid}\n")
        advice = (
            f"the master does not answer within 3 s; the kernel names pid {pid}: "
            f"if `ps -p {pid}` shows its master, kill -CONT {pid} lets it go on"
        )
        status = daemon.command("status")
        assert (status.returncode, status.stderr) == (1, "")
        assert status.stdout.startswith(f"unresponsive: pid {pid}, listening on {daemon.path}\n")
        assert advice in status.stdout
        stopped = daemon.command("stop")
        assert (stopped.returncode, stopped.stdout) == (1, "")
        assert advice in stopped.stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    assert daemon.command("stop").returncode == 0
    assert stranger.poll() is None


def not_toml(daemon: Daemon) -> None:
    daemon.config.write_text("workers = [\n")


def missing(daemon: Daemon) -> None:
    daemon.config.unlink()


def out_of_range(daemon: Daemon) -> None:
    daemon.write_config("workers = 100000")


def no_such_user(daemon: Daemon) -> None:
    daemon.write_config('user = "no-such-one"')


@pytest.mark.parametrize("spoil", [not_toml, missing, out_of_range, no_such_user])
def test_a_daemon_is_found_and_stopped_whatever_has_become_of_its_file(
    new_daemon: NewDaemon, spoil: Callable[[Daemon], None]
) -> None:
    daemon = new_daemon(CONFIG)
    config = daemon.config.read_text()
    daemon.replace_config(
        config.replace(f'["{daemon.path}"]', f'["{daemon.path}", "{daemon.path}2"]')
    )
    daemon.run()
    spoil(daemon)
    status = daemon.command("status")
    assert status.returncode == 0, status
    assert f"running: pid {daemon.pid}, up " in status.stdout
    assert daemon.command("metrics").returncode == 0
    stopped = daemon.command("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    with contextlib.suppress(FileNotFoundError):
        assert daemon.command("stop").returncode in (1, 3)


def test_two_daemons_of_a_file_that_is_gone_are_named_and_not_guessed(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(CONFIG).run()
    second = f"{daemon.folder}/second.sock"
    other = subprocess.Popen(
        [COMMAND, "run", "--config", str(daemon.config), "--socket", second],
        env=daemon.environment,
    )
    try:
        until(lambda: daemon.command("status", "--socket", second).returncode == 0)
        daemon.config.unlink()
        stopped = daemon.command("stop")
        assert stopped.returncode == 1
        assert "--socket PATH names the daemon; these read this file: " in stopped.stderr
        assert daemon.path in stopped.stderr
        assert second in stopped.stderr
        assert daemon.command("stop", "--socket", second).returncode == 0
        assert other.wait(20) == 0
        assert daemon.command("stop").returncode == 0
    finally:
        other.kill()
        other.wait()


def test_a_reload_that_would_have_no_effect_says_which_file_the_daemon_reads(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(CONFIG).run()
    other = daemon.folder / "other.toml"
    shutil.copy(daemon.config, other)
    reads = f"nothing has changed: the daemon at {daemon.path} reads {daemon.config}"
    for command in ("reload", "upgrade"):
        refused = daemon.command(command, "--config", str(other))
        assert refused.returncode == 1
        assert f"{reads}, not {other}; restart -c {other} changes that\n" in refused.stderr
        refused = daemon.command(command, "--set", "workers=2")
        assert refused.returncode == 1
        assert f"{reads}, and {command} takes no --set; put workers=2 into" in refused.stderr
    link = daemon.folder / "link.toml"
    link.symlink_to(daemon.config)
    assert daemon.command("reload", "--config", str(link)).returncode == 0
    assert daemon.status()["generation"] == 2
