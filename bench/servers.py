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
    """A server that can't be found, started or called; the message says what to do."""


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
    """Put a git revision's packages into `folder`; the environment in which they are imported."""
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


# For `more`: the same function where a client's calls all go to the worker that has its state.
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

    `more` is further lines, such as another module's; `top` those before any table.
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
    """The benchmarks' call, one-shot; raises OSError while nobody listens."""
    return send_call(path, json.loads(calls.request()))


def send_call(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Any one-shot call."""
    reply: dict[str, Any] = json.loads(exchange(path, json.dumps(request).encode()))
    return reply


def exchange(path: Path, request: bytes) -> bytes:
    """What a server answers on a connection that it closes after its reply."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(request)
        received = b""
        while more := connection.recv(65536):
            received += more
    return received


def call_web(path: Path, request: bytes) -> dict[str, Any]:
    """One call of a WSGI server; ValueError when it answers something else."""
    reply: dict[str, Any] = json.loads(exchange(path, request).partition(b"\r\n\r\n")[2])
    return reply


def call_framed(path: Path) -> dict[str, Any]:
    """One framed call on a connection of its own; raises OSError while nobody listens."""
    with connect_framed(path) as connection, connection.makefile("rb") as stream:
        length = int.from_bytes(stream.read(4), "big")
        reply: dict[str, Any] = json.loads(stream.read(length))
    return reply


def connect_framed(path: Path) -> socket.socket:
    """A kept connection on which one call was sent, and not yet answered."""
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
    stdout and stderr go to the file `output`, which an error quotes. `environment` is in the place
    of this process's.
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
            # Its workers end by themselves when their master is gone.
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
    """CPU time of the tree so far, with what it has waited for (children that ended).

    From /proc/PID/stat, which counts in ticks of 10 ms per process.
    """
    total = 0.0
    # The children first: what one has used that ends meanwhile counts in who has waited for it.
    for process in reversed(tree(master)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pss_bytes(process: psutil.Process, part: str = "Pss") -> int:
    """The process's proportional share of memory: a page of k processes counts 1/k in each.

    `part` may be "Pss_Anon": without the files that are mapped, such as Python's own library.
    """
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = re.search(rf"^{part}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise BenchError(f"/proc/{process.pid}/smaps_rollup has no {part} line")
    return int(found[1]) * 1024


def tree_pss_bytes(processes: Sequence[psutil.Process], part: str = "Pss") -> int:
    """Memory of them all; one that has just ended counts as nothing."""
    total = 0
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, BenchError):
            total += pss_bytes(process, part)
    return total
