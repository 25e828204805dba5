"""Half an hour of signals, kills, reloads, upgrades and load, at random; masters are killed, too.

Clients and daemon record each call: one that was answered has run once, and none has run twice. At
the end the counts are right, and no process, descriptor, lock, socket or shared memory is left.

Run by `make soak`, not by `make test`. SOAK_SECONDS sets the length, SOAK_SEED the random seed.
"""

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from hammer import Hammer
from leftovers import left_in, memory_of, users_of
from plain_client import connect, request, until

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SEED = int(os.environ.get("SOAK_SEED", str(time.time_ns())))
CONFIG = "limits.max_connections = 90\nlimits.drain_timeout = 20\nlimits.graceful_timeout = 3"
HANG_SECONDS = 8  # more than graceful_timeout and the time until a worker is killed after it
NO_RATE = "limits.max_requests_per_minute = 0"


def status(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.command("status", "--json").stdout)
    return found


def settled(daemon: Daemon) -> bool:
    """Whether no reload, upgrade or stop is in progress, and each worker serves."""
    found = status(daemon)
    workers = found["workers"]
    return (
        found["state"] == "running"
        and len(workers) == found["workers_wanted"]
        and all(each["state"] == "serves" for each in workers)
    )


def descriptors(daemon: Daemon) -> int:
    """The open descriptors of the process that has most."""
    pids = [daemon.pid, *daemon.workers()]
    return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


class FaultInjector:
    """Sends a daemon the commands, signals and faults of operation, at random."""

    def __init__(self, daemon: Daemon, generator: random.Random) -> None:
        self._daemon = daemon
        self.random = generator
        self.done: dict[str, int] = {}
        self._hung: list[socket.socket] = []

    def inject(self) -> None:
        weights = {
            self.reload: 6,
            self.reload_with_other_limits: 4,
            self.reload_a_broken_config: 3,
            self.upgrade: 2,
            self.kill_a_worker: 6,
            self.kill_the_master: 2,
            self.hang_a_worker: 2,
            self.send_a_signal: 6,
            self.ask_for_status: 3,
        }
        (fault,) = self.random.choices(list(weights), list(weights.values()))
        self.done[fault.__name__] = self.done.get(fault.__name__, 0) + 1
        fault()

    def reload(self) -> None:
        self._daemon.command("reload")

    def reload_with_other_limits(self) -> None:
        workers = self.random.randint(1, 4)
        running = self.random.randint(40, 80)
        rate = self.random.choice([0, 1_000_000, 2_000_000])
        self._daemon.write_config(
            f"workers = {workers}\n{CONFIG}\nlimits.max_concurrent_requests = {running}\n"
            f"limits.max_requests_per_minute = {rate}"
        )
        os.kill(self._daemon.pid, signal.SIGHUP)

    def reload_a_broken_config(self) -> None:
        good = self._daemon.config.read_text()
        self._daemon.replace_config("workers = [")
        os.kill(self._daemon.pid, signal.SIGHUP)
        time.sleep(self.random.uniform(0, 0.3))
        self._daemon.replace_config(good)

    def upgrade(self) -> None:
        self._daemon.command("upgrade")

    def kill_a_worker(self) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError, psutil.Error):
            os.kill(self.random.choice(self._daemon.workers()), signal.SIGKILL)

    def kill_the_master(self) -> None:
        """And start another one, which works at once; or an upgrade's new master takes over."""
        os.kill(self._daemon.pid, signal.SIGKILL)
        started = self._daemon.command("start")
        if started.returncode != 0:
            assert "in use by a running cpanbridged" in started.stderr, started.stderr
            until(lambda: "pid" in status(self._daemon), 60, "a master")

    def hang_a_worker(self) -> None:
        """By a call that keeps the interpreter lock, and ends even if the master was killed."""
        params = [HANG_SECONDS, str(self._daemon.folder / "note")]
        call = request("probe", "hold_interpreter", params, timeout=0.5)
        client = connect(self._daemon.path)
        client.sendall(json.dumps(call).encode())
        self._hung.append(client)

    def close(self) -> None:
        """Close the clients of hung calls."""
        while self._hung:
            self._hung.pop().close()

    def send_a_signal(self) -> None:
        name = self.random.choice(["HUP", "USR1", "USR2", "TTIN", "TTOU", "CHLD"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._daemon.pid, signal.Signals[f"SIG{name}"])

    def ask_for_status(self) -> None:
        self._daemon.command("status")


def test_random_faults_leave_the_right_counts_and_nothing_else(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon(f"workers = 2\n{CONFIG}\n{NO_RATE}").run()
    faults = FaultInjector(daemon, random.Random(SEED))
    before = descriptors(daemon)
    end = time.monotonic() + SECONDS
    hammer = Hammer(daemon.path, one_shots=8, framed=8, journal=daemon.folder / "journal")
    try:
        while time.monotonic() < end:
            faults.inject()
            time.sleep(faults.random.uniform(0, 1.0))
    finally:
        hammer.stop()
        faults.close()
    errors = Counter(kind_of(error) for error in hammer.errors)
    with capsys.disabled():
        print(f"\nseed {SEED}: {hammer.answered} answered, {dict(errors)}", faults.done)
    assert hammer.disagreements() == []
    # A killed process ends connections, and no process listens until the next master; no other
    # error may occur.
    assert errors.keys() <= {"connection lost", "not run", "no listener"}, errors
    names = ("kill_a_worker", "kill_the_master", "hang_a_worker")
    kills, masters, hangs = (faults.done.get(name, 0) for name in names)
    assert errors["connection lost"] <= 16 * (kills + masters + hangs)
    assert masters or not errors["not run"] + errors["no listener"]
    until(lambda: settled(daemon), 60, "a settled daemon")
    gate = status(daemon)["gate"]
    assert (gate["connections"], gate["running"]) == (0, 0)
    # Capacity and generations come and go; descriptors and memory do not add up.
    daemon.call("test", "ping")
    assert descriptors(daemon) <= before + 20
    assert memory_of(daemon) < 100 << 20
    assert "step of the master" not in daemon.log()
    assert daemon.command("stop").returncode == 0
    until(lambda: users_of(daemon.folder) == [], 30, "the end of all processes")
    assert left_in(daemon.folder) <= {"c.toml", "d.log", "d.sock.lock", "journal", "note"}
    assert daemon.command("start").returncode == 0  # nothing prevents it
    assert daemon.command("stop").returncode == 0


def kind_of(error: str) -> str:
    """The kind of a client's error, if it is one that may occur; else the error itself."""
    kinds = {
        "EOFError: closed after 0 of 4": "connection lost",
        "ConnectionResetError": "connection lost",
        "BrokenPipeError": "connection lost",
        "JSONDecodeError: Expecting": "connection lost",
        "NotRunError: ShuttingDown": "not run",
        "FileNotFoundError": "no listener",
        "ConnectionRefusedError": "no listener",
    }
    return next((kind for text, kind in kinds.items() if text in error), error)
