"""`cpanbridged top`: what it shows on a terminal, in any state of the daemon, and how it ends."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import COMMAND, Daemon, NewDaemon
from plain_client import one_shot, until

from cpanbridge.supervisor.control.top import keyboard

_HOME = "\x1b[H"  # every screen is drawn from there
_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`cpanbridged top` on a terminal of its own."""

    def __init__(self, daemon: Daemon, *flags: str, size: tuple[int, int] = (80, 24)) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(*size)
        self.attributes = termios.tcgetattr(self.slave)
        self._written = ""
        self.process = subprocess.Popen(
            [COMMAND, "top", "--config", str(daemon.config), *flags],
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.PIPE,
            # A shell may have exported another size than the terminal has.
            env={**daemon.environment, "TERM": "xterm", "COLUMNS": "200", "LINES": "99"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.set_blocking(self.master, False)

    def resize(self, columns: int, rows: int) -> None:
        """Set the size, as a terminal emulator does when its window is resized."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def written(self) -> str:
        """All that it has written so far."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.master, 65536):
                self._written += piece.decode("utf-8", "replace")
        return self._written

    def screen(self) -> str:
        """The last screen that it has drawn, without colours."""
        return _SEQUENCES.sub("", self.written().rpartition(_HOME)[2])

    def shows(self, pattern: str) -> re.Match[str]:
        """Wait until it shows this."""
        found: re.Match[str] = until(
            lambda: re.search(pattern, self.screen(), re.MULTILINE), 30, pattern
        )
        return found

    def ends(self) -> int:
        """Wait for its end and check that the terminal is restored; returns its exit status."""

        def ended() -> bool:
            self.written()  # a full terminal would block it
            return self.process.poll() is not None

        until(ended)
        assert self.written().endswith("\x1b[?25h\x1b[?1049l")  # the cursor, the usual screen
        assert termios.tcgetattr(self.slave) == self.attributes
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        os.close(self.master)
        os.close(self.slave)


Top = Callable[..., Terminal]


@pytest.fixture
def top() -> Iterator[Top]:
    """`top(daemon, *flags, size=...)`: one that samples ten times a second."""
    terminals: list[Terminal] = []

    def start(daemon: Daemon, *flags: str, **size: Any) -> Terminal:
        terminals.append(Terminal(daemon, *(flags or ("--interval", "0.1")), **size))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def test_it_shows_the_load_the_workers_the_functions_and_the_errors(
    daemon: Daemon, top: Top
) -> None:
    for _ in range(3):
        daemon.call("test", "echo", True)
    assert not one_shot(daemon.path, "probe", "fail", ["on purpose"])["success"]
    terminal = top(daemon)
    terminal.shows(rf"^cpanbridged \S+  running  pid {daemon.pid}  generation 1  up 0h ")
    terminal.shows(r"^gate open for ")
    terminal.shows(r"^memory +\[\|* *\]  [1-9]\d*\.\d of 1024MB")
    terminal.shows(r"requests/min +\[ *\]  4, no limit")
    terminal.shows(r"running +\[ *\]  0 of 100")
    terminal.shows(r"connections +\[ *\]  0 of 100")
    terminal.shows(r"^\d+\.\d calls/s, 0\.0 failed/s  p50 \S+ m?s  p95 .* total 4")
    for pid in daemon.workers():
        terminal.shows(rf"^ +[01] +{pid} +1 +\d+\.\dMB +0 +0 +0 +\d+ +\S+  serves")
    terminal.shows(r"^test\.echo +3 +\S+ +\S+ +\S+ +0\s")
    terminal.shows(r"^probe\.fail +1 +\S+ +\S+ +\S+ +1\s")
    terminal.shows(r"^\d\d:\d\d:\d\d  probe\.fail  on purpose")


@pytest.mark.parametrize("size", [(80, 24), (60, 12), (132, 50)])
def test_no_screen_is_larger_than_the_terminal(
    shared_daemon: Daemon, top: Top, size: tuple[int, int]
) -> None:
    daemon = shared_daemon
    for number in range(30):
        one_shot(daemon.path, "probe", "fail", [f"{number} " + 200 * "long "])
    terminal = top(daemon, size=size)
    terminal.shows("^gate open")
    until(lambda: terminal.written().count(_HOME) > 3)
    lines = terminal.screen().splitlines()
    assert len(lines) <= size[1]
    assert max(map(len, lines)) <= size[0]
    if size >= (80, 24):
        terminal.shows(r"^probe\.fail ")
        terminal.shows(r"^\d\d:\d\d:\d\d +probe\.fail +29 long")


def test_control_characters_of_clients_reach_the_terminal_escaped(
    shared_daemon: Daemon, top: Top
) -> None:
    daemon = shared_daemon
    one_shot(daemon.path, "probe", "fail", ["\x1b]0;mine\x07 \x9b31m [red]\nnext"])
    terminal = top(daemon)
    terminal.shows(re.escape(r"\x1b]0;mine\x07 \x9b31m [red]\nnext"))
    assert "\x1b]" not in terminal.written()
    assert "\x9b" not in terminal.written()


def test_it_is_redrawn_when_the_terminal_is_resized(shared_daemon: Daemon, top: Top) -> None:
    daemon = shared_daemon
    for number in range(30):
        one_shot(daemon.path, "probe", "fail", [str(number)])
    terminal = top(daemon, "--interval", "3600")
    terminal.shows(r"^error \(\d+ of \d+\)")
    terminal.resize(120, 60)
    terminal.shows(r"^error +in ")


def test_the_keys_t_and_c_order_the_functions(daemon: Daemon, top: Top) -> None:
    daemon.call("probe", "nap", [0.3])
    for _ in range(5):
        daemon.call("test", "echo", True)
    terminal = top(daemon, "--interval", "3600")
    terminal.shows(r"^probe\.nap [^^]*\ntest\.echo")
    terminal.type(b"c")
    terminal.shows(r"^test\.echo [^^]*\nprobe\.nap")
    terminal.type(b"t")
    terminal.shows(r"^probe\.nap [^^]*\ntest\.echo")


def test_throughput_is_that_since_the_last_sample(shared_daemon: Daemon, top: Top) -> None:
    daemon = shared_daemon
    terminal = top(daemon)
    terminal.shows(r"^0\.0 calls/s")

    def called() -> re.Match[str] | None:
        daemon.call("test", "echo", True)
        return re.search(r"^[1-9]\d*\.\d calls/s", terminal.screen(), re.MULTILINE)

    until(called)
    terminal.shows(r"^0\.0 calls/s")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda terminal: terminal.type(b"q"), 0),
        (lambda terminal: terminal.type(b"\x03"), 0),
        (lambda terminal: terminal.process.terminate(), 128 + signal.SIGTERM),
    ],
    ids=["q", "^C", "TERM"],
)
def test_it_ends_and_leaves_the_terminal_as_it_was(
    shared_daemon: Daemon, top: Top, end: Callable[[Terminal], None], status: int
) -> None:
    terminal = top(shared_daemon, "--interval", "3600")
    terminal.shows("^gate open")
    end(terminal)
    assert terminal.ends() == status
    assert terminal.process.stderr is not None
    assert terminal.process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_during_finalization_is_not_lost(
    number: signal.Signals,
) -> None:
    with keyboard() as keys:
        for _ in range(2):
            with contextlib.suppress(BaseException):  # as what `__del__` raises is
                signal.raise_signal(number)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                keys.wait(20)


