"""Start, stop, and what the command says: messages, exit statuses, what is left and what is not."""

import contextlib
import ctypes
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import COMMAND, Daemon, NewDaemon
from leftovers import users_of
from plain_client import Framed, connect, one_shot, read_to_end, request, until

from cpanbridge.supervisor.config import LONGEST_SECONDS

Finished = subprocess.CompletedProcess[str]


def only_line(text: str) -> str:
    """The text, which must be one line."""
    assert text.count("\n") == 1, text
    assert text.endswith("\n"), text
    return text[:-1]


def failed(done: Finished, status: int = 1) -> str:
    """The one line on standard error of a command that failed."""
    assert done.returncode == status, done
    assert done.stdout == ""
    line = only_line(done.stderr)
    assert line.startswith("cpanbridged: ")
    return line


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that its new parent has not waited for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def ends(daemon: Daemon) -> bool:
    """Whether a daemon that is to stop ends as it should, long before graceful_timeout."""
    assert daemon.process is not None
    try:
        return daemon.process.wait(15) == 0
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it does not end: {daemon.log()}") from None


def nothing_is_left(daemon: Daemon) -> bool:
    """Whether there is neither a process nor a socket nor a pid file."""
    files = [f"{daemon.path}{suffix}" for suffix in ("", ".pid", ".pid.new", ".ctl")]
    return not any(map(os.path.lexists, files)) and not users_of(daemon.folder)


def started_pid(done: Finished) -> int:
    """The master's pid as `start` prints it."""
    assert done.returncode == 0, done
    match = re.search(r"^Started: pid (\d+), ", done.stdout, re.MULTILINE)
    assert match, done
    return int(match[1])


@contextlib.contextmanager
def under_way(daemon: Daemon, seconds: float, function: str = "span") -> Iterator[Any]:
    """While a one-shot call runs; gives a future of its whole reply."""
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(one_shot, daemon.path, "probe", function, [seconds, str(event)])
        until(event.exists)
        yield call


# -- start, status, stop, restart --


def test_start_status_and_stop_say_what_they_did(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    started = daemon.command("start")
    pid = started_pid(started)
    assert started.stdout == (
        f"Started: pid {pid}, 2 workers, listening on {daemon.path}, log {daemon.log_file}\n"
    )
    assert started.stderr == ""
    assert Path(f"{daemon.path}.pid").read_text() == f"{pid}\n"
    assert os.getsid(pid) not in (os.getsid(0), pid)  # of no terminal, and it can get none
    assert daemon.call("test", "ping")["message"] == "pong"

    status = daemon.command("status")
    assert status.returncode == 0
    first, gate, load, limit, cores, *workers = status.stdout.splitlines()
    assert re.fullmatch(rf"running: pid {pid}, up 0h 0m \d+s, listening on {daemon.path}", first)
    assert gate.startswith("  gate open for ")
    assert re.fullmatch(r"  memory \d+\.\dMB, CPU \d+\.\d% \(peaks .*\)", load)
    assert (limit[:16], cores[:9]) == ("  memory limit: ", "  cores: ")
    assert [re.sub(r"\d+:", "N:", line, count=1) for line in workers] == [
        "  pid N: template gen 1 forks",
        "  pid N: worker 0 gen 1 busy 0/100",
        "  pid N: worker 1 gen 1 busy 0/100",
    ]

    stopped = daemon.command("stop")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, f"Stopped: pid {pid}\n", "")
    assert nothing_is_left(daemon)


