"""Starting, measuring and stopping the servers that the benchmarks run.

Shared by all scripts here. Everything is a child of the benchmark, in a temporary
folder, and stopped by its own pid.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import calls
import psutil

BENCH = Path(__file__).resolve().parent
READY_SECONDS = 30.0
STOP_SECONDS = 15.0


class BenchError(Exception):
    """A server cannot be found, started or called; the message has the remedy."""


def find_cpanbridged() -> str:
    """The daemon's command: beside this Python (a virtual environment), else on PATH."""
    beside = Path(sys.executable).parent / "cpanbridged"
    found = str(beside) if beside.exists() else shutil.which("cpanbridged")
    if found is None:
        raise BenchError(
            f"no cpanbridged beside {sys.executable} or on PATH: run this with the Python of the "
            "environment that it is installed in"
        )
    return found


def extract_revision(revision: str, folder: Path) -> dict[str, str]:
    """Extract a git revision's packages into `folder`; returns an environment that imports them."""
    packages = folder / "cpanbridge"
    packages.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(BENCH.parent), "archive", revision, "supervisor", "workers"],
        stdout=subprocess.PIPE,
        check=False,
    )
    if archive.returncode != 0:
        raise BenchError(f"{revision}: not a revision of this repository")
    subprocess.run(["tar", "-x", "-C", str(packages)], input=archive.stdout, check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


# For `more`: the same function, in a module whose calls go to the worker that has their state.
KEPT_MODULE = (
    "[modules.kept]",
    'import = "bench_echo"',
    'functions = ["echo"]',
    'affinity = "client"',
)


def daemon_config(
    folder: Path,
    workers: int,
    *,
    unlimited: bool,
    more: Sequence[str] = (),
    top: Sequence[str] = (),
) -> Path:
    """Write a configuration that listens in `folder`; `unlimited`: no limit is ever reached.

    `more` has further lines, such as another module's; `top` has lines before any table.
    """
    lines = [
        f'listen = ["{folder}/daemon.sock"]',
        f"workers = {workers}",
        f'log_file = "{folder}/daemon.log"',
        *top,
        f'python_path = ["{BENCH}/modules"]',
        "[modules.bench]",
        'import = "bench_echo"',
        'functions = ["echo", "nap", "count"]',
        *more,
    ]
    if unlimited:
        lines += [
            "[limits]",
            "max_requests_per_minute = 0",
            "max_connections = 1000",
            "max_concurrent_requests = 1000",
            "max_memory_mb = 8192",
            "max_cpu_percent = 100000.0",
        ]
    path = folder / "daemon.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(path: Path) -> dict[str, Any]:
    """The benchmarks' call, one-shot; raises OSError while no server listens."""
    return send_call(path, json.loads(calls.request()))


def send_call(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Make a one-shot call; returns the reply."""
    reply: dict[str, Any] = json.loads(exchange(path, json.dumps(request).encode()))
    return reply


def exchange(path: Path, request: bytes) -> bytes:
    """Send a request and read until the server closes the connection; returns what it sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(request)
        received = b""
        while more := connection.recv(65536):
            received += more
    return received


def call_web(path: Path, request: bytes) -> dict[str, Any]:
    """One call of a WSGI server; raises ValueError if the body of its answer is not JSON."""
    reply: dict[str, Any] = json.loads(exchange(path, request).partition(b"\r\n\r\n")[2])
    return reply


def call_framed(path: Path) -> dict[str, Any]:
    """One framed call on a connection of its own; raises OSError while no server listens."""
    with connect_framed(path) as connection, connection.makefile("rb") as stream:
        length = int.from_bytes(stream.read(4), "big")
        reply: dict[str, Any] = json.loads(stream.read(length))
    return reply


def connect_framed(path: Path) -> socket.socket:
    """A kept connection with one call sent; its reply is still to be read."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(str(path))
    message = calls.request()
    connection.sendall(len(message).to_bytes(4, "big") + message)
    return connection


@contextlib.contextmanager
def running(
    command: list[str],
    path: Path,
    output: Path,
    trial: Callable[[Path], dict[str, Any]] = call,
    environment: dict[str, str] | None = None,
) -> Iterator[psutil.Process]:
    """Run a server until the block ends; enters it once a call to `path` has succeeded.

    `trial` makes that call, and raises OSError or ValueError while there is no answer. The server's
    stdout and stderr go to the file `output`, which an error message quotes. `environment` replaces
    this process's own.
    """
    with output.open("wb") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _wait_until_ready(child, path, output, trial)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Its workers end by themselves when the master has ended.
            child.kill()
            child.wait()
            print(
                f"{command[0]} didn't stop on SIGTERM within {STOP_SECONDS:g} s; killed",
                file=sys.stderr,
            )


def _wait_until_ready(
    child: subprocess.Popen[bytes],
    path: Path,
    output: Path,
    trial: Callable[[Path], dict[str, Any]],
) -> None:
    deadline = time.monotonic() + READY_SECONDS
    last = "no answer"
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise BenchError(f"{child.args!r} ended at once:\n{_log_of(output)}")
        try:
            reply = trial(path)
        except (OSError, ValueError) as error:
            last = repr(error)
        else:
            if reply.get("success"):
                return
            last = json.dumps(reply)
        time.sleep(0.02)
    raise BenchError(
        f"{child.args!r} isn't ready after {READY_SECONDS:g} s: {last}\n{_log_of(output)}"
    )


def _log_of(output: Path) -> str:
    logs = [output, output.parent / "daemon.log"]
    return "\n".join(log.read_text(errors="replace")[-4000:] for log in logs if log.exists())


def tree(master: psutil.Process) -> list[psutil.Process]:
    """The master and everything below it."""
    return [master, *master.children(recursive=True)]


def cpu_seconds(master: psutil.Process) -> float:
    """CPU time of the tree so far, including ended children that it has waited for.

    From /proc/PID/stat, which counts in ticks of 10 ms per process.
    """
    total = 0.0
    # The children first: the CPU time of a child that ends meanwhile is then read from its parent.
    for process in reversed(tree(master)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pss_bytes(process: psutil.Process, part: str = "Pss") -> int:
    """The process's proportional set size: a page of k processes counts 1/k in each.

    `part` may be "Pss_Anon": without mapped files, such as Python's own library.
    """
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = re.search(rf"^{part}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise BenchError(f"/proc/{process.pid}/smaps_rollup has no {part} line")
    return int(found[1]) * 1024


def tree_pss_bytes(processes: Sequence[psutil.Process], part: str = "Pss") -> int:
    """Memory of all `processes`; one that has just ended counts as 0."""
    total = 0
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, BenchError):
            total += pss_bytes(process, part)
    return total
