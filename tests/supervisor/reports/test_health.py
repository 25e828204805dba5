"""Health: each check at its threshold, and all fields that clients rely on."""

from typing import Any

import pytest

from cpanbridge.supervisor.config import Limits, Settings
from cpanbridge.supervisor.memory import histogram, layout
from cpanbridge.supervisor.memory.fields import GATE_CLOSED
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind
from cpanbridge.supervisor.reports import health, reports
from cpanbridge.workers.requests.stats import StatisticsWriter

CHECKS = {
    *("memory", "cgroup_memory", "cpu", "request_rate", "concurrency", "connections"),
    *("gate", "workers", "errors", "monitor"),
}
SETTINGS = Settings(workers=2, limits=Limits(max_memory_mb=1000))
SECOND = 10**9


class Clock:
    """Stands in for the module `time`, and stands still. Long after the machine has booted."""

    def __init__(self) -> None:
        self.monotonic = 10**6 * SECOND
        self.wall = 1_700_000_000 * SECOND

    def monotonic_ns(self) -> int:
        return self.monotonic

    def time_ns(self) -> int:
        return self.wall

    def time(self) -> float:
        return self.wall / SECOND


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (health, reports, layout, histogram):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def shared(clock: Clock) -> Shared:
    shared = Shared.create(4, SETTINGS.limits, used=2)
    for number, slot in enumerate(shared.used_slots):
        slot.pid = 100 + number
    shared.header.sampled_at = clock.monotonic
    shared.header.tightest_cgroup = 1500 * MEGABYTE
    shared.header.fullest_cgroup = 2000 * MEGABYTE
    return shared


def measured(shared: Shared, kind: Kind, value: float) -> None:
    shared.header.values[kind] = round(value * SCALE)


def ran(shared: Shared, name: str, ms: int, times: int, failures: int = 0) -> None:
    """So many requests of a function have just run in worker 1."""
    with shared.lock:
        number = shared.names.number_of(name)
    statistics, slot = StatisticsWriter(shared, 1), shared.slots[1]
    for call in range(times):
        succeeded = call >= failures
        if not succeeded:
            statistics.error(number, ms * 10**6, f"error {call}")
        statistics.ran(number, succeeded, ms * 10**6, shared.header.sampled_at)
        slot.admitted += 1
        slot.succeeded += succeeded
        slot.failed += not succeeded


def report_of(shared: Shared) -> dict[str, Any]:
    """The health report, checked for what holds for all of them."""
    report = health.health(shared, SETTINGS)
    assert set(report) == {
        *("timestamp", "timestamp_iso", "overall_status", "checks", "warnings", "errors"),
    }
    assert isinstance(report["timestamp"], float)
    assert set(report["checks"]) == CHECKS
    for check in report["checks"].values():
        assert set(check) == {"status", "message", "details"}
        assert isinstance(check["message"], str)
        assert isinstance(check["details"], dict)
    by_status = {
        status: [c["message"] for c in report["checks"].values() if c["status"] == status]
        for status in ("pass", "warn", "fail")
    }
    assert sum(map(len, by_status.values())) == len(CHECKS)
    assert (report["warnings"], report["errors"]) == (by_status["warn"], by_status["fail"])
    assert report["overall_status"] == (
        "unhealthy" if by_status["fail"] else "degraded" if by_status["warn"] else "healthy"
    )
    return report


def status(shared: Shared, name: str) -> str:
    found: str = report_of(shared)["checks"][name]["status"]
    return found


def test_a_daemon_with_nothing_wrong_is_healthy(shared: Shared) -> None:
    ran(shared, "m.f", 5, times=100)
    assert report_of(shared)["overall_status"] == "healthy"


@pytest.mark.parametrize(
    ("kind", "name", "limit", "over"),
    [
        (Kind.MEMORY, "memory", 1000, "fail"),
        (Kind.CGROUP_MEMORY, "cgroup_memory", 2000, "fail"),
        (Kind.CPU, "cpu", 200, "fail"),
        # The gate keeps these limits: clients wait, and nothing else happens.
        (Kind.REQUESTS, "request_rate", 2000, "warn"),
        (Kind.CONCURRENT, "concurrency", 100, "warn"),
        (Kind.CONNECTIONS, "connections", 100, "warn"),
    ],
)
def test_each_limit_is_checked(
    shared: Shared, kind: Kind, name: str, limit: float, over: str
) -> None:
    for share, expected in ((0.8, "pass"), (0.81, "warn"), (1.0, "warn"), (1.01, over)):
        measured(shared, kind, share * limit)
        check = report_of(shared)["checks"][name]
        assert check["status"] == expected
        assert check["details"] == {"value": pytest.approx(share * limit), "limit": limit}
    assert "exceeds limit" in check["message"]


def test_a_closed_gate_is_a_failure(shared: Shared) -> None:
    shared.header.overload_state, shared.header.closings, shared.header.backlog = GATE_CLOSED, 3, 17
    check = report_of(shared)["checks"]["gate"]
    assert check["status"] == "fail"
    assert check["details"] == {"closings": 3, "waiting_clients": 17}


def test_missing_workers_are_a_warning(shared: Shared, clock: Clock) -> None:
    shared.clear(shared.slots[1])
    shared.record_death()
    clock.monotonic += 301 * SECOND
    shared.header.sample_due = clock.monotonic
    check = report_of(shared)["checks"]["workers"]
    assert (check["status"], check["message"]) == ("warn", "Only 1 of 2 workers are running")
    assert check["details"] == {"workers": 1, "wanted": 2, "deaths": 1, "deaths_last_5_minutes": 0}


