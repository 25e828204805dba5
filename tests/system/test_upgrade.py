"""Upgrade: a new master of the code that is on disk now, and no client notices."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, Daemon, NewDaemon, daemons
from plain_client import Framed, connect, one_shot, until

CONFIG = "workers = 2\nlimits.max_requests_per_minute = 0"


def upgrade(daemon: Daemon) -> int:
    """Have it upgraded; the new master's pid."""
    before = daemon.pid
    daemon.upgrade()
    assert daemon.pid != before
    return daemon.pid


def refused_upgrade(daemon: Daemon) -> str:
    """Have it upgraded, which cannot be; the reason."""
    before = daemon.pid
    done = daemon.command("upgrade")
    assert (done.returncode, done.stdout) == (1, ""), done
    assert daemon.pid == before
    prefix = "cpanbridged: not upgraded, nothing has changed: "
    assert done.stderr.startswith(prefix)
    return done.stderr.removeprefix(prefix)


def new_patchable_daemon(new_daemon: NewDaemon) -> Daemon:
    daemon = new_daemon(CONFIG)
    daemon.will_run("")
    return daemon


@pytest.fixture(scope="module")
def patchable_daemon() -> Iterator[Daemon]:
    """One for tests that leave it as it was, but for its master's pid."""
    with daemons() as make:
        yield new_patchable_daemon(make).run()


def test_the_new_master_is_of_the_code_on_disk_and_has_the_counts(new_daemon: NewDaemon) -> None:
    daemon = new_patchable_daemon(new_daemon).run()
    for number in range(5):
        daemon.call("test", "echo", [number])
    old = daemon.workers()
    started = daemon.status()["uptime_seconds"]
    daemon.will_run(
        "from cpanbridge.supervisor import version\nversion.__version__ = '9.8.7'\n",
    )
    done = daemon.command("upgrade")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Upgraded: pid {daemon.pid}\n", "")
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    found = daemon.status()
    assert found["version"] == "9.8.7"
    assert found["generation"] == 2
    assert found["gate"]["admitted_last_minute"] == 5
    assert found["uptime_seconds"] > started
    assert daemon.metrics()["performance_metrics"]["total_requests"] == 5
    assert daemon.call("test", "ping")["daemon_version"] == "9.8.7"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old))
    daemon.reload()
    daemon.end()
    assert not any(Path(f"{daemon.path}{suffix}").exists() for suffix in ("", ".pid", ".ctl"))


def test_a_signal_upgrades_as_well_and_no_descriptor_is_left_each_time(daemon: Daemon) -> None:
    descriptors = []
    for _ in range(3):
        before = daemon.pid
        os.kill(before, signal.SIGUSR2)
        until(lambda before=before: daemon.pid != before)
        assert daemon.call("test", "echo", [1]) == [1]
        until(lambda: daemon.status()["state"] == "running")
        until(lambda: len(daemon.status()["workers"]) == 2)
        descriptors.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
    assert descriptors[-1] <= descriptors[0]
    assert daemon.stop() == 0


def test_a_new_master_that_cannot_write_its_pid_leaves_the_old_one(daemon: Daemon) -> None:
    in_the_way = Path(f"{daemon.path}.pid.new")
    in_the_way.mkdir()
    before = sorted(daemon.workers())
    assert "d.sock.pid: cannot be written" in refused_upgrade(daemon)
    assert daemon.call("test", "echo", [1]) == [1]
    until(lambda: sorted(daemon.workers()) == before)
    daemon.reload()
    in_the_way.rmdir()
    upgrade(daemon)
    assert daemon.stop() == 0


def broken_file(daemon: Daemon) -> str:
    daemon.config.write_text("workers = [\n")
    return "not valid TOML"


def broken_module(daemon: Daemon) -> str:
    folder = daemon.folder / "helpers"
    folder.mkdir(exist_ok=True)
    (folder / "bad.py").write_text("def broken(:")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{folder}"')
    return "SyntaxError"


def broken_code(daemon: Daemon) -> str:
    daemon.will_run("import os\nos._exit(9)\n")
    return "the new master ended: exit status 9"


def another_layout(daemon: Daemon) -> str:
    daemon.will_run("from cpanbridge.supervisor.memory import layout\nlayout.LAYOUT = -1")
    return "cannot take the running one's memory over"


