"""What the daemon costs without calls: memory of its tree, CPU time, system calls.

    idle.py [--workers 2] [--seconds 10] [--no-strace] [--json]

Starts the daemon with default settings, makes one call (so it is ready), then measures it while it
is idle. Memory is PSS (pages shared by k processes count 1/k in each), so the sum over the tree is
what the tree really takes. An idle daemon should use no measurable CPU; the strace summary shows
the few system calls that it makes (timers of the master).
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from servers import BenchError, daemon_config, find_cpanbridged, pss_bytes, running, tree

SETTLE_SECONDS = 2.0


@dataclass
class Idle:
    """Memory, threads, CPU and context switches of one process of the idle tree."""

    name: str
    title: str  # as ps shows it
    pss_mb: float
    threads: int
    cpu_ms: float
    context_switches: int


def cpu_nanoseconds(process: psutil.Process) -> int:
    """CPU time of all threads of the process.

    From the scheduler's own count (/proc/PID/task/*/schedstat, first field), because utime and
    stime advance in ticks of 10 ms, and an idle process uses less than one.
    """
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def context_switches(process: psutil.Process) -> int:
    """How often threads of the process were taken off a core: a measure of its wake-ups."""
    total = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        text = (task / "status").read_text()
        total += sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", text))
    return total


def trace(processes: list[psutil.Process], seconds: float, folder: Path) -> list[str]:
    """The summaries of `strace -c`, one per process in their order, all traced at once."""
    started = []
    for process in processes:
        output = folder / f"strace.{process.pid}"
        command = ["strace", "-c", "-f", "-q", "-o", str(output), "-p", str(process.pid)]
        started.append((subprocess.Popen(command, stderr=subprocess.PIPE), output))
    time.sleep(seconds)
    summaries = []
    for child, output in started:
        child.send_signal(signal.SIGINT)  # detaches, and prints the counts
        _, complaint = child.communicate(timeout=10)
        text = output.read_text() if output.exists() else ""
        summaries.append(text.strip() or complaint.decode().strip() or "no system calls")
    return summaries


def main() -> int:
    """Start the daemon, measure it, print."""
    parser = argparse.ArgumentParser(description="Measure what an idle daemon costs.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--no-strace", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="cpanbridged-idle-"))
    try:
        config = daemon_config(folder, options.workers, unlimited=False)
        command = [find_cpanbridged(), "run", "--config", str(config)]
        with running(command, folder / "daemon.sock", folder / "daemon.out") as master:
            time.sleep(SETTLE_SECONDS)
            processes = tree(master)
            names = ["master"] + [f"child {number}" for number in range(1, len(processes))]
            cpu = [cpu_nanoseconds(process) for process in processes]
            switches = [context_switches(process) for process in processes]
            time.sleep(options.seconds)
            report = [
                Idle(
                    name=name,
                    title=" ".join(process.cmdline()).strip(),
                    pss_mb=pss_bytes(process) / 2**20,
                    threads=process.num_threads(),
                    cpu_ms=(cpu_nanoseconds(process) - cpu_before) / 1e6,
                    context_switches=context_switches(process) - switches_before,
                )
                for name, process, cpu_before, switches_before in zip(
                    names, processes, cpu, switches, strict=True
                )
            ]
            summaries = []
            if not options.no_strace and shutil.which("strace"):
                summaries = trace(processes, options.seconds, folder)
    except BenchError as error:
        print(f"idle.py: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    if options.json:
        rows = [asdict(row) for row in report]
        print(json.dumps({"seconds": options.seconds, "processes": rows, "strace": summaries}))
    else:
        print_table(report, options.seconds)
        for row, summary in zip(report, summaries, strict=False):
            print(f"\nsystem calls of {row.name} in {options.seconds:g} s:\n{summary}")
    return 0


def print_table(report: list[Idle], seconds: float) -> None:
    """One line per process, then the sums over the tree."""
    print(f"{'':10}{'PSS MB':>9}{'threads':>9}{'CPU ms':>9}{'switches':>10}   in {seconds:g} s")
    for row in report:
        print(
            f"{row.name:10}{row.pss_mb:9.2f}{row.threads:9d}{row.cpu_ms:9.2f}"
            f"{row.context_switches:10d}   {row.title}"
        )
    pss = sum(row.pss_mb for row in report)
    cpu_ms = sum(row.cpu_ms for row in report)
    threads = sum(row.threads for row in report)
    switches = sum(row.context_switches for row in report)
    share = cpu_ms / 1000 / seconds * 100
    print(f"{'tree':10}{pss:9.2f}{threads:9d}{cpu_ms:9.2f}{switches:10d}   {share:.3f} % of a core")


if __name__ == "__main__":
    sys.exit(main())
