"""The daemon's throughput compared with that of the bare pre-fork server, measured in turns.

    compare.py [--form oneshot|framed] [--clients 16] [--workers 2] [--seconds 4] [--rounds 3]
    compare.py --against REVISION ...

An absolute figure depends more on the machine than on the daemon, and a shared machine's speed
changes from minute to minute. So both servers run all the time, and short runs alternate: floor,
daemon, floor, daemon. Each round gives one ratio, and the spread of the ratios shows how reliable
it is. With `--against` the baseline is not the floor but the daemon of another revision.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import calls
from load import Run, build_load, drive, load_command
from servers import (
    BENCH,
    BenchError,
    call,
    call_framed,
    daemon_config,
    extract_revision,
    find_cpanbridged,
    running,
)

WARM_UP_SECONDS = 1.0
OTHERS_CPU_SHARE_LIMIT = 0.1  # of one core: above it, the figures count as disturbed


def print_table(rounds: dict[str, list[Run]]) -> None:
    """One line per server with the medians over the rounds, then the ratios."""
    print(
        f"{'':12}{'calls/s':>10}{'p50 us':>9}{'p99 us':>9}{'p99.9 us':>10}"
        f"{'server CPU':>12}{'load CPU':>10}{'load':>7}{'others':>8}{'errors':>8}"
    )
    print(f"{'':50}{'s/1000':>12}{'s/1000':>10}{'core':>7}{'core':>8}")
    for name, runs in rounds.items():

        def middle(field: str, runs: list[Run] = runs) -> float:
            return float(statistics.median(getattr(run, field) for run in runs))

        print(
            f"{name:12}{middle('calls_per_second'):10.0f}{middle('p50_us'):9.0f}"
            f"{middle('p99_us'):9.0f}{middle('p999_us'):10.0f}"
            f"{middle('server_cpu_per_1000'):12.4f}{middle('load_cpu_per_1000'):10.4f}"
            f"{middle('load_cpu_share'):7.2f}{middle('others_cpu_share'):8.2f}"
            f"{sum(run.errors for run in runs):8d}"
        )
    found = ratios(rounds)
    taken = max(run.others_cpu_share for runs in rounds.values() for run in runs)
    if taken > OTHERS_CPU_SHARE_LIMIT:
        print(f"\ndisturbed: other processes used up to {taken:.2f} of a core; measure again")
    if found:
        each = ", ".join(f"{ratio:.3f}" for ratio in found)
        print(
            f"\nthroughput against {next(iter(rounds))}: {statistics.median(found):.3f} "
            f"(spread {min(found):.3f} to {max(found):.3f}; rounds: {each})"
        )


def ratios(rounds: dict[str, list[Run]]) -> list[float]:
    """The daemon's throughput over the baseline's, of each round."""
    baseline = next(iter(rounds.values()))
    pairs = zip(baseline, rounds.get("cpanbridged", []), strict=False)
    return [daemon.calls_per_second / other.calls_per_second for other, daemon in pairs]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compare the daemon's throughput with a bare pre-fork server's, in turns."
    )
    parser.add_argument("--form", choices=["oneshot", "framed"], default="oneshot")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pipeline", type=int, default=1, help="framed: requests in flight")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--floor-only", action="store_true", help="leave the daemon out")
    parser.add_argument("--against", metavar="REVISION", help="the daemon of this git revision")
    parser.add_argument("--json", action="store_true", help="print the rounds as one JSON object")
    return parser.parse_args()


def _servers(
    folder: Path, options: argparse.Namespace
) -> dict[str, tuple[list[str], Path, dict[str, str] | None]]:
    """The servers to run, the baseline first: command, socket, and environment if it differs."""
    servers: dict[str, tuple[list[str], Path, dict[str, str] | None]] = {}
    if options.against:
        other = folder / "other"
        environment = extract_revision(options.against, other)
        config = daemon_config(other, options.workers, unlimited=True)
        command = [sys.executable, "-m", "cpanbridge.supervisor.cli", "run", "-c", str(config)]
        servers[options.against] = command, other / "daemon.sock", environment
    else:
        path = folder / "floor.sock"
        command = [sys.executable, str(BENCH / "floor.py"), f"--socket={path}"]
        command += [f"--workers={options.workers}", f"--form={options.form}"]
        servers["floor"] = command, path, None
    if not options.floor_only:
        config = daemon_config(folder, options.workers, unlimited=True)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        servers["cpanbridged"] = command, folder / "daemon.sock", None
    return servers


def main() -> int:
    """Start both servers, run the rounds, print."""
    options = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        program = build_load(folder)
        with contextlib.ExitStack() as stack:
            servers = {}
            trial = call if options.form == "oneshot" else call_framed
            for name, (command, path, environment) in _servers(folder, options).items():
                output = path.with_suffix(".out")
                starting = running(command, path, output, trial, environment)
                servers[name] = path, stack.enter_context(starting)

            def run(name: str, seconds: float) -> Run:
                path, server = servers[name]
                command = load_command(
                    program, path, options.form, options.clients, seconds, options.pipeline
                )
                return drive(command, calls.request(), seconds, server)

            for name in servers:
                run(name, WARM_UP_SECONDS)
            rounds: dict[str, list[Run]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name in servers:
                    rounds[name].append(run(name, options.seconds))
        if options.json:
            report = {name: [asdict(run) for run in runs] for name, runs in rounds.items()}
            print(json.dumps({"rounds": report, "ratios": ratios(rounds)}))
        else:
            print_table(rounds)
        return 1 if any(run.errors for runs in rounds.values() for run in runs) else 0
    except BenchError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