def test_it_says_that_the_daemon_has_ended_and_goes_on_with_the_next(
    new_daemon: NewDaemon, top: Top
) -> None:
    daemon = new_daemon("workers = 2")
    assert daemon.command("start").returncode == 0
    first = daemon.pid
    terminal = top(daemon)
    terminal.shows(f"pid {first} ")
    daemon.end()
    terminal.shows(f"^not running at {re.escape(daemon.path)}")
    assert daemon.command("start").returncode == 0
    terminal.shows(f"pid {daemon.pid} ")
    terminal.shows("^gate open")
    terminal.type(b"q")
    assert terminal.ends() == 0
    daemon.end()


def test_it_says_that_the_master_does_not_answer(shared_daemon: Daemon, top: Top) -> None:
    daemon = shared_daemon
    terminal = top(daemon)
    terminal.shows("^gate open")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        terminal.shows("^the master does not answer within 3 s")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    terminal.shows("^gate open")


def test_it_shows_why_the_gate_is_closed(new_daemon: NewDaemon, top: Top) -> None:
    daemon = new_daemon("workers = 2\nlimits = {max_memory_mb = 100, memory_grace = 600}").run()
    terminal = top(daemon)
    terminal.shows("^gate open")
    daemon.call("probe", "hoard", [150])
    terminal.shows(r"^gate CLOSED for 0h 0m \d+s")
    terminal.shows(r"^Memory usage \d+\.\dMB exceeds limit 100MB")
    terminal.shows(r"^memory +\[\|{10}\]  \d+\.\d of 100MB")
    daemon.stop(signal.SIGQUIT)


def test_it_shows_a_daemon_whose_workers_are_all_stopped(shared_daemon: Daemon, top: Top) -> None:
    daemon = shared_daemon
    with daemon.held():
        terminal = top(daemon)
        for pid in daemon.workers():
            terminal.shows(rf" {pid} .* serves")


def test_once_prints_one_screen_and_needs_no_terminal(daemon: Daemon) -> None:
    for _ in range(3):
        daemon.call("test", "echo", True)
    for number in range(12):
        one_shot(daemon.path, "probe", "fail", [str(number)])
    done = daemon.command("top", "--once", "--interval", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\ngate open for " in done.stdout
    assert "\ntest.echo " in done.stdout
    assert len(re.findall(r"^\d\d:\d\d:\d\d  probe\.fail ", done.stdout, re.MULTILINE)) == 12


def test_without_a_terminal_it_is_exit_status_2(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    done = daemon.command("top")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cpanbridged: top needs a terminal; --once prints one screen\n"


def test_without_a_daemon_it_is_exit_status_3(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    done = daemon.command("top", "--once")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"cpanbridged: not running at {daemon.path}\n"
