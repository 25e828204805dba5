"""What monitoring and counting cost: the monitor's samples, and a request's admission.

    cost.py [--workers 8] [--megabytes 200] [--seconds 10]

Two measurements, each printed as a ratio:

- An admission and its statistics with 1,000 requests in the last minute against 1,000,000: they
  must cost the same.
- The monitor's share of a core: the CPU time that the master uses while it samples a tree of
  `--workers` workers with `--megabytes` of memory each, without any calls.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from servers import BENCH, BenchError, find_cpanbridged, running

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.workers.requests.stats import StatisticsWriter

ROUNDS = 7
CALLS = 20_000


def monitor_share(workers: int, megabytes: int, seconds: float) -> float:
    """The share of a core that the master uses with workers of `megabytes` MB each, 0 to 1."""
    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-bench-"))
    try:
        path = folder / "daemon.sock"
        config = folder / "daemon.toml"
        config.write_text(
            f'listen = ["{path}"]\nworkers = {workers}\nlog_file = "{folder}/daemon.log"\n'
            f'python_path = ["{BENCH}/modules"]\n'
            f"limits.max_memory_mb = {2 * workers * megabytes + 1024}\n"
            '[modules.bench]\nimport = "bench_echo"\nfunctions = ["echo"]\n'
            '[modules.holder]\nimport = "bench_holder"\nfunctions = ["held"]\n'
            "preload = false\n"  # each worker has its own memory
        )
        os.environ["BENCH_HOLD_MB"] = str(megabytes)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        with running(command, path, folder / "daemon.out") as master:
            time.sleep(3)
            before, began = _cpu_ns(master), time.monotonic()
            time.sleep(seconds)
            used, elapsed = _cpu_ns(master) - before, time.monotonic() - began
            return used / 1e9 / elapsed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cpu_ns(process: psutil.Process) -> int:
    """CPU time in nanoseconds, from the scheduler's own count."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0])


class Measured:
    """One gate with a number of admissions in its last minute."""

    def __init__(self, admissions: int) -> None:
        limits = Limits(max_requests_per_minute=10_000_000, max_concurrent_requests=1000)
        self.shared = Shared.create(8, limits)
        wakeups = [Wakeups.create() for _ in range(8)]
        self.gate = Gate(self.shared, 0, wakeups)
        self.statistics = StatisticsWriter(self.shared, 0)
        for _ in range(admissions):
            self.shared.window.record(time.monotonic_ns())

    def nanoseconds(self) -> float:
        """The time of one request in ns: admission, statistics, and giving its room back."""
        gate, statistics = self.gate, self.statistics
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            assert gate.admit() is True
            statistics.ran(1, True, 1000, time.monotonic_ns())
            gate.release_request(True)
        return (time.perf_counter_ns() - began) / CALLS


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What monitoring and counting cost.")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    few, many = Measured(1_000), Measured(1_000_000)
    times = [(few.nanoseconds(), many.nanoseconds()) for _ in range(ROUNDS)]
    ratios = [full / sparse for sparse, full in times]
    print(
        "a request's admission and statistics, in nanoseconds: "
        f"{statistics.median(sparse for sparse, _ in times):.0f} with 1,000 in the last minute, "
        f"{statistics.median(full for _, full in times):.0f} with 1,000,000; "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    try:
        share = monitor_share(options.workers, options.megabytes, options.seconds)
    except BenchError as error:
        print(f"cost.py: {error}", file=sys.stderr)
        return 1
    print(
        f"the monitor, {options.workers} workers of {options.megabytes} MB each: "
        f"{share:.2%} of a core"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
