"""What a host can do to a daemon: it goes on, and says what happened."""

import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, read_to_end, until

PROBE = Path(__file__).parents[1] / "modules" / "probe.py"


def test_a_segfault_is_traced_in_the_log_and_costs_its_own_worker_only(
    shared_daemon: Daemon,
) -> None:
    daemon = shared_daemon
    before = set(daemon.workers())
    with Framed(daemon.path) as client:
        client.send("probe", "segfault", perl_caller="import.pl")
        assert read_to_end(client.socket) == b""
    until(lambda: "died: killed by signal 11 (SIGSEGV); replacing it" in daemon.log())
    assert f"; it ran probe.segfault for import.pl (pid {os.getpid()})\n" in daemon.log()
    assert "Fatal Python error: Segmentation fault" in daemon.log()
    assert f'File "{PROBE}"' in daemon.log()
    assert "in segfault" in daemon.log()
    until(lambda: len(daemon.workers()) == 2)
    assert len(before & set(daemon.workers())) == 1
    assert daemon.call("test", "ping")["message"] == "pong"


def test_a_module_that_ends_the_process_is_replaced(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    with Framed(daemon.path) as client:
        client.send("probe", "exit_at_once", [7])
        assert read_to_end(client.socket) == b""
    until(lambda: "died: exit status 7; replacing it" in daemon.log())
    assert daemon.call("test", "ping")["message"] == "pong"


def test_an_exception_in_a_modules_thread_is_logged_and_ends_nothing(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    before = sorted(daemon.workers())
    assert daemon.call("probe", "fail_in_a_thread") is None
    assert "ValueError: in a thread" in daemon.log()
    assert sorted(daemon.workers()) == before


def test_health_warns_when_workers_die_often(daemon: Daemon) -> None:
    def check() -> dict[str, object]:
        found: dict[str, object] = daemon.call("system", "health")["checks"]["workers"]
        return found

    for count in range(3):
        assert check()["status"] == "pass" or count
        with Framed(daemon.path) as client:
            client.send("probe", "exit_at_once", [1])
            assert read_to_end(client.socket) == b""
        until(lambda count=count: daemon.log().count("died: exit status 1") == count + 1)
    until(lambda: len(daemon.workers()) == 2)
    until(lambda: check()["status"] == "warn")
    assert check()["message"] == "3 workers died in the last five minutes; the log says of what"


def test_a_full_disk_under_the_log_costs_lines_and_nothing_else(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    daemon.config.write_text(
        daemon.config.read_text().replace(f'"{daemon.log_file}"', '"/dev/full"')
    )
    assert daemon.command("start").returncode == 0
    for number in range(10):
        assert daemon.call("test", "echo", [number]) == [number]
    assert not one_shot(daemon.path, "probe", "say", "lost")["success"]  # print() itself fails
    for pid in daemon.workers():
        os.kill(pid, signal.SIGKILL)
    assert daemon.call("test", "ping")["message"] == "pong"
    daemon.reload()
    daemon.upgrade()
    assert daemon.call("test", "ping")["message"] == "pong"
    daemon.end()


@pytest.mark.parametrize("change", ["reload", "upgrade"])
def test_a_daemon_starts_at_once_after_a_masters_death_whatever_its_workers_still_run(
    daemon: Daemon, change: str
) -> None:
    assert daemon.command(change).returncode == 0
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [5, str(event)])
        until(event.exists)
        os.kill(daemon.pid, signal.SIGKILL)
        started = daemon.command("start")
        assert started.returncode == 0, started.stderr
        assert daemon.call("test", "ping")["message"] == "pong"
        assert call.result()["success"]
    daemon.end()


def free_descriptor(pid: int) -> int:
    """The limit under which it can open nothing more: its lowest descriptor that is free.

    But for those that are taken for a moment only, as files of /proc are, to look at memory.
    """
    looks = []
    for _ in range(30):
        taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        looks.append(min(set(range(len(taken) + 1)) - taken))
        time.sleep(0.01)
    return min(looks)


def test_without_descriptors_workers_let_clients_wait_and_say_so(daemon: Daemon) -> None:
    limits = {}
    for pid in daemon.workers():
        limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free_descriptor(pid), limits[pid][1]))
    with connect(daemon.path) as client, Framed(daemon.path) as another:
        client.sendall(b'{"module": "test", "function": "ping"}')
        another.send("test", "ping")
        until(lambda: "Cannot accept clients, they wait: Too many open files" in daemon.log())
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        assert b"pong" in client.recv(65536)
        assert another.receive() is not None


def test_without_descriptors_the_master_waits_to_fork_and_is_asked_later(daemon: Daemon) -> None:
    limit = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free_descriptor(daemon.pid), limit[1]))
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: "cannot fork: Too many open files" in daemon.log())
    assert daemon.call("test", "ping")["message"] == "pong"
    with connect(f"{daemon.path}.ctl") as connection:
        connection.sendall(b'{"command": "status"}\n')
        until(lambda: "The control socket cannot accept: Too many open files" in daemon.log())
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limit)
        assert b'"state":"running"' in connection.recv(65536)
    until(lambda: len(daemon.workers()) == 2, 30)
    daemon.reload()


def test_a_reload_and_an_upgrade_without_descriptors_change_nothing(daemon: Daemon) -> None:
    before = sorted(daemon.workers())
    limit = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free_descriptor(daemon.pid), limit[1]))
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: "Not reloaded, nothing has changed: " in daemon.log())
    os.kill(daemon.pid, signal.SIGUSR2)
    until(lambda: "Not upgraded, nothing has changed: " in daemon.log())
    assert sorted(daemon.workers()) == before
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limit)
    daemon.upgrade()
    assert daemon.call("test", "ping")["message"] == "pong"


def test_rotation_by_rename_loses_no_line(daemon: Daemon) -> None:
    lines = 300
    over = False

    def rotate() -> int:
        count = 0
        while not over:
            count += 1
            os.rename(daemon.log_file, f"{daemon.log_file}.{count}")
            os.kill(daemon.pid, signal.SIGUSR1)
            until(daemon.log_file.exists)
        return count

    with ThreadPoolExecutor(5) as pool:
        rotations = pool.submit(rotate)
        list(pool.map(lambda number: daemon.call("probe", "log_line", [number]), range(lines)))
        over = True
        assert rotations.result() > 1
    files = [daemon.log_file, *daemon.folder.glob("d.log.*")]
    found = [
        int(line.removeprefix("line "))
        for file in files
        for line in file.read_text().splitlines()
        if line.startswith("line ")
    ]
    assert sorted(found) == list(range(lines))
