"""Running a load generator against a server, and measuring the CPU and memory of both."""

import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from servers import BENCH, BenchError, cpu_seconds, tree, tree_pss_bytes


@dataclass
class Run:
    """The figures of one server in one round."""

    calls_per_second: float
    p50_us: float
    p99_us: float
    p999_us: float
    errors: int
    server_cpu_per_1000: float  # seconds of CPU, of the server's whole tree
    load_cpu_per_1000: float  # seconds of CPU, of the load generator
    load_cpu_share: float  # of one core: near 1.0, the load generator is the bottleneck
    others_cpu_share: float  # of one core: what all other processes used meanwhile


def build_load(folder: Path) -> Path:
    """Compile the load generator into `folder`."""
    program = folder / "load"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no C compiler (cc) on PATH to build load.c with")
    subprocess.run([compiler, "-O2", "-o", str(program), str(BENCH / "load.c")], check=True)
    return program


def load_command(
    program: Path, path: Path, form: str, clients: int, seconds: float, pipeline: int = 1
) -> list[str]:
    """The load generator's command line; the request comes on its stdin."""
    return [
        str(program),
        f"--socket={path}",
        f"--clients={clients}",
        f"--seconds={seconds}",
        f"--form={form}",
        f"--pipeline={pipeline}",
        "--request=-",
    ]


def machine_busy_seconds() -> float:
    """CPU time of all cores that was not idle so far, or was stolen by other virtual machines."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def drive(
    command: Sequence[str], request: bytes, seconds: float, server: psutil.Process | None
) -> Run:
    """Run a load generator for `seconds`, and measure both sides' CPU.

    Without a server, the generator's report has the CPU time of its helpers.
    """
    before = cpu_seconds(server) if server else 0.0
    busy_before = machine_busy_seconds()
    done = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, check=False, timeout=seconds + 120
    )
    if not done.stdout:
        raise BenchError(f"{' '.join(command)}: exit status {done.returncode}")
    report = json.loads(done.stdout)
    busy = machine_busy_seconds() - busy_before
    server_cpu = cpu_seconds(server) - before if server else report["helper_cpu_seconds"]
    elapsed = max(report["seconds"], seconds)
    thousands = max(report["calls"], 1) / 1000
    return Run(
        calls_per_second=report["calls_per_second"],
        p50_us=report["p50_us"],
        p99_us=report["p99_us"],
        p999_us=report["p999_us"],
        errors=report["errors"] + report["unanswered"],
        server_cpu_per_1000=server_cpu / thousands,
        load_cpu_per_1000=report["load_cpu_seconds"] / thousands,
        load_cpu_share=report["load_cpu_seconds"] / elapsed,
        others_cpu_share=max(busy - server_cpu - report["load_cpu_seconds"], 0.0) / elapsed,
    )


class Memory:
    """The highest sample of memory (PSS, bytes) of a server's tree."""

    bytes = 0


@contextlib.contextmanager
def sampling_memory(server: psutil.Process | None) -> Iterator[Memory]:
    """Sample the server's memory ten times a second while the block runs.

    Sampling takes time from the run, so this is for warm-ups. Without a server it samples the
    helpers: the Python processes that the load generator's processes have started.
    """
    memory = Memory()
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory.bytes = max(memory.bytes, tree_pss_bytes(_sampled(server)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def _sampled(server: psutil.Process | None) -> list[psutil.Process]:
    if server is not None:
        return tree(server)
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("python")
    ]