@pytest.mark.parametrize("spoil", [broken_file, broken_module, broken_code, another_layout])
def test_an_upgrade_that_cannot_be_changes_nothing_and_says_why(
    patchable_daemon: Daemon, spoil: Callable[[Daemon], str]
) -> None:
    daemon = patchable_daemon
    before = sorted(daemon.workers())
    config = daemon.config.read_text()
    began = len(daemon.log())
    said = spoil(daemon)
    with Framed(daemon.path) as kept:
        assert kept.call("test", "ping") is not None
        if spoil is broken_file:
            os.kill(daemon.pid, signal.SIGUSR2)
            until(lambda: "Not upgraded, nothing has changed: " in daemon.log()[began:])
            assert said in daemon.log()[began:]
        elif spoil is broken_code:
            os.kill(daemon.pid, signal.SIGUSR2)  # the command is of the broken code as well
            until(lambda: f"Not upgraded, nothing has changed: {said}" in daemon.log()[began:])
        else:
            assert said in refused_upgrade(daemon)
        assert kept.call("test", "ping") is not None
    until(lambda: sorted(daemon.workers()) == before)
    assert daemon.call("test", "echo", [1]) == [1]
    # It can be upgraded, once what was wrong has been put right.
    daemon.config.write_text(config)
    daemon.will_run("")
    upgrade(daemon)
    until(lambda: len(daemon.status()["workers"]) == 2)


def hanging_upgrade(daemon: Daemon) -> int:
    """Begin an upgrade whose workers boot until `let_boot` or `let_fail`; the new master's pid."""
    event, _ = hanging_module(daemon)
    os.kill(daemon.pid, signal.SIGUSR2)
    until(event.exists)
    return new_master(daemon)


def hanging_module(daemon: Daemon) -> tuple[Path, Path]:
    """Have the next workers boot until the second file is there; they make the first when they do.

    They run what is in it.
    """
    folder = daemon.folder / "helpers"
    folder.mkdir()
    event, go = daemon.folder / "hangs", daemon.folder / "go"
    (folder / "slow.py").write_text(
        f"import os, time\nopen({str(event)!r}, 'w')\n"
        f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\n"
        f"exec(open({str(go)!r}).read())\n"
    )
    daemon.write_config(f'{CONFIG}\n[[module_dirs]]\npath = "{folder}"')
    return event, go


def let_boot(daemon: Daemon) -> None:
    """Let the workers of a hanging upgrade boot."""
    (daemon.folder / "go").touch()


def let_fail(daemon: Daemon) -> None:
    """Let them fail at that."""
    new = daemon.folder / "go.new"
    new.write_text("raise RuntimeError('spoilt')\n")
    new.replace(daemon.folder / "go")


def orphaned_upgrade(daemon: Daemon) -> int:
    """Begin an upgrade as `hanging_upgrade`, and kill the old master; the new one's pid."""
    new = hanging_upgrade(daemon)
    os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.wait()
    until(lambda: daemon.pid == new)
    return new


def test_a_new_master_that_is_killed_leaves_the_old_one(daemon: Daemon) -> None:
    old = daemon.pid
    os.kill(hanging_upgrade(daemon), signal.SIGKILL)
    until(lambda: "the new master ended: killed by signal 9" in daemon.log())
    assert daemon.pid == old
    for number in range(20):
        assert daemon.call("test", "echo", [number]) == [number]
    until(lambda: len(daemon.workers()) == 2)
    assert daemon.stop() == 0


