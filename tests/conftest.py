"""Real daemons for the tests: each in its own folder, started and stopped by its own command."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
from plain_client import connect, one_shot, read_to_end, until

COMMAND = str(Path(sys.executable).with_name("cpanbridged"))
MODULES = Path(__file__).parent / "modules"
TEMPLATE = "cpanbridged: template"  # a template's title begins so
LOG = "cpanbridged: log"  # the log process's title

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure() -> None:
    """A shell ignores ^C for what it runs in the background, nohup HUP, and so do children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with those that wait longest: the others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("waits_long") is None)


def halt(pid: int) -> None:
    """Stop a worker once it has nothing to do; it does nothing from then on."""
    until(lambda: is_idle(pid))
    os.kill(pid, signal.SIGSTOP)
    # One thread gets the signal and, once it runs, stops the others. Until then they go on.
    until(lambda: _thread_states(pid) == {"T"})


def is_idle(pid: int) -> bool:
    """Whether all threads of a process wait for something."""
    return _thread_states(pid) == {"S"}


def _thread_states(pid: int) -> set[str]:
    """The states of a process's threads, by their letters in proc(5)."""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.add(stat.read_text().rpartition(")")[2].split()[0])
    return states


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process. Raises psutil.NoSuchProcess.

    psutil finds them by reading all processes of the machine, which takes too long for a poll.
    """
    try:
        lists = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        lists = []
    if not lists:
        raise psutil.NoSuchProcess(pid)
    return [int(child) for each in lists for child in each.split()]


class Daemon:
    """A daemon under test. `folder` holds its configuration, socket and log."""

    def __init__(self, folder: Path, config: str, environment: dict[str, str]) -> None:
        self.folder = folder
        self.path = str(folder / "d.sock")
        self.config = folder / "c.toml"
        self.log_file = folder / "d.log"
        self.environment = environment
        self.prefix: list[str] = []  # of the command: a program that runs it with other rights
        self.write_config(config)
        self.process: subprocess.Popen[bytes] | None = None

    def write_config(self, config: str) -> None:
        """Write the configuration: the socket, the tests' modules, and `config` after them.

        Top-level keys must come first in `config`, before any table.
        """
        self.replace_config(
            f'listen = ["{self.path}"]\n'
            f'log_file = "{self.log_file}"\n'
            f"{config}\n"
            f'[[module_dirs]]\npath = "{MODULES}"\naffinity = "none"\n'
        )

    def replace_config(self, text: str) -> None:
        """Put another file in its place, as a whole: a daemon that reads it now sees no half."""
        new = self.folder / "c.toml.new"
        new.write_text(text)
        new.replace(self.config)

    def will_run(self, patch: str) -> None:
        """Have what is started from now on, in this daemon's environment, run this code at first.

        It stands for code on disk that has changed. A running daemon must have been started with
        some, or the next master will not look for it.
        """
        folder = self.folder / "changed"
        folder.mkdir(exist_ok=True)
        self.environment["PYTHONPATH"] = str(folder)
        (folder / "sitecustomize.py").write_text(patch)

    def command(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run `cpanbridged ARGUMENTS --config ...` to its end."""
        return subprocess.run(
            [*self.prefix, COMMAND, arguments[0], "--config", str(self.config), *arguments[1:]],
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def run(self) -> "Daemon":
        """Start it in the foreground, as a child of the test, and wait until it is ready."""
        self.process = subprocess.Popen(
            [COMMAND, "run", "--config", str(self.config)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"it did not start: {self.log()}")
            return f" ready: pid {self.process.pid}," in self.log()

        until(ready, 60, "the daemon's start")
        return self

    @property
    def pid(self) -> int:
        """The master's process id; not the one that was started, after an upgrade."""
        pid_file = Path(f"{self.path}.pid")
        if pid_file.exists():
            return int(pid_file.read_text())
        assert self.process is not None
        return self.process.pid

    def workers(self) -> list[int]:
        """The process ids of the master's children, but for templates and the log process."""
        others = TEMPLATE, LOG
        return [pid for pid, title in self._children() if not title.startswith(others)]

    def templates(self) -> list[int]:
        """The process ids of its templates."""
        return [pid for pid, title in self._children() if title.startswith(TEMPLATE)]

    def log_processes(self) -> list[int]:
        """The process ids of its log processes."""
        return [pid for pid, title in self._children() if title.startswith(LOG)]

    def _children(self) -> Iterator[tuple[int, str]]:
        for pid in children_of(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if title:  # a zombie has none
                    yield pid, title.replace(b"\0", b" ").decode().strip()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop the workers for a while: what is sent now is there before a client is accepted."""
        workers = self.workers()
        for pid in workers:
            halt(pid)
        try:
            yield
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """The log so far."""
        return self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""

    def ask(self, data: bytes) -> list[dict[str, Any]]:
        """The master's replies to these bytes at its control socket, to the connection's end."""
        with connect(f"{self.path}.ctl") as connection:
            connection.sendall(data)
            return [json.loads(line) for line in read_to_end(connection).splitlines()]

    def control(self, command: str) -> dict[str, Any]:
        """The result of a command, from the master itself, whatever workers and gate do."""
        result: dict[str, Any] = self.ask(json.dumps({"command": command}).encode() + b"\n")[-1]
        return result["result"]  # type: ignore[no-any-return]

    def status(self) -> dict[str, Any]:
        """What `cpanbridged status --json` prints of a running daemon, without that command."""
        return self.control("status")

    def reload(self) -> None:
        """As `cpanbridged reload`, without that command. Fails when the reload does."""
        self.control("reload")

    def upgrade(self) -> None:
        """As `cpanbridged upgrade`, without that command. Fails when the upgrade does."""
        self.control("upgrade")
        until(lambda: self.status()["state"] == "running")

    def call(self, module: str, function: str, params: Any = None, **fields: Any) -> Any:
        """One one-shot call; its result. Fails when the call does."""
        reply = one_shot(self.path, module, function, params, **fields)
        assert reply["success"], reply
        return reply["result"]

    def metrics(self) -> dict[str, Any]:
        """`system.metrics`."""
        result: dict[str, Any] = self.call("system", "metrics")
        return result

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the master and wait for its end; returns its exit status."""
        assert self.process is not None
        pid = self.pid
        if pid == self.process.pid:
            self.process.send_signal(number)
        else:  # the one that was started has handed over
            os.kill(pid, number)
            until(lambda: not psutil.pid_exists(pid), 90, "the end of the master")
        self.process.communicate(timeout=90)
        return self.process.returncode

    def end(self) -> None:
        """As `cpanbridged stop`, without that command, for a daemon started in whatever way."""
        pid = self.pid
        if self.process is not None and self.process.pid == pid:
            assert self.stop() == 0
            return
        os.kill(pid, signal.SIGTERM)
        until(lambda: not psutil.pid_exists(pid), 90, "the end of the master")

    def clean_up(self) -> None:
        """Leave no process behind, whatever the test did."""
        running = self.process is not None and self.process.poll() is None
        masters = [self.process.pid] if self.process is not None and running else []
        pid_file = Path(f"{self.path}.pid")
        if pid_file.exists():  # one that `start` or an upgrade put in the background
            masters.append(int(pid_file.read_text()))
        pids = []
        for master in masters:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(master)
                # A left-over pid file may name a process of anybody's.
                if "cpanbridged" not in " ".join(process.cmdline()):
                    continue
                process.suspend()  # so that it replaces none of them
                pids += [master, *children_of(master)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.communicate()


NewDaemon = Callable[..., Daemon]


def close_wakeups(wakeups: Sequence[Sequence[int]]) -> None:
    """Close the wake-ups that a test has created."""
    for each in wakeups:
        for descriptor in each:
            os.close(descriptor)


class Clock:
    """CLOCK_MONOTONIC in the test's hand, for the modules that it is installed in."""

    def __init__(self) -> None:
        self.now = 10**15

    def install(self, monkeypatch: pytest.MonkeyPatch, *modules: types.ModuleType) -> None:
        fake = types.SimpleNamespace(monotonic_ns=lambda: self.now, time_ns=lambda: self.now)
        for module in modules:
            monkeypatch.setattr(module, "time", fake)


@pytest.fixture
def imports_undone() -> Iterator[None]:
    """What a test imports, and where it has Python look for it, is not there for the next one."""
    names = set(sys.modules)
    lists: list[list[Any]] = [sys.path, sys.meta_path, sys.path_hooks]
    before = [list(each) for each in lists]
    yield
    for name in set(sys.modules) - names:
        del sys.modules[name]
    for each, kept in zip(lists, before, strict=True):
        each[:] = kept
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()


@contextlib.contextmanager
def daemons() -> Iterator[NewDaemon]:
    """Make daemons, and leave nothing of them at the end."""
    made: list[Daemon] = []

    def make(config: str = "", **environment: str) -> Daemon:
        # Short, because a socket's path has 107 bytes at most.
        folder = Path(tempfile.mkdtemp(prefix="cb-", dir="/tmp"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CPAN_BRIDGE_")}
        daemon = Daemon(folder, config, kept | environment)
        made.append(daemon)
        return daemon

    try:
        yield make
    finally:
        faults = [daemon.log() for daemon in made if "step of the master" in daemon.log()]
        for daemon in made:
            daemon.clean_up()
            shutil.rmtree(daemon.folder, ignore_errors=True)
        assert not faults, faults[0]


@pytest.fixture
def new_daemon() -> Iterator[NewDaemon]:
    """Make daemons: `new_daemon(config, **environment)`; not started yet."""
    with daemons() as make:
        yield make


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """As `daemon`, but one for all tests of a file: for tests that leave it as it was."""
    with daemons() as make:
        yield make("workers = 2\nlimits.max_requests_per_minute = 0").run()


@pytest.fixture
def daemon(new_daemon: NewDaemon) -> Daemon:
    """A running daemon with two workers and limits that no test meets by chance."""
    return new_daemon("workers = 2\nlimits.max_requests_per_minute = 0").run()
