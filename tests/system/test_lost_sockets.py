"""What stands at a daemon's paths stays the daemon's, whoever removes or replaces it."""

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Daemon, NewDaemon, halt
from plain_client import connect, read_to_end, request, until

SUFFIXES = ("", ".ctl", ".pid", ".lock")


def is_whole(daemon: Daemon) -> bool:
    """Whether clients and the command find the daemon, and nobody else gets its lock."""
    try:
        status = daemon.status()
        reply = daemon.call("test", "ping")
    except OSError:
        return False
    named = Path(f"{daemon.path}.pid").read_text() if os.path.exists(f"{daemon.path}.pid") else ""
    second = daemon.command("start")
    return (
        not status["unreachable"]
        and not any(each["problem"] for each in status["lost"])
        and reply["message"] == "pong"
        and named == f"{status['pid']}\n"
        and "in use" in second.stderr
        and "lock file" not in second.stderr
    )


@contextlib.contextmanager
def halted(daemon: Daemon) -> Iterator[None]:
    """While the master is stopped, which would make anew what is removed."""
    master = daemon.pid
    halt(master)
    try:
        yield
    finally:
        os.kill(master, signal.SIGCONT)


@pytest.fixture
def daemon_at_two_paths(new_daemon: NewDaemon) -> Daemon:
    daemon = new_daemon("workers = 2")
    both = f'["{daemon.path}", "{daemon.folder}/e.sock"]'
    daemon.replace_config(daemon.config.read_text().replace(f'["{daemon.path}"]', both))
    return daemon.run()


def test_each_path_serves_the_command(daemon_at_two_paths: Daemon) -> None:
    daemon = daemon_at_two_paths
    other = f"{daemon.folder}/e.sock"
    status = daemon.command("status", "--socket", other, "--json")
    assert json.loads(status.stdout)["pid"] == daemon.pid
    # A client that is connected already is answered after its path was given up.
    with connect(f"{daemon.path}.ctl") as early:
        daemon.replace_config(daemon.config.read_text().replace(f'"{daemon.path}", ', ""))
        done = daemon.command("reload", "--socket", other)
        assert done.returncode == 0, done
        early.sendall(b'{"command": "status"}\n')
        assert b'"pid"' in early.recv(65536)
    assert not Path(f"{daemon.path}.ctl").exists()
    stopped = daemon.command("stop", "--socket", other)
    assert stopped.returncode == 0, stopped
    assert not Path(f"{other}.ctl").exists()


def test_files_that_are_removed_or_replaced_are_made_anew(daemon: Daemon) -> None:
    paths = [f"{daemon.path}{suffix}" for suffix in SUFFIXES]
    for path in paths:
        os.unlink(path)
    until(lambda: is_whole(daemon))
    with contextlib.ExitStack() as strangers:
        with halted(daemon):
            for path in paths:
                os.unlink(path)
                if path.endswith((".pid", ".lock")):
                    Path(path).write_text("1\n")
                else:
                    stranger = strangers.enter_context(socket.socket(socket.AF_UNIX))
                    stranger.bind(path)
                    stranger.listen()
        told = f"{paths[0]} (was replaced)"
        until(lambda: told in daemon.log())
        until(lambda: is_whole(daemon))
    lost = {each["path"]: each["times"] for each in daemon.status()["lost"]}
    assert lost == dict.fromkeys(paths, 2)
    shown = daemon.command("status").stdout
    assert f"listening on {daemon.path}\n" in shown
    for path in paths:
        assert f"{path} (was removed)" in daemon.log()
        assert f"{path} was replaced, and made anew, " in shown


