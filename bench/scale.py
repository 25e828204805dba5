"""Whether performance drops suddenly: more workers or connections, slow calls beside fast ones.

    scale.py [--quick] [--rounds 3] [--seconds 2] [--json] [--write]

- throughput with 1 to 8 workers, and with 1 to 500 connections, one-shot and framed
- the cost of idle workers for a lone client
- a fast function's p99 alone, beside calls that wait, and beside calls that compute
- how the calls are spread over the workers at full load

All daemons run all the time, and each round measures all settings in turn; the tables have medians.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import calls
import pages
import psutil
from load import Run, build_load, drive, load_command
from progress import Progress
from rows import versions
from servers import BenchError, daemon_config, find_cpanbridged, running, send_call

FORMS = ("oneshot", "framed")
WORKERS = (1, 2, 4, 8)
MORE_WORKERS = (1, 2, 4, 8, 16)
CONNECTIONS = (1, 16, 100, 250, 500)
CLIENTS = 16
WARM_UP_SECONDS = 0.5
SLOW_CLIENTS = 4
SLOW: dict[str, tuple[str, list[float]]] = {  # calls of about 20 ms
    "beside calls that wait": ("nap", [0.02]),
    "beside calls that compute": ("count", [500_000]),
}


@dataclass
class Round:
    """The figures of one setting in one round."""

    run: Run
    largest_share: float  # of the busiest worker: its calls over the mean of all workers


@dataclass
class Setting:
    """One line of a table."""

    what: str
    form: str
    workers: int
    clients: int
    slow: tuple[str, list[float]] | None = None  # a function called meanwhile, and its params
    rounds: list[Round] = field(default_factory=list)

    def median(self, column: str) -> float:
        """The median of a field of `Run`."""
        return float(statistics.median(getattr(each.run, column) for each in self.rounds))

    @property
    def errors(self) -> int:
        """Failed calls of all rounds."""
        return sum(each.run.errors for each in self.rounds)


class Daemon:
    """A running daemon, and the load generator."""

    def __init__(self, folder: Path, program: Path, process: psutil.Process) -> None:
        self.path = folder / "daemon.sock"
        self._program = program
        self._process = process

    def measure(self, setting: Setting, seconds: float) -> Round:
        """Warm up, run, and find how the calls were spread over the workers."""
        with self.slow_calls(setting.slow, seconds + 2 * WARM_UP_SECONDS):
            self._drive(setting, WARM_UP_SECONDS)
            before = self._requests()
            run = self._drive(setting, seconds)
            done = [now - then for then, now in zip(before, self._requests(), strict=True)]
        return Round(run, max(done) * len(done) / max(1, sum(done)))

    def _drive(self, setting: Setting, seconds: float) -> Run:
        command = load_command(self._program, self.path, setting.form, setting.clients, seconds)
        return drive(command, calls.request(), seconds, self._process)

    @contextlib.contextmanager
    def slow_calls(self, slow: tuple[str, list[float]] | None, seconds: float) -> Iterator[None]:
        """Call a slow function with SLOW_CLIENTS clients for `seconds`, while the block runs."""
        if slow is None:
            yield
            return
        request = json.dumps({"module": "bench", "function": slow[0], "params": slow[1]})
        command = load_command(self._program, self.path, "oneshot", SLOW_CLIENTS, seconds)
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert child.stdin is not None
        child.stdin.write(request.encode())
        child.stdin.close()
        try:
            yield
        finally:
            child.wait()

    def _requests(self) -> list[int]:
        metrics = send_call(self.path, {"module": "system", "function": "metrics"})["result"]
        return [worker["requests"] for worker in metrics["workers"]]


@contextlib.contextmanager
def daemon(program: Path, workers: int) -> Iterator[Daemon]:
    """Run a daemon with `workers` workers, and without limits."""
    with tempfile.TemporaryDirectory(prefix="cpanbridged-bench-") as name:
        folder = Path(name)
        config = daemon_config(folder, workers, unlimited=True)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        with running(command, folder / "daemon.sock", folder / "daemon.out") as process:
            yield Daemon(folder, program, process)


def settings(quick: bool) -> dict[str, list[Setting]]:
    """All lines, by the title of their table."""
    workers = (1, 2) if quick else WORKERS
    connections = (1, 100) if quick else CONNECTIONS
    mixes: dict[str, tuple[str, list[float]] | None] = {"alone": None, **SLOW}
    return {
        f"Workers ({CLIENTS} clients)": [
            Setting(f"{count} workers", form, count, CLIENTS) for form in FORMS for count in workers
        ],
        "Workers (1 client)": [
            Setting(f"{count} workers", "oneshot", count, 1)
            for count in ((1, 2) if quick else MORE_WORKERS)
        ],
        "Connections (2 workers)": [
            Setting(f"{clients} connections", form, 2, clients)
            for form in FORMS
            for clients in connections
        ],
        f"Slow calls beside fast ones (2 workers, {CLIENTS} fast clients, {SLOW_CLIENTS} slow)": [
            Setting(what, form, 2, CLIENTS, slow) for form in FORMS for what, slow in mixes.items()
        ],
    }


def measure(program: Path, tables: dict[str, list[Setting]], rounds: int, seconds: float) -> None:
    """Measure the rounds of all settings, in turns."""
    lines = [setting for table in tables.values() for setting in table]
    progress = Progress(len(lines) * rounds)
    with contextlib.ExitStack() as stack:
        daemons = {
            count: stack.enter_context(daemon(program, count))
            for count in sorted({setting.workers for setting in lines})
        }
        for number in range(rounds):
            for line in lines:
                progress.step(f"round {number + 1} of {rounds}: {line.what}, {line.form}")
                line.rounds.append(daemons[line.workers].measure(line, seconds))
    progress.end()


def markdown(tables: dict[str, list[Setting]]) -> str:
    """The tables; a ratio is to the first line of the same table and form."""
    lines = []
    for title, table in tables.items():
        lines += [
            f"### {title}",
            "",
            "|  | form | calls/s | ratio | p50 us | p99 us | p99 ratio | busiest worker's share |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for line in table:
            first = next(each for each in table if each.form == line.form)
            rate, p99 = line.median("calls_per_second"), line.median("p99_us")
            share = statistics.median(each.largest_share for each in line.rounds)
            lines.append(
                f"| {line.what}{f' ({line.errors} errors)' if line.errors else ''} | {line.form} "
                f"| {rate:,.0f} | {rate / max(first.median('calls_per_second'), 1e-9):.2f} "
                f"| {line.median('p50_us'):,.0f} | {p99:,.0f} "
                f"| {p99 / max(first.median('p99_us'), 1e-9):.2f} | {share:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write the page with --write."""
    parser = argparse.ArgumentParser(description="Measure scaling: workers, connections, mixes.")
    parser.add_argument("--quick", action="store_true", help="fewer settings, short runs")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of one run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"write into {pages.PAGE.name}")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        seconds = options.seconds or (1.0 if options.quick else 2.0)
        rounds = options.rounds or (1 if options.quick else 3)
        tables = settings(options.quick)
        measure(build_load(folder), tables, rounds, seconds)
        if options.json:
            found = {title: [asdict(line) for line in table] for title, table in tables.items()}
            print(json.dumps({"versions": versions(), "tables": found}))
            return 0
        text = (
            pages.heading(shlex.join(["bench/scale.py", *sys.argv[1:]])) + "\n" + markdown(tables)
        )
        print(text)
        if options.write:
            pages.write("scale", text)
    except BenchError as error:
        print(f"scale.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(line.errors for table in tables.values() for line in table) else 0


if __name__ == "__main__":
    sys.exit(main())
