"""Starting, measuring and stopping the servers that the benchmarks run.

Shared by `compare.py` and `idle.py`. Everything is a child of the benchmark, in a temporary
folder, and stopped by its own pid.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

BENCH = Path(__file__).resolve().parent
READY_SECONDS = 30.0
STOP_SECONDS = 15.0

REQUEST = {
    "module": "bench",
    "function": "echo",
    "params": {"id": 42, "name": "report", "fields": ["title", "price"], "ratio": 0.25},
    "request_id": "bench-1",
}


class BenchError(Exception):
    """A server that can't be found, started or called; the message says what to do."""


def request_bytes() -> bytes:
    """The call that every benchmark makes, as JSON without needless spaces."""
    return json.dumps(REQUEST, separators=(",", ":")).encode()


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


def daemon_config(folder: Path, workers: int, *, unlimited: bool) -> Path:
    """Write a configuration that listens in `folder`; `unlimited`: no limit is ever reached."""
    lines = [
        f'listen = ["{folder}/daemon.sock"]',
        f"workers = {workers}",
        f'log_file = "{folder}/daemon.log"',
        f'python_path = ["{BENCH}/modules"]',
        "[modules.bench]",
        'import = "bench_echo"',
        'functions = ["echo"]',
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
    """One one-shot call; raises OSError while nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(request_bytes())
        received = b""
        while more := connection.recv(65536):
            received += more
    reply: dict[str, Any] = json.loads(received)
    return reply


def call_framed(path: Path) -> dict[str, Any]:
    """One framed call on a connection of its own; raises OSError while nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        message = request_bytes()
        connection.sendall(len(message).to_bytes(4, "big") + message)
        with connection.makefile("rb") as stream:
            length = int.from_bytes(stream.read(4), "big")
            reply: dict[str, Any] = json.loads(stream.read(length))
    return reply


@contextlib.contextmanager
def running(
    command: list[str],
    path: Path,
    output: Path,
    form: str = "oneshot",
    environment: dict[str, str] | None = None,
) -> Iterator[psutil.Process]:
    """Run a server until the block ends; enters it once a call to `path` has succeeded.

    The server's stdout and stderr go to the file `output`, which an error quotes. `environment` is
    in the place of this process's.
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
        _wait_until_ready(child, path, output, form)
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


def _wait_until_ready(child: subprocess.Popen[bytes], path: Path, output: Path, form: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    trial = call if form == "oneshot" else call_framed
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
    for process in tree(master):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total
