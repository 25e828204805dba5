"""The daemon compared with other servers, in turns, as ratios to a bare pre-fork server.

    peers.py [--quick] [--rows NAME,...] [--clients 1,16,100] [--payload '100 B,10 KB,1 MB']
             [--rounds 5] [--seconds 2] [--workers 2] [--json] [--plot FILE] [--write]

All servers run all the time. In each cell (a number of clients and a payload) every row is warmed
up, during which its memory is sampled, and then short runs take turns: A B C A B C. Each round
gives each row one ratio to the baseline, the one-shot floor. `rows.py` has the rows.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pages
import psutil
import results
from calls import PAYLOADS
from load import Run, build_load, drive, sampling_memory
from peerenv import Missing
from progress import Progress
from results import Cell, Measured
from rows import ROWS, Row, Server, Target, versions
from servers import BENCH, BenchError, running

WARM_UP_SECONDS = 1.0


class Bench:
    """The running servers, and how to run a load generator against them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._running: dict[Server, psutil.Process] = {}
        self._missing: dict[Server, str] = {}

    def start(self, rows: Sequence[Row], stack: contextlib.ExitStack) -> None:
        """Start the servers of the rows; the reason is kept for one that cannot be installed."""
        for server in dict.fromkeys(row.server for row in rows if row.server is not None):
            path = server.socket(self._folder)
            try:
                command = server.command(self._folder, self._options.workers)
            except Missing as missing:
                self._missing[server] = f"not measured: {missing}"
                continue
            started = running(command, path, path.with_suffix(".out"), server.trial)
            self._running[server] = stack.enter_context(started)

    def missing(self, row: Row, cell: Cell) -> str:
        """Why a row is not measured; empty if it is."""
        if cell.clients * PAYLOADS[cell.payload] > row.most_bytes:
            return "not measured: too much under way for one run"
        return self._missing.get(row.server, "") if row.server else ""

    def warm_up(self, row: Row, cell: Cell) -> int:
        """Run a row once; returns its server's highest memory in bytes."""
        with sampling_memory(self._server(row)) as memory:
            self.run(row, cell, WARM_UP_SECONDS)
        return memory.bytes

    def run(self, row: Row, cell: Cell, seconds: float) -> Run:
        """Run a row for `seconds`."""
        payload = PAYLOADS[cell.payload]
        path = row.server.socket(self._folder) if row.server else self._folder / "unused.sock"
        target = Target(self._folder, path, cell.clients, payload, seconds)
        return drive(row.command(target), row.request(payload), seconds, self._server(row))

    def _server(self, row: Row) -> psutil.Process | None:
        return self._running[row.server] if row.server else None


def measure(bench: Bench, rows: Sequence[Row], options: argparse.Namespace) -> list[Cell]:
    """Measure all cells."""
    cells = [Cell(clients, payload) for clients in options.clients for payload in options.payload]
    progress = Progress(len(cells) * len(rows) * (1 + options.rounds))
    for cell in cells:
        where = f"{cell.clients} clients, {cell.payload}"
        for row in rows:
            cell.rows[row.name] = Measured(missing=bench.missing(row, cell))
        present = [row for row in rows if not cell.rows[row.name].missing]
        for row in present:
            progress.step(f"{where}: {row.name}, warming up")
            cell.rows[row.name].memory = bench.warm_up(row, cell)
        for number in range(options.rounds):
            for row in present:
                progress.step(f"{where}: {row.name}, round {number + 1} of {options.rounds}")
                cell.rows[row.name].runs.append(bench.run(row, cell, options.seconds))
    progress.end()
    return cells


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the daemon and other servers, in turns.")
    parser.add_argument("--quick", action="store_true", help="one cell, two short rounds")
    parser.add_argument("--rows", help="only rows whose names contain one of these, by commas")
    parser.add_argument("--clients", help="numbers of clients, by commas")
    parser.add_argument("--payload", help=f"of {', '.join(PAYLOADS)}, by commas")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of one run")
    parser.add_argument("--workers", type=int, default=2, help="processes of each server")
    parser.add_argument("--json", action="store_true", help="print all rounds as one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the SVG goes")
    parser.add_argument(
        "--write", action="store_true", help=f"write {pages.PAGE.name} and its plot"
    )
    options = parser.parse_args()
    try:
        default = "16" if options.quick else "1,16,100"
        options.clients = [int(text) for text in (options.clients or default).split(",")]
    except ValueError:
        parser.error("--clients wants numbers, such as 1,16")
    default = "100 B" if options.quick else ",".join(PAYLOADS)
    options.payload = [text.strip() for text in (options.payload or default).split(",")]
    if unknown := [text for text in options.payload if text not in PAYLOADS]:
        parser.error(f"--payload {unknown[0]}: not one of {', '.join(PAYLOADS)}")
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 2.0)
    options.plot = options.plot or (pages.PLOT if options.write else BENCH / "peers.svg")
    return options


def chosen(names: str | None) -> list[Row]:
    """The baseline, and the requested rows."""
    wanted = [name.strip().lower() for name in names.split(",")] if names else [""]
    return [ROWS[0]] + [row for row in ROWS[1:] if any(n in row.name.lower() for n in wanted)]


def main() -> int:
    """Start the servers, run the rounds, print and write."""
    options = parse_arguments()
    rows = chosen(options.rows)
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        build_load(folder)
        with contextlib.ExitStack() as stack:
            bench = Bench(folder, options)
            bench.start(rows, stack)
            cells = measure(bench, rows, options)
        heading = pages.heading(shlex.join(["bench/peers.py", *sys.argv[1:]]))
        text = "\n".join(
            [heading, results.disturbance(cells), *(cell.markdown() for cell in cells)]
        )
        results.plot(cells, options.plot)
        if options.json:
            print(json.dumps({"versions": versions(), "cells": [asdict(cell) for cell in cells]}))
        else:
            print(text)
        if options.write:
            pages.write("peers", f"![Throughput]({pages.PLOT.name})\n\n{text}")
        print(f"plot: {options.plot}", file=sys.stderr)
        failed = any(run.errors for cell in cells for row in cell.rows.values() for run in row.runs)
        return 1 if failed else 0
    except BenchError as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