def test_a_folder_that_is_removed_is_made_anew(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    folder = daemon.folder / "run"
    folder.mkdir(0o750)
    os.chmod(folder, 0o750)
    before, daemon.path = daemon.path, str(folder / "d.sock")
    daemon.replace_config(daemon.config.read_text().replace(before, daemon.path))
    daemon.run()
    for make_again in (False, True):
        with halted(daemon):
            shutil.rmtree(folder)
            if make_again:
                folder.mkdir(0o750)
        until(lambda: is_whole(daemon))
    assert folder.stat().st_mode & 0o777 == 0o750
    assert daemon.log().count("Made anew: ") == 2


def test_what_cannot_be_made_anew_is_told_once_and_tried_again(daemon: Daemon) -> None:
    with halted(daemon):
        os.unlink(daemon.path)
        Path(daemon.path).write_text("a file of somebody's")
    (loss,) = until(lambda: daemon.status()["lost"])
    assert daemon.status()["unreachable"] == [daemon.path]
    assert "exists and is not a socket" in loss["problem"]
    shown = daemon.command("status").stdout
    assert "listening on no path\n" in shown
    assert f"{daemon.path} was replaced, and cannot be made anew: " in shown
    # A reload does not mind, nor does it change that; and it is not told a second time.
    assert daemon.command("reload").returncode == 0
    assert daemon.log().count("cannot be made anew") == 1
    os.unlink(daemon.path)
    until(lambda: is_whole(daemon))


def test_workers_of_any_origin_accept_at_the_new_socket_and_those_before(
    new_daemon: NewDaemon,
) -> None:
    """Clients that wait in the old socket's queue are served, and so are those at the new one.

    By workers that have run all along, by one that a template forks later, by those of a reload and
    of a new master.
    """
    daemon = new_daemon(
        "workers = 1\nlimits.max_connections = 2\nlimits.max_requests_per_minute = 0"
    ).run()

    def serves() -> None:
        until(lambda: os.path.exists(daemon.path) and not daemon.status()["unreachable"])
        assert daemon.call("test", "echo", [1]) == [1]

    busy = connect(daemon.path)  # these two take all connections
    idle = connect(daemon.path)
    until(lambda: daemon.status()["gate"]["connections"] == 2)
    waiting = [connect(daemon.path) for _ in range(3)]
    for each in waiting:
        each.sendall(json.dumps(request("test", "ping")).encode())
    os.unlink(daemon.path)
    until(lambda: "Made anew" in daemon.log())
    late = connect(daemon.path)
    late.sendall(json.dumps(request("test", "ping")).encode())
    busy.close()
    idle.close()
    for each in (*waiting, late):
        assert json.loads(read_to_end(each))["success"]
        each.close()
    serves()
    os.kill(daemon.workers()[0], 9)
    serves()
    assert daemon.command("reload").returncode == 0
    serves()
    # The former socket passes to the new master, and so does the right to bind the next one.
    os.unlink(daemon.path)
    until(lambda: daemon.log().count("Made anew") == 2)
    assert daemon.command("upgrade").returncode == 0
    serves()
    os.unlink(daemon.path)
    serves()

    # Nothing piles up: a worker has as many listening sockets as there are.
    def listening() -> list[str]:
        sockets = psutil.Process(daemon.workers()[0]).net_connections("unix")
        return [str(each.laddr) for each in sockets if str(each.laddr) == daemon.path]

    until(lambda: len(listening()) == 1)


def test_no_second_daemon_comes_up_where_the_files_of_the_first_are_gone(
    new_daemon: NewDaemon,
) -> None:
    """Its master is stopped, so that it cannot make them anew before the second one looks."""
    daemon = new_daemon("workers = 1").run()
    with halted(daemon):
        for suffix in SUFFIXES:
            os.unlink(f"{daemon.path}{suffix}")
        second = daemon.command("start")
        assert second.returncode == 1
        assert "in use by a running cpanbridged" in second.stderr
    until(lambda: is_whole(daemon))


def test_a_child_that_a_module_leaves_keeps_no_socket_open(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1").run()
    os.unlink(daemon.path)
    until(lambda: is_whole(daemon))
    child = psutil.Process(daemon.call("probe", "leave_a_child", [60]))
    try:
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(60) == 0
        assert child.is_running()
        bound = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
        assert [line for line in bound if line.endswith(f" {daemon.path}")] == []
    finally:
        child.kill()
