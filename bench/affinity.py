"""What finding state again costs: handed-over calls, kept connections, and a thousand sessions.

    affinity.py [--seconds 2] [--rounds 3] [--sessions 1000]

One daemon with 2 workers has the same function in a module without affinity and in one of affinity
"client". The runs alternate, and each round gives one ratio to the module without affinity.

That all calls are handed over is brought about by a reload: a process makes its first call, the
daemon reloads, and the process becomes the load generator (exec keeps pid and start time, and so
the session). Its owner drains and accepts nobody, so every call arrives in another worker.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calls
from load import build_load
from servers import BenchError, daemon_config, exchange, find_cpanbridged, running

CONFIG = '[modules.kept]\nimport = "bench_echo"\nfunctions = ["echo"]\naffinity = "client"\n'

Report = dict[str, Any]


def request_to(module: str) -> bytes:
    """The benchmarks' call, to one of the two modules."""
    return json.dumps({**json.loads(calls.request()), "module": module}).encode()


def call_kept(path: Path) -> bool:
    """Call the module that keeps state; whether that succeeded."""
    return bool(json.loads(exchange(path, request_to("kept")))["success"])


def load(
    program: Path, path: Path, module: str, options: argparse.Namespace, form: str, clients: int
) -> Report:
    """One run of the load generator, as a client process without a past."""
    return _report([], program, path, module, options, form, clients)


def load_handed_over(
    program: Path, path: Path, options: argparse.Namespace, form: str, clients: int
) -> Report:
    """One run in which the owner of the client's session accepts nobody."""
    become = [sys.executable, __file__, "--become", str(path), str(path.with_suffix(".toml"))]
    return _report(become, program, path, "kept", options, form, clients)


def _report(
    before: list[str],
    program: Path,
    path: Path,
    module: str,
    options: argparse.Namespace,
    form: str,
    clients: int,
) -> Report:
    command = [
        *before,
        *(str(program), f"--socket={path}", f"--clients={clients}"),
        *(f"--seconds={options.seconds}", f"--form={form}", "--request=-"),
    ]
    done = subprocess.run(
        command, input=request_to(module), stdout=subprocess.PIPE, check=False, timeout=90
    )
    if not done.stdout:
        raise BenchError(f"{' '.join(command)}: exit status {done.returncode}")
    report: Report = json.loads(done.stdout)
    if report["errors"] or report["unanswered"]:
        raise BenchError(f"{module}, {form}: {report}")
    return report


def become(path: str, config: str, command: list[str]) -> None:
    """Begin a session, have the daemon reload, and become the load generator."""
    if not call_kept(Path(path)):
        raise BenchError("the first call failed")
    subprocess.run(
        [find_cpanbridged(), "reload", "--config", config], check=True, stdout=subprocess.DEVNULL
    )
    os.execv(command[0], command)


@contextlib.contextmanager
def crowd(path: Path, count: int) -> Iterator[None]:
    """Client processes that have a session each, and are silent."""
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


def measure(program: Path, path: Path, options: argparse.Namespace) -> None:
    """Run all of it, and print a line for each question."""
    print(f"{'':44}{'without':>9}{'with':>9} {'':8}{'ratio':>6}")

    def rounds(form: str, clients: int, *, over: bool) -> list[tuple[Report, Report]]:
        pairs = []
        for _ in range(options.rounds):
            plain = load(program, path, "bench", options, form, clients)
            if over:
                kept = load_handed_over(program, path, options, form, clients)
            else:
                kept = load(program, path, "kept", options, form, clients)
            pairs.append((plain, kept))
        return pairs

    show("one-shot, all handed over, 1 client", rounds("oneshot", 1, over=True), "p50_us", "us p50")
    pairs = rounds("oneshot", 16, over=True)
    show("one-shot, all handed over, 16 clients", pairs, "calls_per_second", "calls/s")
    pairs = rounds("oneshot", 16, over=False)
    show("one-shot, half of them handed over, 16", pairs, "calls_per_second", "calls/s")
    pairs = rounds("framed", 1, over=True)
    show("framed, handed over once, 1 client", pairs, "p50_us", "us p50")
    before = [
        load(program, path, "kept", options, "oneshot", 16)["calls_per_second"]
        for _ in range(options.rounds)
    ]
    with crowd(path, options.sessions):
        after = [
            load(program, path, "kept", options, "oneshot", 16)["calls_per_second"]
            for _ in range(options.rounds)
        ]
    ratio = statistics.median(after) / statistics.median(before)
    print(
        f"{f'beside {options.sessions} other sessions, 16 clients':44}"
        f"{statistics.median(before):9.0f}{statistics.median(after):9.0f} {'calls/s':8}{ratio:6.2f}"
    )


def main() -> int:
    """Start the daemon, measure, print."""
    if sys.argv[1:2] == ["--become"]:
        become(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description="Measure what finding state again costs.")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=1000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        program = build_load(folder)
        config = daemon_config(folder, 2, unlimited=True)
        text = config.read_text()
        config.write_text(text.replace("[limits]\n", f"{CONFIG}[limits]\n"))
        command = [find_cpanbridged(), "run", "--config", str(config)]
        path = folder / "daemon.sock"
        with running(command, path, folder / "daemon.out"):
            measure(program, path, options)
        return 0
    except BenchError as error:
        print(f"affinity.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
