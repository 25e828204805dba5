"""What memory a worker, a connection and a heavy module cost.

    memory.py [--connections 500] [--json] [--write]

Memory is PSS, in which a page that k processes share counts 1/k in each, summed over the daemon's
tree. What the kernel holds for a socket isn't in it.
"""

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pages
import psutil
from rows import versions
from servers import (
    BenchError,
    connect_framed,
    daemon_config,
    find_cpanbridged,
    running,
    tree,
    tree_pss_bytes,
)

SETTLE_SECONDS = 1.0
FEW, MANY = 1, 8  # workers
HEAVY_WORKERS = 4
HEAVY = ["[modules.heavy]", 'import = "bench_heavy"', 'functions = ["entries"]']


@dataclass
class Memory:
    """All in bytes."""

    one_worker: int  # the whole tree, with one worker
    per_worker: float  # each further one
    per_connection: float  # a kept one that has made a call, with its thread
    four_workers: int  # the whole tree
    four_heavy_workers: int  # the same with a module of 50 MB


@contextlib.contextmanager
def daemon(workers: int, more: Sequence[str] = ()) -> Iterator[tuple[psutil.Process, Path]]:
    """Run one with so many workers; gives its master and its socket."""
    with tempfile.TemporaryDirectory(prefix="cpanbridged-bench-") as name:
        folder = Path(name)
        config = daemon_config(folder, workers, unlimited=True, more=more)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        path = folder / "daemon.sock"
        with running(command, path, folder / "daemon.out") as master:
            time.sleep(SETTLE_SECONDS)
            yield master, path


def tree_bytes(workers: int, more: Sequence[str] = ()) -> int:
    """What a daemon takes that nobody calls."""
    with daemon(workers, more) as (master, _):
        return tree_pss_bytes(tree(master))


def connection_bytes(connections: int) -> float:
    """What each of so many kept connections adds."""
    with daemon(2) as (master, path), contextlib.ExitStack() as stack:
        before = tree_pss_bytes(tree(master))
        for _ in range(connections):
            connection = stack.enter_context(connect_framed(path))
            if not connection.recv(65536):
                raise BenchError("the daemon has closed a connection")
        time.sleep(SETTLE_SECONDS)
        return (tree_pss_bytes(tree(master)) - before) / connections


def markdown(found: Memory, connections: int) -> str:
    """The figures as a table."""
    heavy = found.four_heavy_workers - found.four_workers
    return "\n".join(
        [
            "|  | MB |",
            "| --- | --- |",
            f"| the daemon with one worker | {found.one_worker / 1e6:.1f} |",
            f"| each further worker | {found.per_worker / 1e6:.2f} |",
            f"| each kept connection (of {connections}) | {found.per_connection / 1e6:.3f} |",
            f"| the daemon with four workers | {found.four_workers / 1e6:.1f} |",
            f"| the same with a module of 50 MB | {found.four_heavy_workers / 1e6:.1f} |",
            f"| what the module takes in each of the four | {heavy / HEAVY_WORKERS / 1e6:.1f} |",
            "",
        ]
    )


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description="Memory of workers, connections and modules.")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"write into {pages.PAGE.name}")
    options = parser.parse_args()
    try:
        few, many = tree_bytes(FEW), tree_bytes(MANY)
        found = Memory(
            one_worker=few,
            per_worker=(many - few) / (MANY - FEW),
            per_connection=connection_bytes(options.connections),
            four_workers=tree_bytes(HEAVY_WORKERS),
            four_heavy_workers=tree_bytes(HEAVY_WORKERS, HEAVY),
        )
        if options.json:
            print(json.dumps({"versions": versions(), **asdict(found)}))
            return 0
        text = pages.heading(shlex.join(["bench/memory.py", *sys.argv[1:]]))
        text += "\n" + markdown(found, options.connections)
        print(text)
        if options.write:
            pages.write("memory", text)
    except BenchError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
