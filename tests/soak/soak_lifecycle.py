"""Half an hour of signals, kills, reloads, upgrades and load, at random.

At the end the counts are right, and no process, descriptor, lock or socket is left.

Run by `make soak`, not by `make test`. SOAK_SECONDS sets another length, SOAK_SEED another chance.
"""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from hammer import Hammer
from plain_client import until

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SEED = int(os.environ.get("SOAK_SEED", str(time.time_ns())))
CONFIG = (
    "limits.max_requests_per_minute = 0\nlimits.max_connections = 90\nlimits.drain_timeout = 20"
)


def status(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.command("status", "--json").stdout)
    return found


def settled(daemon: Daemon) -> bool:
    """Whether it is through with what it was told, and each worker serves."""
    found = status(daemon)
    workers = found["workers"]
    return (
        found["state"] == "running"
        and len(workers) == found["workers_wanted"]
        and all(each["state"] == "serves" for each in workers)
    )


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def processes_with(text: str) -> list[int]:
    """Processes that have a file of the daemon's folder open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            links = Path(f"/proc/{process.pid}/fd")
            if any(text in os.readlink(each) for each in links.iterdir()):
                found.append(process.pid)
    return found


class Tormentor:
    """Does to a daemon what operators, kernels and accidents do."""

    def __init__(self, daemon: Daemon, chance: random.Random) -> None:
        self._daemon = daemon
        self.chance = chance
        self.done: dict[str, int] = {}

    def do_something(self) -> None:
        deeds = {
            self.reload: 6,
            self.reload_with_other_limits: 4,
            self.reload_what_is_broken: 3,
            self.upgrade: 2,
            self.kill_a_worker: 6,
            self.send_a_signal: 6,
            self.ask: 3,
        }
        (deed,) = self.chance.choices(list(deeds), list(deeds.values()))
        self.done[deed.__name__] = self.done.get(deed.__name__, 0) + 1
        deed()

    def reload(self) -> None:
        self._daemon.command("reload")

    def reload_with_other_limits(self) -> None:
        workers = self.chance.randint(1, 4)
        running = self.chance.randint(40, 80)
        self._daemon.write_config(
            f"workers = {workers}\n{CONFIG}\nlimits.max_concurrent_requests = {running}"
        )
        os.kill(self._daemon.pid, signal.SIGHUP)

    def reload_what_is_broken(self) -> None:
        good = self._daemon.config.read_text()
        self._daemon.replace_config("workers = [")
        os.kill(self._daemon.pid, signal.SIGHUP)
        time.sleep(self.chance.uniform(0, 0.3))
        self._daemon.replace_config(good)

    def upgrade(self) -> None:
        self._daemon.command("upgrade")

    def kill_a_worker(self) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError, psutil.Error):
            os.kill(self.chance.choice(self._daemon.workers()), signal.SIGKILL)

    def send_a_signal(self) -> None:
        name = self.chance.choice(["HUP", "USR1", "USR2", "TTIN", "TTOU", "CHLD"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._daemon.pid, signal.Signals[f"SIG{name}"])

    def ask(self) -> None:
        self._daemon.command("status")


def test_a_long_torment_ends_with_the_right_counts_and_nothing_left(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon(f"workers = 2\n{CONFIG}").run()
    tormentor = Tormentor(daemon, random.Random(SEED))
    before = descriptors(daemon)
    end = time.monotonic() + SECONDS
    hammer = Hammer(daemon.path, one_shots=8, framed=8)
    try:
        while time.monotonic() < end:
            tormentor.do_something()
            time.sleep(tormentor.chance.uniform(0, 1.0))
    finally:
        hammer.stop()
    with capsys.disabled():
        print(
            f"\nseed {SEED}: {hammer.answered} answered, {len(hammer.errors)} lost", tormentor.done
        )
    # A killed worker ends its clients' connections; nothing else may go wrong.
    kills = tormentor.done.get("kill_a_worker", 0)
    wrong = [error for error in hammer.errors if not is_a_lost_connection(error)]
    assert wrong == []
    assert len(hammer.errors) <= 16 * kills
    until(lambda: settled(daemon), 60, "peace")
    gate = status(daemon)["gate"]
    assert (gate["connections"], gate["running"]) == (0, 0)
    assert daemon.metrics()["performance_metrics"]["successful_requests"] >= hammer.answered
    # Capacity and generations come and go; descriptors do not add up.
    assert descriptors(daemon) <= before + 20
    assert "step of the master" not in daemon.log()
    assert daemon.command("stop").returncode == 0
    until(lambda: processes_with(str(daemon.folder)) == [], 30, "the end of all processes")
    left = {path.name for path in daemon.folder.iterdir()}
    assert not left & {"d.sock", "d.sock.pid", "d.sock.ctl", "d.sock.pid.new"}


def is_a_lost_connection(error: str) -> bool:
    """Whether that is what a client sees whose worker was killed."""
    kinds = (
        "EOFError: closed after 0 of 4",
        "ConnectionResetError",
        "BrokenPipeError",
        "JSONDecodeError: Expecting",
    )
    return any(kind in error for kind in kinds)
