"""What affinity costs: calls that are handed off, kept connections, and a thousand sessions.

    affinity.py [--seconds 2] [--rounds 3] [--sessions 1000]

One daemon with 2 workers has the same function in a module without affinity and in one of affinity
"client". The runs alternate, and each round gives one ratio to the module without affinity.

A reload makes every call be handed off: a process makes its first call, the daemon reloads, and the
process becomes the load generator (exec keeps pid and start time, and so the session). Its owner
drains and accepts no clients, so every call arrives in another worker.

All calls of one client process run in one worker. So its throughput shows the capacity of one
worker, whatever a hand-off costs. The cost of a hand-off is the whole daemon's CPU time per call.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calls
import psutil
from load import build_load
from servers import (
    KEPT_MODULE,
    BenchError,
    cpu_seconds,
    daemon_config,
    exchange,
    find_cpanbridged,
    running,
)

SETTLING_SECONDS = 0.5

Report = dict[str, Any]


def call_kept(path: Path) -> bool:
    """Call the module that keeps state; whether that succeeded."""
    return bool(json.loads(exchange(path, calls.request(module="kept")))["success"])


class Bench:
    """The daemon, and the runs that are made against it."""

    def __init__(
        self, program: Path, path: Path, master: psutil.Process, options: argparse.Namespace
    ) -> None:
        self._program = program
        self._path = path
        self._master = master
        self._options = options

    def plain(self, form: str, clients: int, module: str = "bench") -> Report:
        """One run of the load generator, as a client process that has no session yet."""
        before = cpu_seconds(self._master)
        return self._run([], module, form, clients, before)

    def handed_off(self, form: str, clients: int) -> Report:
        """One run in which the owner of the client's session accepts no clients."""
        cpu_file = self._path.with_suffix(".cpu")
        config = str(self._path.with_suffix(".toml"))
        become = ["--become", str(self._path), config, str(self._master.pid), str(cpu_file)]
        return self._run([sys.executable, __file__, *become], "kept", form, clients, cpu_file)

    def _run(
        self, become: list[str], module: str, form: str, clients: int, before: float | Path
    ) -> Report:
        """`before` is the daemon's CPU seconds when the load began, or the file that has them."""
        seconds = self._options.seconds
        command = [
            *become,
            *(str(self._program), f"--socket={self._path}", f"--clients={clients}"),
            *(f"--seconds={seconds}", f"--form={form}", "--request=-"),
        ]
        done = subprocess.run(
            command,
            input=calls.request(module=module),
            stdout=subprocess.PIPE,
            check=False,
            timeout=90,
        )
        if not done.stdout:
            raise BenchError(f"{' '.join(command)}: exit status {done.returncode}")
        report: Report = json.loads(done.stdout)
        if report["errors"] or report["unanswered"]:
            raise BenchError(f"{module}, {form}: {report}")
        if isinstance(before, Path):
            before = float(before.read_text())
        report["cpu_us"] = (cpu_seconds(self._master) - before) / report["calls"] * 1e6
        return report


def become(path: str, config: str, master: int, cpu_file: str, command: list[str]) -> None:
    """Begin a session, reload the daemon, and become the load generator."""
    if not call_kept(Path(path)):
        raise BenchError("the first call failed")
    subprocess.run(
        [find_cpanbridged(), "reload", "--config", config], check=True, stdout=subprocess.DEVNULL
    )
    time.sleep(SETTLING_SECONDS)  # until workers without sessions have ended
    Path(cpu_file).write_text(str(cpu_seconds(psutil.Process(master))))
    os.execv(command[0], command)


@contextlib.contextmanager
def silent_clients(path: Path, count: int) -> Iterator[None]:
    """Client processes that have a session each, and send nothing."""
    children = []
    for _ in range(count):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                call_kept(path)
                os.write(write_end, b"+")
                signal.pause()
            os._exit(0)
        children.append(child)
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def show(title: str, rounds: list[tuple[Report, Report]], field: str, unit: str) -> None:
    """One line: the medians of both, and the ratio of each round."""
    first, second = (statistics.median(pair[n][field] for pair in rounds) for n in (0, 1))
    each = [pair[1][field] / pair[0][field] for pair in rounds]
    print(
        f"{title:44}{first:9.0f}{second:9.0f} {unit:8}"
        f"{statistics.median(each):6.2f} ({min(each):.2f} to {max(each):.2f})"
    )


def measure(bench: Bench, path: Path, options: argparse.Namespace) -> None:
    """Run everything, and print one line per measurement."""
    print(f"{'':44}{'without':>9}{'with':>9} {'':8}{'ratio':>6}")

    def rounds(form: str, clients: int, *, off: bool) -> list[tuple[Report, Report]]:
        pairs = []
        for _ in range(options.rounds):
            plain = bench.plain(form, clients)
            if off:
                pairs.append((plain, bench.handed_off(form, clients)))
            else:
                pairs.append((plain, bench.plain(form, clients, "kept")))
        return pairs

    pairs = rounds("oneshot", 1, off=True)
    show("one-shot, all handed off, 1 client", pairs, "p50_us", "us p50")
    show("", pairs, "cpu_us", "us CPU")
    pairs = rounds("oneshot", 16, off=True)
    show("one-shot, all handed off, 16 clients", pairs, "cpu_us", "us CPU")
    show("  all to one worker", pairs, "calls_per_second", "calls/s")
    pairs = rounds("oneshot", 16, off=False)
    show("one-shot, half of them handed off, 16", pairs, "cpu_us", "us CPU")
    show("  all to one worker", pairs, "calls_per_second", "calls/s")
    pairs = rounds("framed", 1, off=True)
    show("framed, handed off once, 1 client", pairs, "p50_us", "us p50")
    before = [bench.plain("oneshot", 16, "kept")["calls_per_second"] for _ in range(options.rounds)]
    with silent_clients(path, options.sessions):
        after = [
            bench.plain("oneshot", 16, "kept")["calls_per_second"] for _ in range(options.rounds)
        ]
    ratio = statistics.median(after) / statistics.median(before)
    print(
        f"{f'with {options.sessions} other sessions, 16 clients':44}"
        f"{statistics.median(before):9.0f}{statistics.median(after):9.0f} {'calls/s':8}{ratio:6.2f}"
    )


def main() -> int:
    """Start the daemon, measure, print."""
    if sys.argv[1:2] == ["--become"]:
        socket, toml, pid, cpu_file, *program_line = sys.argv[2:]
        become(socket, toml, int(pid), cpu_file, program_line)
    parser = argparse.ArgumentParser(description="Measure what affinity costs.")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        program = build_load(folder)
        config = daemon_config(folder, 2, unlimited=True, more=KEPT_MODULE)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        path = folder / "daemon.sock"
        with running(command, path, folder / "daemon.out") as master:
            measure(Bench(program, path, master, options), path, options)
        return 0
    except BenchError as error:
        print(f"affinity.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
