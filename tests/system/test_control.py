"""The control socket: it answers whatever state the workers and the gate are in."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, read_to_end, until

from cpanbridge.supervisor.control.server import MOST_IDLE, MOST_WAITING


def ask(daemon: Daemon, command: str) -> dict[str, Any]:
    """The last reply to a command."""
    return daemon.ask(json.dumps({"command": command}).encode() + b"\n")[-1]


def test_the_socket_is_the_users_own_and_removed_with_the_daemon(daemon: Daemon) -> None:
    assert stat.S_IMODE(os.stat(f"{daemon.path}.ctl").st_mode) == 0o600
    assert ask(daemon, "status")["result"]["pid"] == daemon.pid
    assert daemon.stop() == 0
    assert not os.path.exists(f"{daemon.path}.ctl")


def test_it_reports_what_the_shared_memory_has(daemon: Daemon) -> None:
    for number in range(5):
        daemon.call("test", "echo", [number])
    with Framed(daemon.path) as kept:
        assert kept.call("test", "echo", True) is not None
        status = until(  # the last one-shot client may be counted a moment longer
            lambda: (found := ask(daemon, "status")["result"])["gate"]["connections"] == 1 and found
        )
        assert status["state"] == "running"
        assert status["gate"]["admitted_last_minute"] == 6
    assert [each["state"] for each in status["workers"]] == ["serves", "serves"]
    assert sum(each["requests"] for each in status["workers"]) == 6
    assert sorted(each["pid"] for each in status["workers"]) == sorted(daemon.workers())


def test_status_shows_a_call_from_its_beginning_to_its_end(shared_daemon: Daemon) -> None:
    """A process title says it up to a second later."""
    daemon = shared_daemon
    event, go = daemon.folder / "begun", daemon.folder / "go"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(daemon.call, "probe", "run_until", [str(go), str(event)])
        until(event.exists)
        assert daemon.command("status").stdout.count(" busy 1/100\n") == 1
        go.touch()
        call.result()
    assert daemon.command("status").stdout.count(" busy 0/100\n") == 2


def test_it_answers_while_no_worker_can(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    with daemon.held():
        assert ask(daemon, "status")["result"]["state"] == "running"
        assert daemon.command("status").returncode == 0


def test_it_answers_while_the_gate_has_no_room(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_connections = 1").run()
    with Framed(daemon.path) as only:
        assert only.call("test", "echo", True) is not None
        assert ask(daemon, "status")["result"]["gate"]["connections"] == 1


def test_it_answers_while_workers_die_at_their_start(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    flag = daemon.folder / "broken"
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "fragile.py").write_text(
        f"import os\nif os.path.exists({str(flag)!r}):\n    os._exit(7)\n"
    )
    daemon.write_config(f'workers = 2\npreload = false\n[[module_dirs]]\npath = "{helpers}"')
    daemon.run()
    flag.touch()
    for pid in daemon.workers():
        os.kill(pid, signal.SIGKILL)

    def waiting() -> bool:
        workers = ask(daemon, "status")["result"]["workers"]
        return all(each["state"] == "waits for its next start" for each in workers)

    until(waiting)
    until(lambda: ask(daemon, "status")["result"]["worker_deaths"] >= 4)

    def told() -> bool:
        status = daemon.command("status")
        assert (status.returncode, status.stderr) == (1, "")
        assert status.stdout.startswith(f"not serving: pid {daemon.pid}, up ")
        said = r"worker 0 gen 1 waits for its next start: .*fragile.*: exit status 7\n"
        return re.search(said, status.stdout) is not None

    until(told)  # it may just boot
    flag.unlink()
    until(lambda: len(daemon.workers()) == 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{}\n", "not a request"),
        (b"status\n", "not a request"),
        (b'{"command": "fly"}\n', "there is no command 'fly'; there are metrics, reload, "),
        (b"x" * 5000, "the request is too long"),
        (b"\xff\x00\n", "not a request"),
    ],
)
def test_an_invalid_request_is_answered_with_an_error(
    shared_daemon: Daemon, data: bytes, words: str
) -> None:
    answers = shared_daemon.ask(data)
    assert len(answers) == 1
    assert words in answers[0]["error"]


def test_connections_that_are_silent_slow_or_flooding_hold_nothing_up(daemon: Daemon) -> None:
    connections = [connect(f"{daemon.path}.ctl") for _ in range(40)]
    for number, connection in enumerate(connections):
        connection.setblocking(False)
        try:
            if number % 3 == 0:
                connection.sendall(b"x")
            elif number % 3 == 1:
                for _ in range(200):
                    connection.sendall(b'{"command": "status"}\n' * 100)
        except OSError:
            continue  # the server has closed this one
    began = time.monotonic()
    daemon.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]
    until(lambda: "Reloaded: generation 2" in daemon.log())
    assert daemon.call("test", "ping")["message"] == "pong"
    assert ask(daemon, "status")["result"]["generation"] == 2
    assert time.monotonic() - began < 25
    for connection in connections:
        connection.close()
    assert daemon.stop() == 0


def hanging_module(daemon: Daemon, config: str) -> tuple[Path, Path]:
    """Configure a module that creates the first file when imported, and waits for the second.

    The rest of the configuration is `config`.
    """
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    started, go = daemon.folder / "hangs", daemon.folder / "go"
    (helpers / "slow.py").write_text(
        f"import os, time\nopen({str(started)!r}, 'w').close()\n"
        f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\n"
    )
    daemon.write_config(f'{config}\n[[module_dirs]]\npath = "{helpers}"')
    return started, go


def say(connection: socket.socket, command: str) -> None:
    connection.sendall(json.dumps({"command": command}).encode() + b"\n")


def outcome(connection: socket.socket) -> dict[str, Any]:
    """The last reply that a connection receives."""
    last: dict[str, Any] = json.loads(read_to_end(connection).splitlines()[-1])
    return last


def test_connections_that_only_watch_keep_no_command_out(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    with contextlib.ExitStack() as stack:
        watchers = []
        for _ in range(3 * MOST_IDLE):
            watchers.append(stack.enter_context(connect(f"{daemon.path}.ctl")))
            say(watchers[-1], "watch")
        for _ in range(3):
            assert ask(daemon, "status")["result"]["state"] == "running"
        assert read_to_end(watchers[0]) == b""  # the oldest was closed
        watchers[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # the last one still watches
            watchers[-1].recv(1)
        assert daemon.command("reload").returncode == 0


def test_a_connection_that_waits_for_an_outcome_is_not_closed(daemon: Daemon) -> None:
    started, go = hanging_module(daemon, "workers = 2")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(f"{daemon.path}.ctl"))
        say(first, "reload")
        until(started.exists)
        for number in range(3 * MOST_IDLE):
            connection = stack.enter_context(connect(f"{daemon.path}.ctl"))
            if number % 2:
                say(connection, "watch")
        assert ask(daemon, "status")["result"]["state"] == "reloading"
        go.touch()
        assert outcome(first) == {"result": {"generation": 2, "workers": 2}}


def test_when_too_many_wait_a_command_is_refused_and_an_inquiry_answered(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1").run()
    started, go = hanging_module(daemon, "workers = 1")
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(MOST_WAITING):
            waiting.append(stack.enter_context(connect(f"{daemon.path}.ctl")))
            say(waiting[-1], "reload")
        assert ask(daemon, "status")["result"]["state"] == "reloading"
        until(started.exists)
        assert ask(daemon, "reload") == {"error": "64 commands wait for their outcome already"}
        go.touch()
        outcomes = [outcome(connection) for connection in waiting]
    assert outcomes == [{"result": {"generation": MOST_WAITING + 1, "workers": 1}}] * MOST_WAITING
    assert ask(daemon, "reload")["result"]["generation"] == MOST_WAITING + 2


def test_a_flood_of_connections_delays_neither_commands_nor_the_daemon(daemon: Daemon) -> None:
    over = threading.Event()
    flooded = []

    def flood() -> None:
        kept: deque[socket.socket] = deque()
        while not over.is_set():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the queue is full
                connection.connect(f"{daemon.path}.ctl")
            kept.append(connection)
            if len(kept) > 100:
                kept.popleft().close()
            flooded.append(1)
            if len(flooded) % 50 == 0:
                time.sleep(0.005)  # without it, the flood would take a whole processor
        for connection in kept:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        try:
            floods = [pool.submit(flood) for _ in range(2)]
            status = daemon.command("status")
            assert (status.returncode, status.stderr) == (0, "")
            assert status.stdout.startswith("running: pid ")
            os.kill(daemon.workers()[0], signal.SIGKILL)
            until(lambda: daemon.log().count("ready (pid") == 3)
            assert daemon.command("reload").returncode == 0
        finally:
            over.set()
    assert [each.result() for each in floods] == [None, None]
    assert len(flooded) > 1000


FLOOD = """
import socket, sys
sys.stdin.readline()
kept = []
for _ in range(int(sys.argv[2])):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].connect(sys.argv[1])
kept[-1].sendall(b'{"command": "status"}\\n')
kept[-1].recv(1)
print("all accepted", flush=True)
sys.stdin.read()
"""


def test_a_flood_closes_no_connection_of_another_process(shared_daemon: Daemon) -> None:
    """Which may be on its way from connecting to sending its request, on a busy machine."""
    path = f"{shared_daemon.path}.ctl"
    command = [sys.executable, "-c", FLOOD, path, str(3 * MOST_IDLE)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as flood:
        assert flood.stdin is not None
        assert flood.stdout is not None
        with connect(path) as slow:
            flood.stdin.write("go\n")
            flood.stdin.flush()
            assert flood.stdout.readline() == "all accepted\n"
            say(slow, "status")
            assert outcome(slow)["result"]["state"] == "running"
        flood.stdin.close()


def test_a_connection_that_is_closed_while_it_waits_is_released(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    descriptors = Path(f"/proc/{daemon.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        with connect(f"{daemon.path}.ctl") as connection:
            connection.sendall(b'{"command": "watch"}\n')
    until(lambda: len(list(descriptors.iterdir())) == before)


def test_another_user_is_refused(daemon: Daemon) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user for a while")
    os.chmod(f"{daemon.path}.ctl", 0o666)
    daemon.folder.chmod(0o755)
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgid(61000)
            os.setuid(61000)
            answer = ask(daemon, "reload")
            os.write(write_end, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as pipe:
        assert json.load(pipe) == {"error": "user 61000 may not control this daemon"}
    assert "Reloading" not in daemon.log()


# -- the commands that use it --


def test_reload_prints_its_outcome(daemon: Daemon) -> None:
    daemon.write_config("workers = 3")
    done = daemon.command("reload")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Reloaded: generation 2, 3 workers\n"
    assert "last reload, " in daemon.command("status").stdout
    daemon.write_config("workers = 200")
    done = daemon.command("reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "cpanbridged: not reloaded, nothing has changed: workers = 200: the running daemon has "
    )
    assert "failed: workers = 200" in daemon.command("status").stdout
    status = daemon.status()
    assert status["generation"] == 2
    assert status["last_reload"]["error"].startswith("workers = 200")


def test_a_mistake_in_the_file_is_reported_with_and_without_socket(
    daemon: Daemon,
) -> None:
    daemon.write_config("colour = 1")
    for flags in ((), ("--socket", daemon.path)):
        done = daemon.command("reload", *flags)
        assert done.returncode == 1
        assert done.stderr.startswith("cpanbridged: not reloaded, nothing has changed: ")
        assert "colour: unknown key" in done.stderr
    assert "colour: unknown key" in daemon.command("status", "--socket", daemon.path).stdout


def test_reload_without_a_daemon_is_exit_status_3(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2")
    done = daemon.command("reload")
    assert (done.returncode, done.stdout) == (3, "")
    assert "not running" in done.stderr


def test_a_waiting_reload_gets_an_error_when_the_daemon_stops(daemon: Daemon) -> None:
    started, _ = hanging_module(daemon, "workers = 2")
    with connect(f"{daemon.path}.ctl") as connection:
        connection.sendall(b'{"command": "reload"}\n')
        until(started.exists)
        received = b""
        while b"imports the modules" not in received:
            received += connection.recv(65536)
        assert ask(daemon, "status")["result"]["state"] == "reloading"
        assert daemon.stop() == 0
        while piece := connection.recv(65536):
            received += piece
    assert json.loads(received.splitlines()[-1]) == {"error": "the daemon is stopping"}