def test_status_as_json_is_one_object(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3")
    status = daemon.command("status", "--json")
    assert status.returncode == 3
    assert json.loads(only_line(status.stdout)) == {"running": False, "sockets": [daemon.path]}
    daemon.run()
    status = daemon.command("status", "--json")
    assert status.returncode == 0
    found = json.loads(only_line(status.stdout))
    assert found["running"] is True
    assert found["pid"] == daemon.pid
    assert found["sockets"] == [daemon.path]
    assert found["uptime_seconds"] >= 0
    assert sorted(each["pid"] for each in found["workers"]) == sorted(daemon.workers())


def test_what_is_not_running_cannot_be_stopped_or_called(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    assert f"not running at {daemon.path}" in failed(daemon.command("stop"), 3)
    assert "not running" in failed(daemon.command("call", "test", "ping"), 3)
    status = daemon.command("status")
    assert (status.returncode, status.stdout) == (3, f"not running at {daemon.path}\n")


def test_a_second_start_fails_and_names_the_socket_and_the_first_ones_pid(
    daemon: Daemon,
) -> None:
    line = failed(daemon.command("start"))
    assert daemon.path in line
    assert f"pid {daemon.pid}" in line
    assert daemon.call("test", "ping")["message"] == "pong"
    assert daemon.command("status").returncode == 0


def test_restart_replaces_the_daemon_or_starts_one(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    first = started_pid(daemon.command("restart"))
    done = daemon.command("restart")
    assert done.stdout.startswith(f"Restarted: pid {daemon.pid}, 2 workers, listening on ")
    assert first != daemon.pid
    assert ended(first)
    assert daemon.call("test", "ping")["message"] == "pong"
    daemon.end()


def test_restart_with_a_bad_configuration_changes_nothing(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2").run()
    daemon.write_config("workers = -1")
    line = failed(daemon.command("restart"))
    assert str(daemon.config) in line
    assert "workers = -1" in line
    assert daemon.call("test", "ping")["message"] == "pong"


def test_a_start_without_any_configuration_says_that_nothing_is_exposed(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon()
    daemon.replace_config(f'listen = ["{daemon.path}"]\nworkers = 1')
    done = daemon.command("start")
    assert done.returncode == 0, done
    assert "nothing is exposed, clients can only call system and test" in only_line(done.stderr)
    daemon.end()


def test_without_a_log_file_start_logs_beside_the_socket(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    done = daemon.command("start", "--set", "log_file=stderr")
    assert done.stdout.endswith(f", log {daemon.folder}/d.log\n")
    assert " ready: pid " in daemon.log()
    daemon.end()


BROKEN = {
    "an exception": ("raise RuntimeError('two\\nlines')\n", "RuntimeError"),
    "an exit": ("import sys\nsys.exit(3)\n", "SystemExit"),
    "an end": ("import os\nos._exit(7)\n", "its import ended the process: exit status 7"),
    "a crash": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        "its import ended the process: killed by signal 11 (SIGSEGV)",
    ),
}


# A template imports it, or, without preload, each worker.
@pytest.mark.parametrize(
    ("kind", "preload"),
    [
        ("an exception", "false"),
        ("an exit", "true"),
        ("an end", "true"),
        ("an end", "false"),
        ("a crash", "true"),
    ],
)
def test_a_broken_module_fails_the_start_with_one_line_and_leaves_nothing(
    new_daemon: NewDaemon, kind: str, preload: str
) -> None:
    text, said = BROKEN[kind]
    daemon = new_daemon("")
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "bad_helper.py").write_text(text)
    daemon.write_config(f'workers = 2\npreload = {preload}\n[[module_dirs]]\npath = "{helpers}"')
    line = failed(daemon.command("start"))
    assert said in line
    assert f"{helpers}/bad_helper.py" in line
    until(lambda: nothing_is_left(daemon))  # its last descriptor is closed a little sooner


@pytest.mark.parametrize("log", ["a file", "stderr"])
def test_a_run_that_cannot_start_says_so_on_standard_error_wherever_the_log_is(
    new_daemon: NewDaemon, log: str
) -> None:
    daemon = new_daemon(
        'workers = 2\n[modules.a]\nimport = "no_such_module_at_all"\nfunctions = "*"'
    )
    flags = ["--set", "log_file=stderr"] if log == "stderr" else []
    done = daemon.command("run", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    *logged, told = done.stderr.splitlines()
    assert told.startswith("cpanbridged: not started: modules.a: import of 'no_such_module_at_all'")
    assert bool(logged) == (log == "stderr")
    until(lambda: nothing_is_left(daemon))  # its last descriptor is closed a little sooner


def test_an_unknown_function_fails_the_start_and_a_close_one_is_offered(
    new_daemon: NewDaemon,
) -> None:
    table = '[modules.stats]\nimport = "statistics"\nfunctions = ["mean", "meddian"]'
    daemon = new_daemon(f"workers = 2\n{table}")
    line = failed(daemon.command("start"))
    assert "modules.stats: function 'meddian' does not exist" in line
    assert "did you mean 'median'?" in line
    until(lambda: nothing_is_left(daemon))  # its last descriptor is closed a little sooner


# -- stopping --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_requests_finish_and_accepts_no_client(
    new_daemon: NewDaemon, number: signal.Signals
) -> None:
    daemon = new_daemon("workers = 2").run()
    with under_way(daemon, 1.5) as reply, Framed(daemon.path) as framed:
        framed.send("probe", "span", [1.5])
        until(lambda: daemon.metrics()["gate"]["running"] == 3)
        framed.send("test", "ping")
        os.kill(daemon.pid, number)

        def refused() -> bool:
            try:
                connect(daemon.path).close()
            except (FileNotFoundError, ConnectionRefusedError):
                return True
            return False

        until(refused)
        assert not reply.done()
        assert reply.result()["success"]
        last = framed.receive()
        assert last is not None
        assert last["function"] == "span"
        # The one that was sent after it was not run, and the client receives so.
        assert framed.receive() is None
    assert ends(daemon)
    assert nothing_is_left(daemon)


def test_the_stop_command_waits_for_running_requests(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    pid = started_pid(daemon.command("start"))
    with under_way(daemon, 1.5) as reply:
        assert daemon.command("stop").returncode == 0
        assert ended(pid)
        assert nothing_is_left(daemon)
        assert reply.result()["success"]


@pytest.mark.parametrize("limit", ["max_connections", "max_concurrent_requests"])
def test_clients_that_wait_for_room_are_answered_when_the_daemon_stops(
    new_daemon: NewDaemon, limit: str
) -> None:
    daemon = new_daemon(f"workers = 2\nlimits.{limit} = 1").run()
    with under_way(daemon, 1.5) as running, ThreadPoolExecutor(3) as pool:
        framed = [Framed(daemon.path) for _ in range(3)]
        for client in framed:
            client.send("probe", "echo", {})
        one_shots = [pool.submit(one_shot, daemon.path, "probe", "echo", {}) for _ in range(3)]
        time.sleep(0.3)  # so that they are in the backlog; one that is not finds no socket
        daemon.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        for client in framed:
            assert client.receive() is None
            client.socket.close()
        for reply in one_shots:
            assert reply.result()["error_type"] == "ShuttingDown"
        # Saying so takes a connection's room, but no request's.
        if limit == "max_connections":
            until(running.done)
        else:
            assert not running.done()
        assert running.result()["success"]
    assert ends(daemon)


def test_a_stop_in_the_midst_of_arriving_clients_waits_for_nobody(new_daemon: NewDaemon) -> None:
    """A thread that was on its way to wait for clients must not be waited for."""
    for _ in range(4):
        daemon = new_daemon("workers = 3\nlimits.graceful_timeout = 20").run()

        def come_and_go(path: str = daemon.path) -> None:
            with contextlib.suppress(OSError):
                while True:
                    connect(path).close()

        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                pool.submit(come_and_go)
            began = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - began < 10
        assert "Traceback" not in daemon.log()


def test_an_idle_client_is_closed_when_the_daemon_stops(daemon: Daemon) -> None:
    with (
        Framed(daemon.path, timeout=15) as fresh,
        Framed(daemon.path, timeout=15) as used,
        connect(daemon.path, timeout=15) as silent,
    ):
        assert used.call("test", "ping") is not None
        fresh.socket.sendall(b"\0")  # a frame that has only begun
        until(lambda: daemon.metrics()["gate"]["connections"] == 4)
        daemon.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        for client in (fresh, used):
            assert client.receive() is None
            with contextlib.suppress(ConnectionResetError):
                assert read_to_end(client.socket) == b""
        assert read_to_end(silent) == b""
        assert ends(daemon)


def test_a_one_shot_request_that_has_only_begun_is_answered_when_the_daemon_stops(
    daemon: Daemon,
) -> None:
    with connect(daemon.path) as client:
        client.sendall(b'{"module": "te')
        until(lambda: daemon.metrics()["gate"]["connections"] == 2)
        daemon.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        assert json.loads(read_to_end(client))["error_type"] == "ShuttingDown"
    assert ends(daemon)


@pytest.mark.parametrize("function", ["span", "hold_interpreter"])
def test_requests_that_take_longer_than_graceful_timeout_are_cut(
    new_daemon: NewDaemon, function: str
) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 1").run()
    with under_way(daemon, 60, function) as reply:
        began = time.monotonic()
        assert daemon.stop() == 0
        assert 1 <= time.monotonic() - began < 10
        assert isinstance(reply.exception(), ConnectionError | ValueError)  # no reply at all
    assert nothing_is_left(daemon)


def test_quit_ends_it_at_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 60").run()
    with under_way(daemon, 60) as reply:
        began = time.monotonic()
        assert daemon.stop(signal.SIGQUIT) == 0
        assert time.monotonic() - began < 10
        assert isinstance(reply.exception(), ConnectionError | ValueError)
    assert nothing_is_left(daemon)


def test_quit_ends_it_at_once_while_it_stops(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 60").run()
    with under_way(daemon, 60):
        daemon.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        until(lambda: not os.path.exists(daemon.path))
        assert daemon.stop(signal.SIGQUIT) == 0
    assert nothing_is_left(daemon)


def test_a_second_signal_to_stop_harms_no_running_request(daemon: Daemon) -> None:
    with under_way(daemon, 1.5) as reply:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            daemon.process.send_signal(number)  # type: ignore[union-attr]
            until(lambda: not os.path.exists(daemon.path))
        assert not reply.done()
        assert reply.result()["success"]
    assert ends(daemon)


def slow_to_boot(new_daemon: NewDaemon) -> tuple[Daemon, Path]:
    """A daemon whose module takes a minute to import, and a file that exists when that begins."""
    daemon = new_daemon("")
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    event = daemon.folder / "boots"
    (helpers / "slow.py").write_text(f"import time\nopen({str(event)!r}, 'w')\ntime.sleep(60)\n")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{helpers}"')
    return daemon, event


@pytest.mark.parametrize("command", ["start", "run"])
def test_a_daemon_that_is_stopped_while_it_boots_leaves_nothing(
    new_daemon: NewDaemon, command: str
) -> None:
    daemon, event = slow_to_boot(new_daemon)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(daemon.command, command)
        until(event.exists)
        os.kill(int(Path(f"{daemon.path}.pid").read_text()), signal.SIGTERM)
        finished = done.result(20)
    if command == "start":
        assert "told to stop" in failed(finished)
    else:
        assert (finished.returncode, finished.stderr) == (0, "")
    until(lambda: nothing_is_left(daemon))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_is_interrupted_ends_what_it_has_started(
    new_daemon: NewDaemon, number: signal.Signals
) -> None:
    daemon, event = slow_to_boot(new_daemon)
    with subprocess.Popen(
        [COMMAND, "start", "--config", str(daemon.config)],
        env=daemon.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as starting:
        until(event.exists)
        starting.send_signal(number)
        told = starting.communicate(timeout=30)[1]
    assert (starting.returncode, told) == (130, "cpanbridged: not started: interrupted\n")
    assert nothing_is_left(daemon)  # now: the command has waited for it


def test_a_second_interrupt_ends_a_run_at_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.graceful_timeout = 60").run()
    assert daemon.process is not None
    with under_way(daemon, 60) as reply:
        daemon.process.send_signal(signal.SIGINT)
        until(lambda: not os.path.exists(daemon.path))
        assert not reply.done()
        assert daemon.stop(signal.SIGINT) == 0
        assert isinstance(reply.exception(), ConnectionError | ValueError)
    assert nothing_is_left(daemon)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_ends_with_its_terminal_unless_it_is_to_stay(
    new_daemon: NewDaemon, nohup: bool
) -> None:
    daemon = new_daemon("workers = 2")
    pid, terminal = pty.fork()
    if pid == 0:
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execve(COMMAND, [COMMAND, "run", "--config", str(daemon.config)], daemon.environment)
    try:
        until(lambda: f" ready: pid {pid}," in daemon.log(), 60)
        os.kill(pid, signal.SIGHUP)
        until(lambda: "Reloaded: generation 2" in daemon.log())
    finally:
        os.close(terminal)
    if nohup:
        until(lambda: "Reloaded: generation 3" in daemon.log())
        os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0) == (pid, 0)
    assert nothing_is_left(daemon)


def test_no_other_signal_ends_it(daemon: Daemon) -> None:
    for name in ("HUP", "USR1", "TTIN", "TTOU", "PIPE", "CHLD", "WINCH"):
        os.kill(daemon.pid, signal.Signals[f"SIG{name}"])
    until(lambda: "1 worker fewer" in daemon.log())
    assert daemon.call("test", "ping")["message"] == "pong"
    assert daemon.stop() == 0


# -- sockets --


def open_folder(daemon: Daemon) -> tuple[str, str]:
    folder = daemon.folder / "open"
    folder.mkdir()
    folder.chmod(0o777)
    return f"{folder}/d.sock", f"chmod go-w {folder}"


def a_file(daemon: Daemon) -> tuple[str, str]:
    path = daemon.folder / "file"
    path.write_text("precious")
    return str(path), "not a socket"


@pytest.mark.parametrize("trouble", [open_folder, a_file])
def test_a_socket_that_cannot_be_created_is_reported_in_one_line(
    new_daemon: NewDaemon, trouble: Callable[[Daemon], tuple[str, str]]
) -> None:
    daemon = new_daemon("workers = 2")
    path, said = trouble(daemon)
    line = failed(daemon.command("start", "--socket", path))
    assert str(daemon.folder) in line
    assert said in line
    assert not users_of(daemon.folder)
    assert not os.path.exists(f"{path}.pid")
    if trouble is a_file:
        assert Path(path).read_text() == "precious"


def test_another_programs_socket_is_left_alone(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(daemon.path)
        other.listen()
        line = failed(daemon.command("start"))
        assert f"{daemon.path}: in use by another program" in line
        connect(daemon.path).close()
    assert not users_of(daemon.folder)
    assert not os.path.exists(f"{daemon.path}.pid")


def test_a_socket_that_nobody_listens_on_any_more_is_replaced(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(daemon.path)
        dead.listen()
    assert stat.S_ISSOCK(os.lstat(daemon.path).st_mode)
    daemon.run()
    assert daemon.call("test", "ping")["message"] == "pong"
    assert daemon.stop() == 0


def test_all_paths_of_listen_are_served_and_taken_away_again(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("")
    paths = [daemon.path, f"{daemon.folder}/second.sock"]
    config = daemon.config.read_text().replace(f'["{daemon.path}"]', json.dumps(paths))
    daemon.config.write_text(f"workers = 2\n{config}")
    daemon.run()
    for path in paths:
        assert one_shot(path, "test", "echo", [path])["result"] == [path]
        assert f"{path}: in use by a running" in failed(daemon.command("start", "--socket", path))
    assert daemon.stop() == 0
    for path in paths:
        assert not os.path.exists(path)
        assert not os.path.exists(f"{path}.pid")


def test_a_socket_that_others_took_over_is_not_taken_away_at_the_end(daemon: Daemon) -> None:
    os.unlink(daemon.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(daemon.path)
        other.listen()
        assert daemon.stop() == 0
        connect(daemon.path).close()


# -- check, call, settings --


def test_check_lists_what_may_be_called_and_starts_nothing(new_daemon: NewDaemon) -> None:
    table = '[modules.stats]\nimport = "statistics"\nfunctions = ["median", "mean"]'
    daemon = new_daemon(f"workers = 3\n{table}")
    done = daemon.command("check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"configuration: {daemon.config}: fine" in lines
    assert f"sockets: {daemon.path}" in lines
    assert "workers: 3" in lines
    assert "module stats (affinity none): mean, median" in lines
    label = "module probe (affinity none): "
    probe = next(line for line in lines if line.startswith(label))
    assert {"echo", "nap", "worker_pid"} <= set(probe.removeprefix(label).split(", "))
    assert nothing_is_left(daemon)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("workers = [", "not valid TOML"),
        ('[modules.a]\nimport = "no_such_module_at_all"\nfunctions = "*"', "modules.a: "),
    ],
)
def test_a_mistake_in_the_settings_is_reported_in_one_line(
    new_daemon: NewDaemon, config: str, said: str
) -> None:
    daemon = new_daemon(config)
    line = failed(daemon.command("check"))
    assert said in line
    assert failed(daemon.command("start")).endswith(line.removeprefix("cpanbridged: "))
    until(lambda: nothing_is_left(daemon))  # its last descriptor is closed a little sooner


def test_check_says_what_start_would_say_of_a_broken_module(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("")
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "bad_helper.py").write_text("print('loading')\nno_such_name\n")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{helpers}"')
    done = daemon.command("check")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("loading\n")  # what modules print is not the command's answer
    told = only_line(done.stderr.removeprefix("loading\n"))
    assert told.removeprefix("cpanbridged: ") in failed(daemon.command("start"))


def test_check_tells_all_that_is_wrong(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("")
    folder, none = daemon.folder, f"{daemon.folder}/none"
    daemon.replace_config(
        f'listen = ["{daemon.path}", "{none}/d.sock", "{daemon.config}"]\n'
        f'log_file = "{none}/d.log"\nsecurity_log = "{folder}"\nsocket_group = "no such group"\n'
        '[modules.a]\nimport = "no_such_module_at_all"\nfunctions = "*"\n'
        '[modules.b]\nimport = "statistics"\nfunctions = ["meen", "mean", "stdef"]\n'
    )
    done = daemon.command("check")
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line.removeprefix("cpanbridged: ") for line in done.stderr.splitlines()]
    for line, beginning in zip(
        lines,
        [
            "socket_group = 'no such group': there is no such group",
            f"log_file = '{none}/d.log': the folder {none}: No such file",
            f"security_log = '{folder}': is a folder",
            f"{none}: No such file",
            f"{daemon.config}: exists and is not a socket",
            "modules.a: import of 'no_such_module_at_all' failed",
            "modules.b: function 'meen' does not exist",
            "modules.b: function 'stdef' does not exist",
        ],
        strict=True,
    ):
        assert line.startswith(beginning)
    assert sorted(os.listdir(folder)) == ["c.toml"]


def test_check_says_where_the_daemon_may_not_write(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    daemon.folder.chmod(0o555)
    done = subprocess.run(
        [COMMAND, "check", "--config", str(daemon.config)],
        env=daemon.environment,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=drop_power_over_files,
        check=False,
    )
    daemon.folder.chmod(0o755)
    assert done.returncode == 1
    log, path = done.stderr.splitlines()
    refused = rf"user \S+ may not write in the folder {daemon.folder}"
    assert re.fullmatch(f"cpanbridged: log_file = '{daemon.log_file}': {refused}", log)
    assert re.fullmatch(f"cpanbridged: {daemon.path}: {refused}", path)


def drop_power_over_files() -> None:
    """Root may write everywhere, until it loses CAP_DAC_OVERRIDE (capabilities(7))."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP; a user lacks it anyway


@pytest.mark.parametrize("command", ["check", "start"])
def test_a_module_that_hangs_is_named_and_nothing_is_left(
    new_daemon: NewDaemon, command: str
) -> None:
    daemon = new_daemon("")
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{helpers}"')
    # Enough to come to the import on a machine with much else to do.
    daemon.will_run("import cpanbridge.supervisor.processes.spawner as s\ns.BOOT_SECONDS = 4.0\n")
    line = failed(daemon.command(command))
    assert f"{helpers}/hangs.py: not imported after 4 s; " in line
    if command == "check":
        assert f"it is at {helpers}/hangs.py:2" in line
    until(lambda: nothing_is_left(daemon))


def test_check_leaves_nothing_that_a_module_has_started_and_notes_too_little_memory(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2")
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "starts.py").write_text(
        "import os, time\nif os.fork() == 0:\n    time.sleep(600)\n    os._exit(0)\n"
    )
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{helpers}"')
    done = daemon.command("check", "--set", "limits.max_memory_mb=2", timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: limits.max_memory_mb = 2 is less than a single process " in done.stdout
    until(lambda: not users_of(daemon.folder))


def test_call_prints_the_result_as_json(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    done = daemon.command("call", "probe", "echo", '{"a": [1, null, "\\u2603"]}')
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"a": [1, None, "\u2603"]}
    assert json.loads(daemon.command("call", "probe", "two", "[1, 2]").stdout) == [1, 2]


def test_call_prints_any_result_whatever_the_locale(
    shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shared_daemon.environment, "PYTHONIOENCODING", "ascii")
    done = shared_daemon.command("call", "probe", "echo", '{"a": "\\u2603\\ud83d\\ude00"}')
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"a": "\u2603\U0001f600"}


def test_call_shows_in_its_exit_status_how_it_went(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    line = failed(daemon.command("call", "probe", "fail", '["as asked"]'))
    assert "ValueError: Error in probe.fail: as asked" in line
    assert "ModuleNotAllowed" in failed(daemon.command("call", "none", "f"))
    assert "closed without a reply" in failed(daemon.command("call", "probe", "die"))
    assert "RequestTimeout: probe.nap did not return within 0.2 s; it may still run" in failed(
        daemon.command("call", "probe", "nap", "[2]", "--timeout", "0.2")
    )
    assert "JSON" in failed(daemon.command("call", "probe", "echo", "{oops"), 2)


@pytest.mark.parametrize(
    "arguments",
    [("call", "probe"), ("fly",)],
)
def test_wrong_usage_is_exit_status_2(new_daemon: NewDaemon, arguments: tuple[str, ...]) -> None:
    done = new_daemon().command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: cpanbridged")


def test_flags_beat_the_environment_and_that_beats_the_file(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3")
    daemon.environment["CPAN_BRIDGE_SOCKET"] = f"{daemon.folder}/e.sock"
    said = daemon.command("check").stdout
    assert "workers: 3\n" in said
    assert f"sockets: {daemon.folder}/e.sock\n" in said
    daemon.environment["CPAN_BRIDGE_WORKERS"] = "4"
    other = f"{daemon.folder}/f.sock"
    said = daemon.command("check", "--socket", other).stdout
    assert "workers: 4\n" in said
    assert f"sockets: {other}\n" in said
    assert "workers: 5\n" in daemon.command("check", "--set", "workers=5").stdout
    daemon.environment["CPAN_BRIDGE_WORKERS"] = "many"
    line = failed(daemon.command("check"))
    assert "CPAN_BRIDGE_WORKERS" in line
    assert "many" in line


def test_settings_that_are_set_in_each_way_are_the_running_daemons(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_connections = 7\nlimits.idle_timeout = 70")
    daemon.environment["CPAN_BRIDGE_TIMEOUT"] = "80"
    daemon.environment["CPAN_BRIDGE_MAX_CONCURRENT_REQUESTS"] = "8"
    started_pid(daemon.command("start", "--set", "limits.max_concurrent_requests=9"))
    found = daemon.call("system", "info")["configuration"]
    assert found["max_connections"] == 7
    assert found["connection_timeout"] == 80
    assert found["max_concurrent_requests"] == 9
    daemon.end()


# -- what ps shows --


def title(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline()).strip()


def test_process_titles_say_what_each_process_is_and_does(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_connections = 50").run()
    assert title(daemon.pid) == f"cpanbridged: master [{daemon.config}]"

    def titles() -> list[str]:
        return sorted(title(pid) for pid in daemon.workers())

    idle = [f"cpanbridged: worker {number} gen 1 busy 0/50" for number in range(2)]
    until(lambda: titles() == idle)
    with under_way(daemon, 60):
        until(lambda: sorted(each[-4:] for each in titles()) == ["0/50", "1/50"])
        daemon.stop(signal.SIGQUIT)


# -- other users --


class OtherUser:
    """Runs the command as a user that is not root, with an environment of its own."""

    def __init__(self, uid: int, environment: dict[str, str], prefix: list[str]) -> None:
        self.uid = uid
        self.environment = environment
        self._prefix = prefix

    def command(self, *arguments: str) -> Finished:
        return subprocess.run(
            [*self._prefix, COMMAND, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            stdin=subprocess.DEVNULL,
            check=False,
        )


@pytest.fixture
def other_user() -> Iterator[OtherUser]:
    """The user who runs the tests, or when that is root, one that nobody else is."""
    environment = {"PATH": os.environ["PATH"]}
    if os.getuid() != 0:
        yield OtherUser(os.getuid(), environment, [])
        return
    uid = 61000 + os.getpid() % 4000
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    # Where Python stands in root's home, others cannot read it without this right to read.
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    for prefix in (become, become + read):
        with contextlib.suppress(FileNotFoundError):
            user = OtherUser(uid, environment, prefix)
            if user.command("--version").returncode == 0:
                yield user
                return
    pytest.skip("no other user can run this Python: setpriv is missing, or may not pass rights on")


@pytest.fixture
def their_folder(other_user: OtherUser) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cb-", dir="/tmp"))
    os.chown(folder, other_user.uid, -1)
    yield folder
    with contextlib.suppress(OSError, ValueError):
        master = psutil.Process(int((folder / "cpanbridged.sock.pid").read_text()))
        for each in (master, *master.children()):
            each.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_users_own_daemon_stands_in_the_runtime_folder(
    other_user: OtherUser, their_folder: Path
) -> None:
    other_user.environment["XDG_RUNTIME_DIR"] = str(their_folder)
    path = their_folder / "cpanbridged.sock"
    done = other_user.command("start", "--set", "workers=2")
    pid = started_pid(done)
    assert f"listening on {path}, log {their_folder}/cpanbridged.log" in done.stdout
    assert psutil.Process(pid).uids().effective == other_user.uid
    assert os.stat(path).st_uid == other_user.uid
    assert other_user.command("status").returncode == 0
    assert json.loads(other_user.command("call", "test", "echo", "[1]").stdout) == [1]
    assert other_user.command("stop").returncode == 0
    assert not path.exists()


def test_the_shipped_logrotate_script_reopens_the_logs_and_is_silent_without_a_daemon(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2")
    shipped = (Path(__file__).parents[2] / "etc" / "cpanbridged.logrotate").read_text()
    script = re.search(r"postrotate\n(.*)\n *endscript", shipped, re.DOTALL)
    assert script
    assert "kill" not in script[1]

    def rotate(path: str) -> tuple[int, str]:
        text = script[1].replace("/opt/cpanbridge/bin/cpanbridged", f"{COMMAND} --socket {path}")
        done = subprocess.run(
            ["sh", "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=daemon.environment,
            check=False,
        )
        return done.returncode, done.stdout

    for path in (daemon.path, f"{daemon.folder}/no_folder/d.sock"):
        assert rotate(path) == (0, "")
    daemon.run()
    shutil.move(daemon.log_file, f"{daemon.log_file}.1")
    assert rotate(daemon.path) == (0, "")
    assert "Logs reopened" in daemon.log()
    shutil.move(daemon.log_file, f"{daemon.log_file}.2")
    daemon.log_file.mkdir()  # no log can be there: the reason is what logrotate mails
    status, told = rotate(daemon.path)
    daemon.log_file.rmdir()
    assert status == 1
    assert "not reopened, nothing has changed: " in told


@pytest.mark.parametrize("key", ["user", "socket_group"])
def test_a_user_or_group_that_does_not_exist_is_reported(new_daemon: NewDaemon, key: str) -> None:
    daemon = new_daemon(f'workers = 2\n{key} = "no-such-one"')
    kind = key.removeprefix("socket_")
    assert f"{key} = 'no-such-one': there is no such {kind}" in failed(daemon.command("start"))


def test_without_a_runtime_folder_it_stands_in_one_of_the_users_own(other_user: OtherUser) -> None:
    folder = Path(f"/tmp/cpanbridged-{other_user.uid}")
    if folder.exists():
        pytest.skip(f"{folder} exists already")
    try:
        started_pid(other_user.command("start", "--set", "workers=2"))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == other_user.uid
        assert (folder / "cpanbridged.sock").is_socket()
        assert other_user.command("call", "test", "ping").returncode == 0
        assert other_user.command("stop").returncode == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_of_another_user_in_its_place_is_refused(other_user: OtherUser) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to another user")
    folder = Path(f"/tmp/cpanbridged-{other_user.uid}")
    folder.mkdir(0o777)
    try:
        os.chown(folder, other_user.uid + 1, -1)
        line = failed(other_user.command("start"))
        assert f"{folder}" in line
        assert "refused" in line
        assert f"user {other_user.uid + 1} owns" in line
    finally:
        shutil.rmtree(folder)


def test_what_a_daemon_of_another_user_has_left_is_named(
    other_user: OtherUser, their_folder: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can leave a file that another user cannot open")
    lock = their_folder / "d.sock.lock"
    lock.touch(0o600)
    line = failed(other_user.command("start", "--socket", str(their_folder / "d.sock")))
    assert f"{lock}: is user 0's, whose daemon runs here or did once: Permission denied" in line
    assert "if none runs, remove the file" in line


def test_another_user_can_neither_call_nor_stop_it(
    other_user: OtherUser, new_daemon: NewDaemon
) -> None:
    if os.getuid() != 0:
        pytest.skip("takes two users")
    daemon = new_daemon("workers = 2").run()
    daemon.folder.chmod(0o755)
    line = failed(other_user.command("call", "--socket", daemon.path, "test", "ping"))
    assert "Permission denied" in line
    failed(other_user.command("stop", "--socket", daemon.path))
    failed(other_user.command("start", "--socket", daemon.path))
    assert daemon.call("test", "ping")["message"] == "pong"


def test_the_longest_times_that_are_allowed_work(new_daemon: NewDaemon) -> None:
    names = ("read_timeout", "graceful_timeout", "idle_timeout", "cleanup_interval")
    limits = "".join(f"limits.{name} = {LONGEST_SECONDS}\n" for name in names)
    daemon = new_daemon(f"workers = 1\n{limits}").run()
    with connect(daemon.path) as late:
        until(lambda: daemon.metrics()["gate"]["connections"] >= 2)
        late.sendall(json.dumps(request("test", "echo", [1])).encode())
        assert json.loads(read_to_end(late))["result"] == [1]
    assert daemon.stop() == 0
    assert "fault" not in daemon.log()
