"""Everything that may change while the daemon runs, changed while clients call at full speed."""

import os

import pytest
from conftest import NewDaemon
from hammer import Hammer
from leftovers import left_in, memory_of, users_of
from plain_client import until

from cpanbridge.supervisor.config import Limits

RELOADS = 4
UPGRADE_AFTER = (1, 3)  # of these
CLIENTS = 6  # of each form
PAUSE = 0.02  # seconds between two calls of one, or they would keep the processor from changes
# All limits but max_sessions, which a reload refuses to change: what is changed over to by turns.
# None of them is met by clients that call without a pause.
LIMITS: dict[str, tuple[float, float]] = {
    "max_memory_mb": (4096, 5000),
    "max_cpu_percent": (6400.0, 7000.0),
    "max_requests_per_minute": (0, 600_000),
    "max_concurrent_requests": (80, 64),
    "max_connections": (90, 128),
    "stale_timeout": (300, 200),
    "resource_check_interval": (60, 50),
    "max_request_size": (10_485_760, 1_048_576),
    "idle_timeout": (1800, 900),
    "cleanup_interval": (300, 1),
    "max_string_length": (0, 1000),
    "max_array_length": (0, 100),
    "max_param_count": (0, 10),
    "max_object_depth": (64, 8),
    "read_timeout": (30, 40),
    "request_timeout": (0, 60),
    "graceful_timeout": (30, 40),
    "drain_timeout": (0, 60),
    "sample_interval": (1, 0.5),
    "memory_grace": (5, 6),
    "slow_request": (0, 50),
}


def config(turn: int) -> str:
    lines = [f"limits.{name} = {values[turn % 2]}" for name, values in LIMITS.items()]
    return "\n".join([f"workers = {2 + turn % 2}", *lines])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_the_limits_above_are_all_that_there_are() -> None:
    assert set(LIMITS) | {"max_sessions"} == set(Limits.__struct_fields__)


@pytest.mark.waits_long
def test_no_call_is_lost_or_doubled_while_every_limit_changes_and_masters_come_and_go(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(config(0)).run()
    before = descriptors(daemon.pid), descriptors(daemon.workers()[0])
    hammer = Hammer(daemon.path, CLIENTS, CLIENTS, pause=PAUSE, journal=daemon.folder / "journal")
    try:
        for turn in range(1, RELOADS + 1):
            daemon.write_config(config(turn))
            daemon.reload()
            if turn in UPGRADE_AFTER:
                daemon.upgrade()
            answered = hammer.answered
            until(lambda answered=answered: hammer.answered > answered + 50)
    finally:
        hammer.stop()
    assert hammer.errors == []
    assert hammer.disagreements() == []
    # The daemon has counted the same, and holds nothing more than when it started.
    until(lambda: (gate := daemon.status()["gate"])["connections"] == gate["running"] == 0)
    until(lambda: len(daemon.status()["workers"]) == 2)
    performance = daemon.metrics()["performance_metrics"]
    assert performance["total_requests"] == hammer.answered
    assert performance["failed_requests"] == 0
    after = descriptors(daemon.pid), *map(descriptors, daemon.workers())
    assert max(after) <= max(before) + 5
    assert memory_of(daemon) < 10 << 20  # two windows of the last minute, and the statistics
    assert daemon.stop() == 0
    assert left_in(daemon.folder) == {"c.toml", "d.log", "d.sock.lock", "journal"}
    until(lambda: users_of(daemon.folder) == [])
