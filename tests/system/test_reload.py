"""Reload: all of a changed configuration or nothing of it, and no client notices."""

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, until


def reload(daemon: Daemon) -> None:
    """Have it reload, and wait until the new generation serves."""
    before = daemon.log().count("Reloaded: ")
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: daemon.log().count("Reloaded: ") > before, what="the reload\n" + daemon.log())


def refused_reload(daemon: Daemon) -> str:
    """Have it reload what cannot be, and return the reason that is logged."""
    before = daemon.log().count("Not reloaded")
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: daemon.log().count("Not reloaded") > before, what="the end of the reload")
    return daemon.log().rpartition("Not reloaded, nothing has changed: ")[2].splitlines()[0]


def helpers(daemon: Daemon, **files: str) -> str:
    """Write a folder of modules; the table that exposes them."""
    folder = daemon.folder / "helpers"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return f'[[module_dirs]]\npath = "{folder}"\naffinity = "none"'


def test_a_reload_imports_modules_anew_in_new_workers(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    table = helpers(daemon, version="def number():\n    return 1\n")
    daemon.write_config(f"workers = 2\n{table}")
    daemon.run()
    old = daemon.workers()
    assert daemon.call("version", "number") == 1
    helpers(daemon, version="def number():\n    return 22\n", other="def new():\n    return 3\n")
    reload(daemon)
    until(lambda: not set(old) & set(daemon.workers()))
    assert daemon.call("version", "number") == 22
    assert daemon.call("other", "new") == 3
    assert len(daemon.workers()) == 2


def test_a_reload_sees_a_change_that_has_neither_another_size_nor_another_time(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(PYTHONDONTWRITEBYTECODE="")
    table = helpers(daemon, version="def number():\n    return 1\n")
    daemon.write_config(f"workers = 2\n{table}")
    file = daemon.folder / "helpers" / "version.py"
    times = file.stat()
    daemon.run()
    assert daemon.call("version", "number") == 1
    helpers(daemon, version="def number():\n    return 2\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    reload(daemon)
    assert daemon.call("version", "number") == 2
    assert os.listdir(file.parent) == ["version.py"]  # nothing of ours is left there


def broken_file(daemon: Daemon) -> str:
    daemon.config.write_text("workers = [\n")
    return "not valid TOML"


def unknown_key(daemon: Daemon) -> str:
    daemon.write_config("colour = 1")
    return "colour: unknown key"


def syntax_error(daemon: Daemon) -> str:
    daemon.write_config(f"workers = 2\n{helpers(daemon, bad='def broken(:')}")
    return "SyntaxError"


def crash_at_import(daemon: Daemon) -> str:
    text = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    daemon.write_config(f"workers = 2\n{helpers(daemon, bad=text)}")
    return "bad.py: its import ended the process: killed by signal 11"


def no_log(daemon: Daemon) -> str:
    daemon.write_config(f'workers = 2\nsecurity_log = "{daemon.folder}/none/s.log"')
    return "cannot be opened for the log"


def too_many_workers(daemon: Daemon) -> str:
    daemon.write_config("workers = 200")
    return "workers = 200: the running daemon has room for 32"


def another_programs_path(daemon: Daemon) -> str:
    path = daemon.folder / "file"
    path.write_text("precious")
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace(f'"{daemon.path}"', f'"{daemon.path}", "{path}"'))
    return "exists and is not a socket"


@pytest.mark.parametrize(
    "spoil",
    [
        broken_file,
        unknown_key,
        syntax_error,
        crash_at_import,
        no_log,
        too_many_workers,
        another_programs_path,
    ],
)
def test_a_reload_that_cannot_be_changes_nothing_and_says_why(
    shared_daemon: Daemon, spoil: Callable[[Daemon], str]
) -> None:
    daemon = shared_daemon
    before = sorted(daemon.workers())
    said = spoil(daemon)
    with Framed(daemon.path) as kept:
        assert kept.call("test", "echo", True) is not None
        assert said in refused_reload(daemon)
        until(lambda: sorted(daemon.workers()) == before)
        assert kept.call("test", "echo", True) is not None
    assert daemon.call("test", "echo", [1]) == [1]
    assert not Path(f"{daemon.folder}/file.lock").exists() or spoil is another_programs_path
    daemon.write_config("workers = 2")
    reload(daemon)
    assert daemon.call("test", "echo", [2]) == [2]
    until(lambda: len(daemon.workers()) == 2)


@pytest.mark.parametrize("preload", ["true", "false"])
def test_a_module_that_hangs_at_import_leaves_the_old_workers_and_a_later_reload_helps(
    daemon: Daemon, preload: str
) -> None:
    before = set(daemon.workers())
    event = daemon.folder / "hangs"
    text = f"import time\nopen({str(event)!r}, 'w')\ntime.sleep(600)\n"
    daemon.write_config(f"workers = 2\npreload = {preload}\n{helpers(daemon, slow=text)}")
    os.kill(daemon.pid, signal.SIGHUP)
    until(event.exists)
    assert daemon.call("test", "echo", [1]) == [1]
    if preload == "true":
        assert len(daemon.templates()) == 2
        assert before == set(daemon.workers())
    else:
        assert before < set(daemon.workers())
    helpers(daemon, slow="def now():\n    return 'quick'\n")
    reload(daemon)
    assert daemon.call("slow", "now") == "quick"
    until(lambda: len(daemon.workers()) == 2)
    assert "Another reload" in daemon.log()


def test_ten_reloads_at_once_end_with_one_generation_in_service(daemon: Daemon) -> None:
    for _ in range(10):
        os.kill(daemon.pid, signal.SIGHUP)
        time.sleep(0.02)  # signals that come together are one
    daemon.write_config("workers = 3")
    reload(daemon)

    def settled() -> bool:
        generations = {each["generation"] for each in daemon.metrics()["workers"] if each["pid"]}
        return len(daemon.workers()) == 3 and len(generations) == 1

    until(settled)


def test_a_stop_during_a_reload_stops(daemon: Daemon) -> None:
    event = daemon.folder / "hangs"
    text = f"import time\nopen({str(event)!r}, 'w')\ntime.sleep(600)\n"
    daemon.write_config(f"workers = 2\n{helpers(daemon, slow=text)}")
    os.kill(daemon.pid, signal.SIGHUP)
    until(event.exists)
    assert daemon.stop() == 0
    assert "Not reloaded, nothing has changed: the daemon is stopping" in daemon.log()


@pytest.mark.parametrize("preload", ["true", "false"])
def test_a_killed_master_in_a_reload_leaves_nothing_that_a_start_minds(
    daemon: Daemon, preload: str
) -> None:
    event = daemon.folder / "hangs"
    text = f"import time\nopen({str(event)!r}, 'w')\ntime.sleep(3)\n"
    daemon.write_config(f"workers = 2\npreload = {preload}\n{helpers(daemon, slow=text)}")
    os.kill(daemon.pid, signal.SIGHUP)
    until(event.exists)
    count = 4 if preload == "true" else 5  # two workers and a template, and what boots
    children = until(lambda: len(pids := children_of(daemon)) == count and pids)
    assert daemon.process is not None
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    daemon.run()
    assert daemon.call("test", "echo", [1]) == [1]
    until(lambda: not any(map(runs, children)), 30, "the end of the dead master's workers")
    assert daemon.stop() == 0


def children_of(daemon: Daemon) -> list[int]:
    return [*daemon.workers(), *daemon.templates()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("preload", ["true", "false"])
def test_what_boots_for_ever_ends_with_a_killed_master(daemon: Daemon, preload: str) -> None:
    event = daemon.folder / "hangs"
    text = f"import time\nopen({str(event)!r}, 'w')\ntime.sleep(600)\n"
    daemon.write_config(f"workers = 2\npreload = {preload}\n{helpers(daemon, slow=text)}")
    os.kill(daemon.pid, signal.SIGHUP)
    count = 4 if preload == "true" else 5  # two workers and a template, and what boots
    children = until(lambda: len(pids := children_of(daemon)) == count and pids)
    until(event.exists)
    os.kill(daemon.pid, signal.SIGKILL)
    until(lambda: not any(map(runs, children)), what="the end of all processes")


def test_a_running_call_is_finished_by_the_old_worker_however_long_it_takes(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 0.5").run()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [3.0, str(event)])
        until(event.exists)
        reload(daemon)
        assert not call.done()
        assert daemon.call("probe", "worker_pid") != int(event.read_text())
        assert call.result()["success"]
    until(lambda: len(daemon.workers()) == 2)
    assert "cutting" not in daemon.log()


def test_drain_timeout_bounds_what_the_old_worker_may_take(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.drain_timeout = 0.5").run()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        reload(daemon)
        assert isinstance(call.exception(20), ConnectionError | ValueError)
    until(lambda: len(daemon.workers()) == 2)
    assert "cutting" in daemon.log()


def test_a_stop_reaches_workers_that_drain_without_a_limit(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 1").run()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        reload(daemon)
        assert daemon.stop() == 0
        assert isinstance(call.exception(20), ConnectionError | ValueError)


def test_limits_change_for_all_generations_at_once_and_the_minute_is_remembered(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_requests_per_minute = 1000").run()
    for number in range(20):
        daemon.call("test", "echo", [number])
    with Framed(daemon.path) as waits:
        daemon.write_config(
            "workers = 2\nlimits.max_requests_per_minute = 22\nlimits.max_connections = 7\n"
            "limits.max_concurrent_requests = 5"
        )
        reload(daemon)
        gate = daemon.metrics()["gate"]
        assert gate["max_requests_per_minute"] == 22
        assert gate["max_connections"] == 7
        assert gate["max_concurrent_requests"] == 5
        assert gate["admitted_last_minute"] == 21
        daemon.call("test", "echo", [22])
        waits.socket.settimeout(0.5)
        waits.socket.close()
    with connect(daemon.path) as late:
        late.sendall(json.dumps({"module": "test", "function": "echo"}).encode())
        late.settimeout(0.5)
        with pytest.raises(TimeoutError):  # the minute's 22 are used up
            late.recv(1)
        daemon.write_config("workers = 2\nlimits.max_requests_per_minute = 0")
        reload(daemon)
        late.settimeout(20)
        assert b'"success":true' in late.recv(65536)


def test_listening_paths_can_be_added_and_given_up(daemon: Daemon) -> None:
    second = f"{daemon.folder}/second.sock"
    config = daemon.config.read_text()
    daemon.config.write_text(config.replace(f'["{daemon.path}"]', json.dumps([second])))
    with daemon.held():  # a client that waits at the path that is given up
        waiting = connect(daemon.path)
        waiting.sendall(json.dumps({"module": "test", "function": "echo"}).encode())
        os.kill(daemon.pid, signal.SIGHUP)
        until(lambda: not os.path.exists(daemon.path))
        assert b'"success":true' in waiting.recv(65536)
    assert one_shot(second, "test", "echo", [1])["result"] == [1]
    until(lambda: not os.path.exists(f"{daemon.path}.pid"))
    os.kill(daemon.pid, signal.SIGHUP)  # and once more with nothing to change
    until(lambda: daemon.log().count("Reloaded: ") == 2)
    assert one_shot(second, "test", "echo", [2])["result"] == [2]
    assert daemon.stop() == 0
    assert not os.path.exists(second)


def test_mode_of_the_socket_and_number_of_workers_can_change(daemon: Daemon) -> None:
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600
    inode = os.stat(daemon.path).st_ino
    daemon.write_config('workers = 4\nsocket_mode = "0666"')
    reload(daemon)
    until(lambda: len(daemon.workers()) == 4)
    assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o666
    assert os.stat(daemon.path).st_ino == inode
    daemon.write_config("workers = 1")
    reload(daemon)
    until(lambda: len(daemon.workers()) == 1)


def test_the_log_can_move_and_change_its_form(daemon: Daemon) -> None:
    moved = daemon.folder / "moved.log"
    text = daemon.config.read_text().replace(str(daemon.log_file), str(moved))
    daemon.config.write_text('log_format = "json"\n' + text)
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: moved.exists() and "Reloaded" in moved.read_text())
    daemon.call("probe", "say", "printed by a module")
    until(lambda: "printed by a module" in moved.read_text())
    assert daemon.call("test", "echo", [1]) == [1]
    assert all(
        json.loads(line)["level"] for line in moved.read_text().splitlines() if line.startswith("{")
    )
    size = daemon.log_file.stat().st_size
    until(lambda: len(daemon.workers()) == 2)
    daemon.call("probe", "say", "again")
    assert daemon.log_file.stat().st_size <= size + 200  # the old generation's last words


def test_a_worker_that_dies_in_the_midst_of_reloads_is_replaced(daemon: Daemon) -> None:
    for _ in range(3):
        victims = daemon.workers()
        os.kill(daemon.pid, signal.SIGHUP)
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        daemon.call("test", "echo", True)
    reload(daemon)
    until(lambda: len(daemon.workers()) == 2)


def test_an_idle_framed_client_of_a_retiring_worker_is_closed(
    daemon: Daemon,
) -> None:
    with Framed(daemon.path, timeout=15) as used, Framed(daemon.path, timeout=15) as begun:
        assert used.call("test", "echo", True) is not None
        begun.socket.sendall(b"\0\0")
        until(lambda: daemon.metrics()["gate"]["connections"] == 3)
        reload(daemon)
        assert used.receive() is None
        assert begun.receive() is None


def test_a_retiring_worker_reads_and_runs_what_it_has_accepted(daemon: Daemon) -> None:
    body = json.dumps({"module": "test", "function": "echo", "params": [1]}).encode()
    with connect(daemon.path) as silent, connect(daemon.path) as begun:
        begun.sendall(body[:10])
        until(lambda: daemon.metrics()["gate"]["connections"] == 3)
        reload(daemon)
        for client, rest in ((silent, body), (begun, body[10:])):
            client.sendall(rest)
            client.settimeout(20)
            assert json.loads(client.recv(65536))["result"] == [1]
    until(lambda: len(daemon.workers()) == 2)


def test_a_one_shot_client_that_waits_for_room_in_a_retiring_worker_is_served(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_concurrent_requests = 1").run()
    event = daemon.folder / "runs"
    # Both have been accepted when the first is admitted: their requests come afterwards.
    with connect(daemon.path) as first, connect(daemon.path) as second:
        until(lambda: daemon.metrics()["gate"]["connections"] == 3)
        first.sendall(request_bytes("span", [1.5, str(event)]))
        until(event.exists)
        second.sendall(request_bytes("span", [0]))
        time.sleep(0.1)
        reload(daemon)
        for client in (first, second):
            client.settimeout(20)
            assert json.loads(client.recv(65536))["success"]


def request_bytes(function: str, params: list[object]) -> bytes:
    return json.dumps({"module": "probe", "function": function, "params": params}).encode()


# -- one worker more or fewer --


def test_ttin_adds_a_worker_and_ttou_takes_one_away(daemon: Daemon) -> None:
    before = set(daemon.workers())
    for count in (3, 4):
        os.kill(daemon.pid, signal.SIGTTIN)
        until(lambda count=count: daemon.log().count("1 worker more") == count - 2)
        until(lambda count=count: len(ready_titles(daemon)) == count)
    assert before < set(daemon.workers())
    for count in (3, 2, 1):
        os.kill(daemon.pid, signal.SIGTTOU)
        until(lambda count=count: len(daemon.workers()) == count)
    os.kill(daemon.pid, signal.SIGTTOU)
    until(lambda: "the last worker stays" in daemon.log())
    assert daemon.call("test", "echo", [1]) == [1]
    reload(daemon)  # back to what is configured
    until(lambda: len(daemon.workers()) == 2)


def test_the_worker_that_ttou_takes_away_finishes_what_it_runs(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2").run()
    events = [daemon.folder / "first", daemon.folder / "second"]
    with ThreadPoolExecutor(2) as pool:
        calls = []
        for event in events:
            calls.append(pool.submit(one_shot, daemon.path, "probe", "span", [2, str(event)]))
            until(event.exists)
        os.kill(daemon.pid, signal.SIGTTOU)
        assert all(call.result()["success"] for call in calls)
    until(lambda: len(daemon.workers()) == 1)


def ready_titles(daemon: Daemon) -> list[int]:
    return [
        pid for pid in daemon.workers() if b" busy " in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
