"""What systemd relies on: sd_notify, the watchdog, sockets of its making, the units in etc/."""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import COMMAND, Daemon, NewDaemon
from plain_client import connect, one_shot, until

ETC = Path(__file__).parents[2] / "etc"


CREDENTIALS = struct.Struct("3i")


class Manager:
    """Listens where systemd would, and keeps what it receives, and from which process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.messages: list[dict[str, str]] = []
        self.speakers: list[int] = []  # the process ids, by the kernel's word
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(path)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            message, ancillary, _, _ = self._socket.recvmsg(4096, 256)
            if not message:
                return
            lines = message.decode().splitlines()
            self.speakers.append(CREDENTIALS.unpack(ancillary[0][2])[0])
            self.messages.append(dict(line.split("=", 1) for line in lines))

    def received(self, name: str, value: str | None = None) -> list[dict[str, str]]:
        """The messages so far that have a field."""
        return [m for m in self.messages if name in m and value in (None, m[name])]

    def catch_up(self) -> None:
        """Wait until all that has been sent is heard."""
        before = len(self.received("TEST"))
        self._send(b"TEST=1")
        until(lambda: len(self.received("TEST")) > before)

    def check_speakers(self) -> None:
        """See that only the main process has spoken: systemd hears no other."""
        self.catch_up()
        main = self.speakers[0]
        for speaker, message in zip(self.speakers, self.messages, strict=False):
            if "TEST" not in message:
                assert speaker == main, message
            main = int(message.get("MAINPID", main))

    def close(self) -> None:
        self._send(b"")
        self._thread.join()
        self._socket.close()

    def _send(self, message: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message, self.path)


@pytest.fixture
def prepared(new_daemon: NewDaemon) -> Iterator[tuple[Daemon, Manager]]:
    """A daemon that will have a manager, not started yet."""
    daemon = new_daemon("workers = 2")
    manager = Manager(str(daemon.folder / "notify"))
    daemon.environment["NOTIFY_SOCKET"] = manager.path
    daemon.environment["WATCHDOG_USEC"] = "400000"
    yield daemon, manager
    manager.close()


@pytest.fixture
def managed(prepared: tuple[Daemon, Manager]) -> tuple[Daemon, Manager]:
    daemon, manager = prepared
    return daemon.run(), manager


def test_it_says_when_it_is_ready_reloads_and_stops(managed: tuple[Daemon, Manager]) -> None:
    daemon, manager = managed
    until(lambda: manager.received("READY"))
    (ready,) = manager.received("READY")
    assert ready["STATUS"] == "Serving with 2 workers, generation 1"
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: len(manager.received("READY")) == 2)
    (reloading,) = manager.received("RELOADING")
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert manager.messages.index(reloading) < manager.messages.index(manager.received("READY")[1])
    assert manager.received("READY")[1]["STATUS"] == "Serving with 2 workers, generation 2"
    daemon.write_config("workers = 200")
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: len(manager.received("READY")) == 3)
    assert manager.received("READY")[2]["STATUS"].startswith("Not reloaded: workers = 200")
    assert daemon.stop() == 0
    (stopping,) = until(lambda: manager.received("STOPPING"))
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) == 33_000_000


def test_the_watchdog_is_notified_as_long_as_the_loop_turns(
    managed: tuple[Daemon, Manager],
) -> None:
    daemon, manager = managed
    until(lambda: len(manager.received("WATCHDOG")) > 3)
    os.kill(daemon.pid, signal.SIGSTOP)
    count = len(manager.received("WATCHDOG"))
    with pytest.raises(AssertionError):
        until(lambda: len(manager.received("WATCHDOG")) > count, 1.0)
    os.kill(daemon.pid, signal.SIGCONT)
    until(lambda: len(manager.received("WATCHDOG")) > count)


def test_an_upgrade_announces_the_new_main_pid(managed: tuple[Daemon, Manager]) -> None:
    daemon, manager = managed
    old = daemon.pid
    daemon.upgrade()
    until(lambda: manager.received("MAINPID", str(daemon.pid)))
    assert daemon.pid != old
    until(lambda: len(manager.received("READY")) == 2)
    count = len(manager.received("WATCHDOG"))
    until(lambda: len(manager.received("WATCHDOG")) > count)  # the new one goes on with that
    assert daemon.stop() == 0
    manager.check_speakers()


def test_a_new_master_says_nothing_before_the_old_one_has_named_it(
    prepared: tuple[Daemon, Manager],
) -> None:
    daemon, manager = prepared
    go = daemon.folder / "go"
    daemon.will_run(
        "import os, time\n"
        "from cpanbridge.supervisor.system.sd_notify import ServiceManager\n"
        "handed_over = ServiceManager.handed_over\n"
        "def late(notifier, pid):\n"
        f"    while not os.path.exists({str(go)!r}):\n"
        "        time.sleep(0.01)\n"
        "    handed_over(notifier, pid)\n"
        "ServiceManager.handed_over = late\n"
    )
    old = daemon.run().pid
    os.kill(old, signal.SIGUSR2)
    until(lambda: daemon.pid != old)
    until(lambda: daemon.status()["state"] == "running")
    manager.check_speakers()
    assert not manager.received("MAINPID")
    go.touch()
    (named,) = until(lambda: manager.received("MAINPID", str(daemon.pid)))
    _, ready = until(lambda: len(manager.received("READY")) == 2 and manager.received("READY"))
    assert ready["STATUS"] == "Serving with 2 workers, generation 2"
    assert manager.messages.index(named) < manager.messages.index(ready)
    assert daemon.stop() == 0
    manager.check_speakers()


def test_a_failed_upgrade_is_reported_by_the_old_master_only(
    managed: tuple[Daemon, Manager],
) -> None:
    daemon, manager = managed
    working = daemon.config.read_text()
    folder = daemon.folder / "helpers"
    folder.mkdir()
    (folder / "bad.py").write_text("def broken(:")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{folder}"')
    assert daemon.command("upgrade").returncode == 1
    _, told = until(lambda: len(manager.received("READY")) == 2 and manager.received("READY"))
    assert told["STATUS"].startswith("Not upgraded: ")
    assert "SyntaxError" in told["STATUS"]
    new = int(daemon.log().rpartition("the new master is pid ")[2].split()[0])
    until(lambda: not Path(f"/proc/{new}").exists())
    manager.check_speakers()
    assert not manager.received("STOPPING")
    daemon.replace_config(working)
    daemon.upgrade()
    assert daemon.stop() == 0
    manager.check_speakers()


def hanging(daemon: Daemon, number: signal.Signals) -> Path:
    """Begin a reload or an upgrade whose workers boot until the file is there."""
    folder = daemon.folder / "helpers"
    folder.mkdir()
    event, go = daemon.folder / "hangs", daemon.folder / "go"
    (folder / "slow.py").write_text(
        f"import os, time\nopen({str(event)!r}, 'w').close()\n"
        f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\n"
    )
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{folder}"')
    os.kill(daemon.pid, number)
    until(event.exists)
    return go


def test_an_upgrade_that_is_refused_at_once_ends_no_reload(managed: tuple[Daemon, Manager]) -> None:
    daemon, manager = managed
    go = hanging(daemon, signal.SIGHUP)
    os.kill(daemon.pid, signal.SIGUSR2)
    (told,) = until(lambda: manager.received("STATUS", "Not upgraded: the daemon is reloading"))
    assert "READY" not in told  # by which systemd would take the reload as over
    go.touch()
    until(lambda: len(manager.received("READY")) == 2)
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_nothing_is_reported_after_a_stop_has_begun(
    managed: tuple[Daemon, Manager], number: signal.Signals
) -> None:
    daemon, manager = managed
    hanging(daemon, number)
    assert daemon.stop() == 0
    manager.check_speakers()
    states = [m for m in manager.messages if {"READY", "RELOADING", "STOPPING"} & m.keys()]
    assert "STOPPING" in states[-1]


def test_a_reload_that_an_upgrade_refuses_is_reported_and_logged(
    managed: tuple[Daemon, Manager],
) -> None:
    daemon, manager = managed
    daemon.process.send_signal(signal.SIGUSR2)  # type: ignore[union-attr]
    until(lambda: "Upgrading: the new master is pid" in daemon.log())
    new = int(daemon.log().rpartition("the new master is pid ")[2].split()[0])
    os.kill(new, signal.SIGSTOP)
    old = daemon.pid
    os.kill(old, signal.SIGHUP)
    refused = "Not reloaded: an upgrade is under way"
    (told,) = until(lambda: manager.received("STATUS", refused))
    assert "READY" in told
    (reloading,) = manager.received("RELOADING")
    assert manager.messages.index(reloading) < manager.messages.index(told)
    assert "Not reloaded, nothing has changed: an upgrade is under way" in daemon.log()
    state = daemon.status()
    assert state["last_reload"]["error"] == "an upgrade is under way"
    os.kill(new, signal.SIGCONT)
    until(lambda: daemon.pid != old)
    assert daemon.stop() == 0


def test_modules_cannot_speak_for_the_daemon(managed: tuple[Daemon, Manager]) -> None:
    daemon, _ = managed
    for pid in daemon.workers():
        environment = daemon.call("probe", "variables", ["NOTIFY_SOCKET", "WATCHDOG_USEC"])
        assert environment == {"NOTIFY_SOCKET": None, "WATCHDOG_USEC": None}, pid


# -- sockets that systemd has made --

EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def activated(new_daemon: NewDaemon) -> Iterator[tuple[Daemon, socket.socket]]:
    daemon = new_daemon("workers = 2")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(daemon.path)
        listening.listen(128)
        yield daemon, listening


def start_with(daemon: Daemon, listening: socket.socket) -> None:
    """Start it as systemd would, with the socket as descriptor 3."""

    daemon.process = subprocess.Popen(
        [
            *(sys.executable, "-c", EXEC, str(listening.fileno())),
            *(COMMAND, "run", "--config", str(daemon.config)),
        ],
        env={**daemon.environment, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(listening.fileno(),),
    )


def test_clients_that_came_before_the_daemon_are_served_and_the_socket_outlives_it(
    activated: tuple[Daemon, socket.socket],
) -> None:
    daemon, listening = activated
    inode = os.stat(daemon.path).st_ino
    body = b'{"module": "test", "function": "ping"}'
    for _ in range(2):
        with connect(daemon.path) as early:
            early.sendall(body)
            start_with(daemon, listening)
            assert b"pong" in early.recv(65536)
        until(lambda: " ready: pid " in daemon.log())
        assert one_shot(daemon.path, "test", "echo", [1])["result"] == [1]
        assert daemon.call("probe", "variables", ["LISTEN_FDS"]) == {"LISTEN_FDS": None}
        daemon.reload()
        assert daemon.stop() == 0
        assert os.stat(daemon.path).st_ino == inode
    with connect(daemon.path) as next_client:  # it waits for the next daemon
        next_client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            next_client.recv(1)


def test_a_killed_daemon_leaves_the_lent_socket_open(
    activated: tuple[Daemon, socket.socket],
) -> None:
    daemon, listening = activated
    start_with(daemon, listening)
    until(lambda: " ready: pid " in daemon.log())
    assert daemon.process is not None
    workers = daemon.workers()
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    with connect(daemon.path) as client:
        client.sendall(b'{"module": "test", "function": "ping"}')
        start_with(daemon, listening)
        assert b"pong" in client.recv(65536)
    assert daemon.stop() == 0


def test_an_upgrade_keeps_the_lent_socket(activated: tuple[Daemon, socket.socket]) -> None:
    daemon, listening = activated
    start_with(daemon, listening)
    until(lambda: " ready: pid " in daemon.log())
    daemon.upgrade()
    assert daemon.call("test", "echo", [1]) == [1]
    assert daemon.stop() == 0
    assert os.path.exists(daemon.path)


def test_a_lent_socket_that_is_removed_is_reported_and_not_bound_anew(
    activated: tuple[Daemon, socket.socket],
) -> None:
    daemon, listening = activated
    start_with(daemon, listening)
    until(lambda: " ready: pid " in daemon.log())
    for suffix in ("", ".ctl"):
        os.unlink(f"{daemon.path}{suffix}")
    until(lambda: "Made anew: " in daemon.log())
    status = daemon.status()
    assert status["unreachable"] == [daemon.path]
    problems = {each["path"]: each["problem"] for each in status["lost"]}
    assert "restart the daemon's .socket unit" in problems[daemon.path]
    assert problems[f"{daemon.path}.ctl"] is None
    assert not os.path.exists(daemon.path)
    assert daemon.stop() == 0


def test_a_socket_that_is_not_in_listen_is_reported(
    activated: tuple[Daemon, socket.socket],
) -> None:
    daemon, listening = activated
    daemon.config.write_text(
        daemon.config.read_text().replace(f'"{daemon.path}"', f'"{daemon.folder}/other.sock"')
    )
    start_with(daemon, listening)
    assert daemon.process is not None
    _, said = daemon.process.communicate(timeout=30)
    assert daemon.process.returncode == 1
    assert f"LISTEN_FDS: {daemon.path} is not in listen" in said.decode()


# -- the units --


def test_the_units_are_what_systemd_understands(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    version = subprocess.run(
        ["systemd-analyze", "--version"], capture_output=True, text=True, check=True
    ).stdout
    number = int(re.findall(r"systemd (\d+)", version)[0])
    service = (ETC / "cpanbridged.service").read_text()
    assert "/opt/cpanbridge/bin/cpanbridged run" in service
    service = service.replace("/opt/cpanbridge/bin/cpanbridged", COMMAND)
    if number < 253:  # it does not know the type; the file says what to put there
        service = service.replace("Type=notify-reload", "Type=notify")
    (tmp_path / "cpanbridged.service").write_text(service)
    shutil.copy(ETC / "cpanbridged.socket", tmp_path)
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            str(tmp_path / "cpanbridged.service"),
            str(tmp_path / "cpanbridged.socket"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