def lives(pid: int) -> bool:
    """Whether it is more than what its parent has not waited for yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def new_master(daemon: Daemon) -> int:
    """The pid of the last master that an upgrade has started."""
    return int(daemon.log().rpartition("the new master is pid ")[2].split()[0])


def test_a_refused_new_master_takes_no_room_from_workers_that_came_after_it(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_patchable_daemon(new_daemon).run()
    config = daemon.config.read_text()
    # It stops after its refusal, before it has waited for the workers that it kills.
    daemon.will_run(
        "import os, signal\n"
        "from cpanbridge.supervisor.lifecycle.upgrade import Predecessor\n"
        "refuse = Predecessor.refuse\n"
        "def refuse_and_stop(predecessor, reason):\n"
        "    refuse(predecessor, reason)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "Predecessor.refuse = refuse_and_stop\n"
    )
    said = broken_module(daemon)
    assert said in refused_upgrade(daemon)
    daemon.replace_config(config)
    daemon.reload()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        with contextlib.suppress(ProcessLookupError):
            os.kill(new_master(daemon), signal.SIGCONT)
        until(lambda: not lives(new_master(daemon)))
        assert daemon.status()["gate"]["running"] == 1
        os.kill(int(event.read_text()), signal.SIGKILL)
        assert isinstance(call.exception(20), ConnectionError | ValueError)
    assert daemon.stop() == 0


def test_no_slot_is_used_while_a_worker_of_a_killed_new_master_still_ends(daemon: Daemon) -> None:
    config = daemon.config.read_text()
    folder = daemon.folder / "helpers"
    folder.mkdir()
    once = daemon.folder / "once"
    # One worker boots, and takes its time to leave; the other one hangs.
    (folder / "slow.py").write_text(
        f"import os, time\n"
        f"try:\n    os.close(os.open({str(once)!r}, os.O_CREAT | os.O_EXCL))\n"
        f"except FileExistsError:\n    time.sleep(600)\n"
        f"def shutdown():\n    time.sleep(600)\n"
    )
    daemon.write_config(f'{CONFIG}\n[[module_dirs]]\npath = "{folder}"\npreload = false')
    began = len(daemon.log())
    os.kill(daemon.pid, signal.SIGUSR2)
    ready = until(lambda: re.search(r"Worker (\d+) ready \(pid (\d+)\)", daemon.log()[began:]))
    slot, pid = int(ready[1]), int(ready[2])
    os.kill(new_master(daemon), signal.SIGKILL)
    until(lambda: "the new master ended: killed by signal 9" in daemon.log())
    daemon.replace_config(config)
    daemon.reload()
    known = [each for each in daemon.status()["workers"] if "worker" in each]
    workers = {each["worker"]: each["pid"] for each in known}
    assert workers.get(slot, pid) == pid or not lives(pid)
    until(lambda: not lives(pid))
    assert daemon.call("test", "echo", [1]) == [1]
    assert daemon.stop() == 0


def test_an_old_master_that_is_killed_is_followed_by_the_new_one_at_once(daemon: Daemon) -> None:
    first, second = daemon.workers()
    new = orphaned_upgrade(daemon)
    found = daemon.status()
    assert (found["state"], found["pid"], found["generation"]) == ("upgrading", new, 1)
    started = daemon.command("start")
    assert started.returncode == 1
    assert f"in use by a running cpanbridged (pid {new})" in started.stderr
    upgraded = daemon.command("upgrade")
    assert "not upgraded, nothing has changed: the daemon is upgrading" in upgraded.stderr
    os.kill(first, signal.SIGKILL)
    until(lambda: f"(pid {first}) has left" in daemon.log())
    for number in range(5):
        assert daemon.call("test", "echo", [number]) == [number]
    assert daemon.call("probe", "worker_pid") == second
    let_boot(daemon)
    until(lambda: daemon.status()["state"] == "running")
    found = daemon.status()
    assert (found["pid"], found["generation"]) == (new, 2)
    assert daemon.call("test", "echo", [2]) == [2]
    until(lambda: len(daemon.status()["workers"]) == 2)
    daemon.reload()
    daemon.end()
    assert not any(Path(f"{daemon.path}{suffix}").exists() for suffix in ("", ".pid", ".ctl"))


def test_a_new_master_without_an_old_one_stops_well_when_it_cannot_boot(daemon: Daemon) -> None:
    config = daemon.config.read_text()
    old = daemon.workers()
    event, end = daemon.folder / "runs", daemon.folder / "end"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "run_until", [str(end), str(event)])
        until(event.exists)
        new = orphaned_upgrade(daemon)
        let_fail(daemon)
        until(lambda: "the old master is dead and this one cannot take its place" in daemon.log())
        end.touch()
        assert call.result()["success"]
    until(lambda: not any(lives(pid) for pid in (new, *old)), 60)
    assert "RuntimeError: spoilt" in daemon.log()
    assert not any(Path(f"{daemon.path}{suffix}").exists() for suffix in ("", ".pid", ".ctl"))
    daemon.replace_config(config)
    started = daemon.command("start")
    assert (started.returncode, started.stderr) == (0, "")
    assert daemon.call("test", "echo", [1]) == [1]
    daemon.end()


def test_a_new_master_without_an_old_one_can_be_stopped_while_it_boots(daemon: Daemon) -> None:
    old = daemon.workers()
    new = orphaned_upgrade(daemon)
    stopped = daemon.command("stop")
    assert (stopped.returncode, stopped.stdout) == (0, f"Stopped: pid {new}\n")
    assert not any(lives(pid) for pid in (new, *old))
    assert not any(Path(f"{daemon.path}{suffix}").exists() for suffix in ("", ".pid", ".ctl"))


def test_a_reload_puts_right_what_a_new_master_without_an_old_one_hangs_at(daemon: Daemon) -> None:
    config = daemon.config.read_text()
    new = orphaned_upgrade(daemon)
    daemon.replace_config(config)
    done = daemon.command("reload")
    assert (done.returncode, done.stderr) == (0, "")
    found = daemon.status()
    assert (found["state"], found["pid"], found["generation"]) == ("running", new, 3)
    assert daemon.call("test", "echo", [1]) == [1]
    daemon.end()


def test_an_upgrade_whose_old_master_is_killed_does_not_say_that_nothing_changed(
    daemon: Daemon,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        event, go = hanging_module(daemon)
        command = pool.submit(daemon.command, "upgrade")
        until(event.exists)
        os.kill(daemon.pid, signal.SIGKILL)
        done = command.result()
        go.touch()
    assert done.returncode == 1
    assert "not upgraded, as far as is known: the master hung up" in done.stderr
    until(lambda: daemon.pid == new_master(daemon))
    until(lambda: daemon.status()["state"] == "running")
    daemon.end()


def test_a_stop_during_an_upgrade_stops_both(daemon: Daemon) -> None:
    new = hanging_upgrade(daemon)
    assert daemon.stop() == 0
    until(lambda: not Path(f"/proc/{new}").exists())
    assert not Path(daemon.path).exists()
    assert "Not upgraded, nothing has changed: the daemon is stopping" in daemon.log()


def test_neither_a_reload_nor_another_upgrade_gets_in_between(daemon: Daemon) -> None:
    hanging_upgrade(daemon)
    for command in ("reload", "upgrade"):
        done = daemon.command(command)
        assert done.returncode == 1
        assert "an upgrade is under way" in done.stderr
    let_boot(daemon)
    until(lambda: "takes over" in daemon.log())
    until(lambda: daemon.status()["state"] == "running")


def test_calls_and_kept_connections_of_old_workers_end_well(daemon: Daemon) -> None:
    event, end = daemon.folder / "runs", daemon.folder / "end"
    body = json.dumps({"module": "test", "function": "echo", "params": [1]}).encode()
    with ThreadPoolExecutor(1) as pool, Framed(daemon.path) as kept, connect(daemon.path) as begun:
        assert kept.call("test", "ping") is not None
        begun.sendall(body[:10])
        call = pool.submit(one_shot, daemon.path, "probe", "run_until", [str(end), str(event)])
        until(event.exists)
        until(lambda: daemon.metrics()["gate"]["connections"] == 4)
        upgrade(daemon)
        assert not call.done()
        assert kept.receive() is None
        begun.sendall(body[10:])
        begun.settimeout(20)
        assert json.loads(begun.recv(65536))["result"] == [1]
        assert daemon.status()["gate"]["running"] == 1
        end.touch()
        assert call.result()["success"]
    until(lambda: len(daemon.status()["workers"]) == 2)
    assert daemon.status()["gate"]["running"] == daemon.status()["gate"]["connections"] == 0


def test_an_old_worker_that_is_killed_after_an_upgrade_leaks_no_room(daemon: Daemon) -> None:
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        upgrade(daemon)
        assert daemon.status()["gate"]["running"] == 1
        os.kill(int(event.read_text()), signal.SIGKILL)
        assert isinstance(call.exception(20), ConnectionError | ValueError)
    until(lambda: daemon.status()["gate"]["running"] == 0)
    until(lambda: len(daemon.status()["workers"]) == 2)


def test_workers_of_the_old_master_are_watched_by_the_new_one(daemon: Daemon) -> None:
    """Their memory counts, though they are not its children."""
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        upgrade(daemon)
        pid = int(event.read_text())

        def memory() -> float:
            (old,) = (each for each in daemon.metrics()["workers"] if each["pid"] == pid)
            return float(old["memory_mb"])

        until(lambda: memory() > 1)
        until(lambda: daemon.metrics()["system_stats"]["processes"] == 5)
        os.kill(pid, signal.SIGKILL)
        assert isinstance(call.exception(20), ConnectionError | ValueError)


# As process 1 of a container, it is the parent of what others leave behind.
OUTER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
subprocess.Popen(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:  # all have ended
    pass
"""


def test_shutdown_in_a_worker_of_the_old_master_stops_the_daemon_and_signals_no_stranger(
    new_daemon: NewDaemon,
) -> None:
    helpers = Path(__file__).parents[1] / "helpers"
    daemon = new_daemon(f'workers = 1\npython_path = ["{helpers}"]')
    table = '[modules.c]\nimport = "keeper"\nfunctions = "*"\naffinity = "client"'
    daemon.config.write_text(f"{daemon.config.read_text()}{table}\n")
    run = [COMMAND, "run", "--config", str(daemon.config)]
    outer = subprocess.Popen([sys.executable, "-c", OUTER, *run], stdin=subprocess.DEVNULL)
    try:
        until(lambda: " ready: pid " in daemon.log(), 60)
        with Framed(daemon.path) as client:
            kept = client.call("c", "keep", [str(daemon.folder / "note"), "x"])
            assert kept is not None
            assert kept["success"], kept
            new = upgrade(daemon)
            answer = client.call("system", "shutdown")
            assert answer is not None
            assert answer["success"], answer
        assert outer.wait(60) == 0
        assert not psutil.pid_exists(new)
        assert "Stopping: running requests" in daemon.log()
    finally:
        outer.kill()
        outer.wait()
