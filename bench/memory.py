"""The memory of a worker, a connection, a session and a large module.

    memory.py [--connections 500] [--sessions 200] [--json] [--write]

Memory is PSS, in which a page that k processes share counts 1/k in each, summed over the daemon's
tree. The kernel's memory for sockets is not in it.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import pages
import psutil
from rows import versions
from servers import (
    BenchError,
    connect_framed,
    daemon_config,
    find_cpanbridged,
    running,
    send_call,
    tree,
    tree_pss_bytes,
)

SETTLE_SECONDS = 1.0
READ_SECONDS = 30.0
FEW, MANY = 1, 8  # workers
HEAVY_WORKERS = 4
HEAVY = ["[modules.heavy]", 'import = "bench_heavy"', 'functions = ["entries", "read"]']
OWN = ["[modules.own]", 'import = "bench_echo"', 'functions = ["echo"]', 'affinity = "client"']
SLOW = ["[modules.slow]", 'import = "bench_slow"', 'functions = ["done"]']
STARTS = 3
PRELOAD = {True: "preload = true", False: "preload = false"}


@dataclass
class Heavy:
    """Four workers with a module of 50 MB; bytes of the whole tree."""

    without: int  # before the module is added
    loaded: int  # with the module
    read: int  # when each worker has read every object in it
    start_seconds: float  # of MANY workers and a slow module, from the command to the first reply


@dataclass
class Memory:
    """All in bytes."""

    one_worker: int  # the whole tree, with one worker
    per_worker: float  # each further worker
    per_connection: float  # a kept one that has made a call
    per_session: float  # a client process that has state in a worker, and no connection now
    shared: Heavy  # preload = true
    apart: Heavy  # preload = false


@contextlib.contextmanager
def daemon(
    workers: int, more: Sequence[str] = (), *, preload: bool = True
) -> Iterator[tuple[psutil.Process, Path]]:
    """Run a daemon with `workers` workers; yields its master and its socket."""
    with tempfile.TemporaryDirectory(prefix="cpanbridged-bench-") as name:
        folder = Path(name)
        top = [PRELOAD[preload]]
        config = daemon_config(folder, workers, unlimited=True, more=more, top=top)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        path = folder / "daemon.sock"
        with running(command, path, folder / "daemon.out") as master:
            yield master, path


def settled_bytes(master: psutil.Process, part: str = "Pss") -> int:
    """The memory of a daemon without calls; `part` as for `pss_bytes`."""
    time.sleep(SETTLE_SECONDS)
    return tree_pss_bytes(tree(master), part)


def tree_bytes(workers: int, *, preload: bool = True) -> int:
    """The memory of a daemon that has run no call yet."""
    with daemon(workers, preload=preload) as (master, _):
        return settled_bytes(master)


def connection_bytes(connections: int) -> float:
    """What each of `connections` kept connections adds."""
    with daemon(2) as (master, path), contextlib.ExitStack() as stack:
        before = settled_bytes(master)
        for _ in range(connections):
            connection = stack.enter_context(connect_framed(path))
            if not connection.recv(65536):
                raise BenchError("the daemon has closed a connection")
        return (settled_bytes(master) - before) / connections


def session_bytes(sessions: int) -> float:
    """What each client process adds that has called a module of affinity `client`."""
    with daemon(2, OWN) as (master, path), contextlib.ExitStack() as stack:
        _one_shot(path, "own", "echo")
        # The clients are Python processes as well, and share the files that the daemon has mapped.
        before = settled_bytes(master, "Pss_Anon")
        stack.enter_context(clients(sessions, lambda: _one_shot(path, "own", "echo")))
        return (settled_bytes(master, "Pss_Anon") - before) / sessions


@contextlib.contextmanager
def clients(count: int, work: Callable[[], object]) -> Iterator[None]:
    """`count` processes that have done `work`, and live until the block ends."""
    stop, keep = os.pipe()
    pids = []
    try:
        for _ in range(count):
            done, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(keep)
                _be_client(work, stop, tell)
            pids.append(pid)
            os.close(tell)
            worked = os.read(done, 1)  # one after another: contention is not measured
            os.close(done)
            if not worked:
                raise BenchError("a client's call has failed")
        yield
    finally:
        os.close(keep)
        os.close(stop)
        for pid in pids:
            os.waitpid(pid, 0)


def _be_client(work: Callable[[], object], stop: int, tell: int) -> NoReturn:
    try:
        work()
        os.write(tell, b".")
        os.read(stop, 1)
    finally:
        os._exit(0)


def heavy(*, preload: bool) -> Heavy:
    """The memory of a large module, imported once for all workers or by each."""
    without = tree_bytes(HEAVY_WORKERS, preload=preload)
    with daemon(HEAVY_WORKERS, HEAVY, preload=preload) as (master, path):
        loaded = settled_bytes(master)
        _read_in_each_worker(path)
        read = settled_bytes(master)
    seconds = statistics.median(start_seconds(preload=preload) for _ in range(STARTS))
    return Heavy(without, loaded, read, seconds)


def start_seconds(*, preload: bool) -> float:
    """The start of a daemon with a slow module, in seconds from the command to its first reply."""
    began = time.monotonic()
    with daemon(MANY, SLOW, preload=preload):
        return time.monotonic() - began


def _read_in_each_worker(path: Path) -> None:
    seen = set[object]()
    until = time.monotonic() + READ_SECONDS
    with ThreadPoolExecutor(HEAVY_WORKERS) as pool:
        while len(seen) < HEAVY_WORKERS:
            if time.monotonic() > until:
                raise BenchError(f"only {len(seen)} workers have answered")
            seen.update(pool.map(lambda _: _one_shot(path, "heavy", "read"), range(HEAVY_WORKERS)))


def _one_shot(path: Path, module: str, function: str) -> object:
    reply = send_call(path, {"module": module, "function": function})
    if not reply["success"]:
        raise BenchError(reply["error"])
    return reply["result"]


def markdown(found: Memory, options: argparse.Namespace) -> str:
    """The figures as tables."""

    def row(text: str, value: Callable[[Heavy], float], form: str = ".1f") -> str:
        return f"| {text} | {value(found.shared):{form}} | {value(found.apart):{form}} |"

    def added(each: Heavy) -> float:
        return (each.loaded - each.without) / HEAVY_WORKERS / 1e6

    return "\n".join(
        [
            "|  | bytes |",
            "| --- | --- |",
            f"| the daemon with one worker | {found.one_worker:,} |",
            f"| each further worker (of {MANY}) | {found.per_worker:,.0f} |",
            f"| each kept connection (of {options.connections}) | {found.per_connection:,.0f} |",
            f"| each session (of {options.sessions}) | {found.per_session:,.0f} |",
            "",
            f"Four workers and a module of 50 MB of Python objects, in MB (10^6 bytes), as "
            f"`{PRELOAD[True]}` (the default) has it and `{PRELOAD[False]}`:",
            "",
            "|  | imported once | by each worker |",
            "| --- | --- | --- |",
            row("the daemon without the module", lambda each: each.without / 1e6),
            row("with it", lambda each: each.loaded / 1e6),
            row("what it takes for each worker", added),
            row("when each worker has looked at every object", lambda each: each.read / 1e6),
            row(
                f"seconds until {MANY} workers serve, whose module computes for 0.3 s at import",
                lambda each: each.start_seconds,
                ".2f",
            ),
            "",
        ]
    )


def main() -> int:
    """Measure, print, and write the page with --write."""
    parser = argparse.ArgumentParser(description="Memory of workers, connections and modules.")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"write into {pages.PAGE.name}")
    options = parser.parse_args()
    try:
        few, many = tree_bytes(FEW), tree_bytes(MANY)
        found = Memory(
            one_worker=few,
            per_worker=(many - few) / (MANY - FEW),
            per_connection=connection_bytes(options.connections),
            per_session=session_bytes(options.sessions),
            shared=heavy(preload=True),
            apart=heavy(preload=False),
        )
        if options.json:
            print(json.dumps({"versions": versions(), **asdict(found)}))
            return 0
        text = pages.heading(shlex.join(["bench/memory.py", *sys.argv[1:]]))
        text += "\n" + markdown(found, options)
        print(text)
        if options.write:
            pages.write("memory", text)
    except BenchError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