@pytest.mark.parametrize(
    ("requests", "failures", "expected"),
    [(100, 10, "pass"), (100, 11, "warn"), (19, 19, "pass"), (20, 3, "warn"), (0, 0, "pass")],
)
def test_many_failures_are_a_warning_when_there_were_enough_requests(
    shared: Shared, requests: int, failures: int, expected: str
) -> None:
    ran(shared, "m.f", 5, times=requests, failures=failures)
    check = report_of(shared)["checks"]["errors"]
    assert check["status"] == expected
    rate = failures / requests if requests else 0
    assert check["details"] == {"requests": requests, "failed": failures, "error_rate": rate}


@pytest.mark.parametrize(("deaths", "expected"), [(2, "pass"), (3, "warn")])
def test_several_deaths_in_five_minutes_are_a_warning(
    shared: Shared, clock: Clock, deaths: int, expected: str
) -> None:
    for _ in range(deaths):
        shared.record_death()
    clock.monotonic += 299 * SECOND
    check = report_of(shared)["checks"]["workers"]
    assert (check["status"], check["details"]["deaths_last_5_minutes"]) == (expected, deaths)
    clock.monotonic += 2 * SECOND
    check = report_of(shared)["checks"]["workers"]
    assert (check["status"], check["details"]["deaths_last_5_minutes"]) == ("pass", 0)


def test_a_monitor_that_takes_no_samples_is_a_failure(shared: Shared, clock: Clock) -> None:
    for late, expected in ((1, "pass"), (4, "pass"), (5, "pass"), (6, "fail")):
        shared.header.sampled_at = clock.monotonic - (late + 30) * SECOND
        shared.header.sample_due = clock.monotonic - late * SECOND
        check = report_of(shared)["checks"]["monitor"]
        assert check["status"] == expected
        assert check["details"] == {"seconds_since_sample": late + 30, "seconds_late": late}


def test_a_monitor_that_has_just_started_has_some_time(shared: Shared, clock: Clock) -> None:
    shared.header.sampled_at = shared.header.sample_due = 0
    assert status(shared, "monitor") == "pass"
    clock.monotonic += 60 * SECOND
    assert status(shared, "monitor") == "fail"


def test_performance_has_all_its_fields(shared: Shared) -> None:
    for number in range(12):
        ran(shared, f"m{number % 3}.f{number}", ms=10 * (number + 1), times=20 - number)
    ran(shared, "m0.f0", ms=10, times=4, failures=4)
    report = health.performance(shared, SETTINGS)
    assert set(report) == {
        *("performance_metrics", "module_performance", "recent_errors", "health_indicators")
    }
    metrics = report["performance_metrics"]
    assert metrics["total_requests"] == sum(range(9, 21)) + 4
    assert metrics["failed_requests"] == 4
    assert metrics["uptime_seconds"] >= 0
    modules = report["module_performance"]
    assert modules["total_modules"] == 3
    top = modules["top_modules"]
    assert [each["module_function"] for each in top] == [f"m{n % 3}.f{n}" for n in range(10)]
    assert top[0] == {
        "module_function": "m0.f0",
        "requests": 24,
        "avg_time_ms": 10,
        "error_rate": pytest.approx(4 / 24),
        "error_percent": pytest.approx(400 / 24),
    }
    assert top[9]["avg_time_ms"] == 100
    assert [each["error"] for each in report["recent_errors"]] == [
        f"error {n}" for n in (3, 2, 1, 0)
    ]
    for error in report["recent_errors"]:
        assert set(error) == {"timestamp", "module_function", "error", "duration_ms"}
    assert report["health_indicators"] == {
        "overall_health": "healthy",
        "concerns": [],
        "recommendations": [],
    }


def test_every_concern_has_a_recommendation(shared: Shared, clock: Clock) -> None:
    for kind in Kind:
        measured(shared, kind, 10**6)
    shared.header.overload_state = GATE_CLOSED
    shared.header.sample_due = clock.monotonic - 600 * SECOND
    shared.clear(shared.slots[0])
    ran(shared, "m.f", 5, times=30, failures=30)
    indicators = health.performance(shared, SETTINGS)["health_indicators"]
    assert indicators["overall_health"] == "unhealthy"
    assert len(indicators["concerns"]) == len(indicators["recommendations"]) == len(CHECKS)
    report = report_of(shared)
    assert sorted(indicators["concerns"]) == sorted(report["warnings"] + report["errors"])


def test_a_performance_report_without_requests_has_the_same_fields(shared: Shared) -> None:
    report = health.performance(shared, SETTINGS)
    assert report["module_performance"] == {"top_modules": [], "total_modules": 0}
    assert report["recent_errors"] == []
    assert report["performance_metrics"]["error_rate"] == 0


def test_a_wall_clock_that_was_set_back_changes_no_check(shared: Shared, clock: Clock) -> None:
    ran(shared, "m.f", 5, times=30)
    before = report_of(shared)
    clock.wall -= 3600 * SECOND
    after = report_of(shared)
    assert after["timestamp"] == before["timestamp"] - 3600
    assert after["checks"] == before["checks"]
    assert after["overall_status"] == "healthy"
    assert health.performance(shared, SETTINGS)["performance_metrics"]["uptime_seconds"] == 0
