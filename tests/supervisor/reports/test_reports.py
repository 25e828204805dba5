"""The reports: every field that clients rely on, of its type, and consistent."""

import os
import time
import types
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from cpanbridge.supervisor.config import Limits, Settings
from cpanbridge.supervisor.gate import Gate, set_overload_state
from cpanbridge.supervisor.memory.connection_table import IDLE, ConnectionTableWriter
from cpanbridge.supervisor.memory.fields import ADMITTED, GATE_CLOSED, WAITS_FOR_RATE
from cpanbridge.supervisor.memory.function_stats import OTHERS
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.overload_state import MEGABYTE, SCALE, Kind
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.reports import reports, totals
from cpanbridge.supervisor.reports.connections import connections as system_connections
from cpanbridge.supervisor.reports.reports import RECENT
from cpanbridge.supervisor.system.log_text import format_duration
from cpanbridge.workers.requests.stats import StatisticsWriter

SECOND = 10**9
MODULES = ["stats", "system", "test"]
Number = int | float


class Works:
    """A daemon's shared memory, and what its workers write into it, without the daemon."""

    def __init__(self, **settings: Any) -> None:
        limits = settings.pop("limits", Limits(max_memory_mb=1000))
        self.settings = Settings(limits=limits, listen=["/tmp/a.sock", "/tmp/b.sock"], **settings)
        self.shared = Shared.create(4, self.settings.limits, used=2)
        self.wakeups = [Wakeups.create() for _ in range(4)]
        self.gates = [Gate(self.shared, slot, self.wakeups) for slot in range(2)]
        self.statistics = [StatisticsWriter(self.shared, slot) for slot in range(2)]
        self.tables = [
            ConnectionTableWriter(self.shared.statistics[slot].connection_table)
            for slot in range(2)
        ]
        for number, slot in enumerate(self.shared.used_slots):
            slot.pid, slot.generation, slot.since = 100 + number, 1, time.monotonic_ns()

    def close(self) -> None:
        for descriptor in (self.shared.fd, *(fd for wakeups in self.wakeups for fd in wakeups)):
            os.close(descriptor)

    def connect(self, worker: int) -> int:
        """A client is accepted; returns its entry in the connection table."""
        gate = self.gates[worker]
        assert gate.take_connection()
        return self.tables[worker].enter(gate.accepted(), time.monotonic_ns())

    def begin(self, worker: int, entry: int) -> None:
        """Its request begins to run."""
        gate = self.gates[worker]
        assert gate.admit() == ADMITTED
        self.tables[worker].runs(entry, 0, 0, None)

    def number_of(self, name: str) -> int:
        with self.shared.lock:
            return self.shared.names.number_of(name)

    def end(self, worker: int, entry: int, name: str, ms: int, error: str | None = None) -> None:
        """Its request ends, with an error or without."""
        number, now = self.number_of(name), time.monotonic_ns()
        if error is not None:
            self.statistics[worker].error(number, ms * 10**6, error)
        self.statistics[worker].ran(number, error is None, ms * 10**6, now)
        self.gates[worker].release_request(error is None)
        self.tables[worker].ran(entry, now)

    def leave(self, worker: int, entry: int) -> None:
        """The client closes its connection."""
        self.tables[worker].leave(entry)
        self.gates[worker].release_connection()

    def serve(self, worker: int, name: str, ms: int, error: str | None = None) -> None:
        """A one-shot client: connected, served, closed."""
        entry = self.connect(worker)
        self.begin(worker, entry)
        self.end(worker, entry, name, ms, error)
        self.leave(worker, entry)

    def measured(self, kind: Kind, value: float) -> None:
        """The monitor has measured this value."""
        self.shared.header.values[kind] = round(value * SCALE)
        self.shared.header.sampled_at = time.monotonic_ns()

    def worked(self) -> "Works":
        """100 calls of three functions, of which three failed; one more runs; one client idles."""
        for call in range(90):
            self.serve(call % 2, "stats.mean", 10)
        for call in range(9):
            self.serve(call % 2, "db.query", 1000, f"no such table t{call}" if call < 3 else None)
        running, resting = self.connect(0), self.connect(1)
        self.begin(0, running)
        self.begin(1, resting)
        self.end(1, resting, "test.ping", 1)
        self.tables[1].is_doing(resting, IDLE)
        statistics = self.statistics[1]
        statistics.refused()
        statistics.event("module_not_allowed", "no module os", 4711, 1000)
        statistics.refused()
        statistics.event("invalid_request", "not JSON", 4711, 1000)
        statistics.refused()
        statistics.rejected()
        statistics.overloaded("rate")
        self.measured(Kind.MEMORY, 856.3)
        self.measured(Kind.CPU, 250)
        header = self.shared.header
        header.peak_memory, header.peak_cpu = 1023 * MEGABYTE, 260 * SCALE
        header.alerts[Kind.CPU] = 2
        header.checked_at = header.cleanup_at = time.monotonic_ns()
        header.processes, header.processes_by_rss = 5, 1
        return self


@pytest.fixture
def works() -> Iterator[Works]:
    works = Works(workers=2)
    yield works
    works.close()


def assert_shape(value: Any, shape: Any, context: str = "") -> None:
    """Every field is there, each of its type, and no other; `shape` is made of types."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), context
        assert set(value) == set(shape), context
        for name, inner in shape.items():
            assert_shape(value[name], inner, f"{context}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), context
        for number, each in enumerate(value):
            assert_shape(each, shape[0], f"{context}[{number}]")
    else:
        assert isinstance(value, shape), f"{context} is {value!r}"
        if shape in (int, Number):
            assert not isinstance(value, bool), context


RESOURCE_STATUS = {
    "memory_mb": Number,
    "cpu_percent": Number,
    "requests_per_minute": int,
    "concurrent_requests": int,
    "violations": [str],
    "warnings": [str],
    "peak_memory": Number,
    "peak_cpu": Number,
    "memory_limit": {"mb": Number, "from": str},
    "alerts": dict.fromkeys(
        ("memory", "cpu", "requests", "concurrent", "connections", "cgroup_memory"), int
    ),
}
PERFORMANCE_METRICS = {
    "total_requests": int,
    "successful_requests": int,
    "failed_requests": int,
    "avg_response_time": Number,
    "p50_response_time": Number,
    "p95_response_time": Number,
    "p99_response_time": Number,
    "requests_last_5_minutes": int,
    "requests_per_second": Number,
    "error_rate": Number,
    "requests_per_second_last_minute": Number,
    "avg_response_time_last_5_minutes": Number,
    "error_rate_last_5_minutes": Number,
    "uptime_seconds": Number,
}
CONNECTION = {
    "connection_id": str,
    "worker": int,
    "start_time": float,
    "start_time_iso": str,
    "duration_seconds": Number,
    "requests_count": int,
    "last_activity": float,
    "last_activity_iso": str,
    "idle_time": Number,
    "status": str,
}
ERROR = {"timestamp": float, "module_function": str, "error": str, "duration_ms": Number}
EVENT = {
    "timestamp": float,
    "timestamp_iso": str,
    "event": str,
    "event_type": str,
    "message": str,
    "pid": int,
    "uid": int,
    "client_info": str,
}
EVENTS = ("invalid_request", "module_not_allowed", "function_not_allowed", "permission_denied")
COUNTED = {
    "requests_processed": int,
    "requests_succeeded": int,
    "requests_failed": int,
    "requests_rejected": int,
    "validation_failures": int,
    "security_events": int,
    "connections_total": int,
    "connections_rejected": int,
    "peak_connections": int,
    "start_time": float,
    "last_cleanup": float,
    "last_resource_check": float,
}
NEVER = dict.fromkeys(("last_cleanup", "last_resource_check"), type(None))
SYSTEM_STATS = {
    **COUNTED,
    "processes": int,
    "processes_measured_by_rss": int,
    "cpu_count": int,
    "load_average": [float],
    "memory_total_mb": Number,
    "memory_available_mb": Number,
}
METRICS = {
    "timestamp": float,
    "timestamp_iso": str,
    "daemon_info": {"version": str, "uptime_seconds": Number, "uptime_formatted": str},
    "resource_status": RESOURCE_STATUS,
    "performance_metrics": PERFORMANCE_METRICS,
    "security_summary": dict.fromkeys(
        ("total_security_events", "validation_failures", "requests_rejected"), int
    ),
    "connection_summary": dict.fromkeys(
        (
            *("total_connections", "current_connections", "active_connections"),
            *("stale_connections", "peak_connections"),
        ),
        int,
    ),
    "module_status": {
        "loaded_modules": [str],
        "loaded_modules_count": int,
        "available_modules": [str],
    },
    "system_stats": SYSTEM_STATS,
    "workers": [
        {
            "worker": int,
            "pid": int,
            "generation": int,
            "uptime_seconds": Number,
            "memory_mb": Number,
            "connections": int,
            "taken_over": int,
            "sessions": int,
            "running": int,
            "requests": int,
            "failed": int,
            "recent_functions": [str],
        }
    ],
    "gate": {
        "verdict": str,
        "verdict_seconds": Number,
        "verdict_closings": int,
        "overload": str,
        "connections": int,
        "max_connections": int,
        "running": int,
        "max_concurrent_requests": int,
        "admitted_last_minute": int,
        "max_requests_per_minute": int,
        "waiting_clients": int,
        "waiting_doors": int,
        "waiting_requests": int,
        "overloaded": dict.fromkeys(("verdict", "connections", "concurrency", "rate"), int),
        "pings": int,
        "waited": {
            reason: {"count": int, "seconds": float, "p50": float, "p99": float}
            for reason in ("verdict", "concurrency", "rate", "threads")
        },
        "worker_deaths": int,
        "workers_retired_for_memory": int,
    },
}
INFO = {
    "daemon_version": str,
    "python_version": str,
    "python_executable": str,
    "platform": str,
    "working_directory": str,
    "socket_path": str,
    "socket_paths": [str],
    "uptime": Number,
    "loaded_modules": [str],
    "active_connections": int,
    "memory_measure": str,
    "memory_limit": {"mb": Number, "from": str},
    "cgroup_memory": (dict, type(None)),
    "cgroup_cpu": (dict, type(None)),
    "cpu_affinity": int,
    "configuration": dict,
}
CONNECTIONS = {
    "total_connections": int,
    "current_connections": int,
    "active_connections": int,
    "stale_connections": int,
    "connections": [CONNECTION],
    "connection_limits": {
        "max_concurrent": int,
        "max_concurrent_requests": int,
        "stale_timeout": Number,
    },
}
STATS = {
    **COUNTED,
    "security_metrics": {
        "total_events": int,
        "events_by_type": dict.fromkeys(EVENTS, int),
        "recent_events": [EVENT],
    },
    "performance_summary": PERFORMANCE_METRICS,
    "resource_status": RESOURCE_STATUS,
    "validation_config": {
        "strict_mode": bool,
        "max_string_length": int,
        "max_array_length": int,
        "max_object_depth": int,
        "max_param_count": int,
    },
}


# -- all fields --


def test_all_fields_are_there_each_of_its_type(works: Works) -> None:
    shared, settings = works.worked().shared, works.settings
    assert_shape(reports.metrics(shared, settings, MODULES), METRICS)
    assert_shape(reports.info(shared, settings, MODULES), INFO)
    assert_shape(system_connections(shared, settings), CONNECTIONS)
    assert_shape(reports.stats(shared, settings), STATS)
    assert_shape(reports.counted(shared), COUNTED)
    assert_shape(reports.recent_errors(shared), [ERROR])


def test_a_daemon_that_has_done_nothing_has_the_same_fields(works: Works) -> None:
    shared, settings = works.shared, works.settings
    system_stats = {**SYSTEM_STATS, **NEVER}
    metrics = reports.metrics(shared, settings, MODULES)
    assert_shape(metrics, {**METRICS, "system_stats": system_stats})
    assert_shape(system_connections(shared, settings), CONNECTIONS)
    assert_shape(reports.stats(shared, settings), {**STATS, **NEVER})
    performance = metrics["performance_metrics"]
    assert performance.pop("uptime_seconds") > 0
    assert set(performance.values()) == {0}


def test_info_has_the_whole_configuration(works: Works) -> None:
    info = reports.info(works.worked().shared, works.settings, MODULES)
    configuration = info["configuration"]
    assert {"max_connections", "max_request_size", "connection_timeout", "cleanup_interval"} <= set(
        configuration
    )
    assert configuration["connection_timeout"] == works.settings.limits.idle_timeout
    assert configuration["max_memory_mb"] == 1000
    assert configuration["workers"] == 2
    assert (info["socket_path"], info["socket_paths"]) == (
        "/tmp/a.sock",
        ["/tmp/a.sock", "/tmp/b.sock"],
    )
    assert info["loaded_modules"] == MODULES
    assert info["memory_measure"] == "pss, and rss of 1 process"
    works.shared.header.processes_by_rss = 0
    assert reports.info(works.shared, works.settings, MODULES)["memory_measure"] == "pss"


# -- the numbers --


def test_the_numbers_are_those_of_the_whole_daemon(works: Works) -> None:
    metrics = reports.metrics(works.worked().shared, works.settings, MODULES)
    performance = metrics["performance_metrics"]
    assert performance["total_requests"] == 100
    assert (performance["successful_requests"], performance["failed_requests"]) == (97, 3)
    assert performance["error_rate"] == 0.03
    assert performance["avg_response_time"] == pytest.approx((0.9 + 9 + 0.001) / 100)
    assert performance["p50_response_time"] == pytest.approx(0.01, rel=0.05)
    assert performance["p95_response_time"] == pytest.approx(1.0, rel=0.05)
    assert performance["p99_response_time"] == pytest.approx(1.0, rel=0.05)
    status = metrics["resource_status"]
    assert (status["requests_per_minute"], status["concurrent_requests"]) == (101, 1)
    assert (status["memory_mb"], status["cpu_percent"]) == (856.3, 250)
    assert (status["peak_memory"], status["peak_cpu"]) == (1023, 260)
    assert status["violations"] == ["CPU usage 250.0% exceeds limit 200%"]
    assert status["warnings"] == ["Memory usage 856.3MB approaching limit 1000MB"]
    assert status["alerts"]["cpu"] == 2
    assert metrics["security_summary"] == {
        "total_security_events": 2,
        "validation_failures": 1,
        "requests_rejected": 3,
    }
    assert metrics["connection_summary"] == {
        "total_connections": 101,
        "current_connections": 2,
        "active_connections": 2,
        "stale_connections": 0,
        "peak_connections": works.shared.header.peak_connections,
    }


def test_what_the_first_daemon_meant_stands_beside_what_a_field_means_now(works: Works) -> None:
    shared, settings = works.worked().shared, works.settings
    metrics = reports.metrics(shared, settings, MODULES)
    assert metrics["module_status"]["loaded_modules_count"] == len(MODULES)
    moment = datetime.fromisoformat(metrics["timestamp_iso"])
    assert abs(moment.timestamp() - metrics["timestamp"]) < 1e-3
    performance = metrics["performance_metrics"]
    last_minute = metrics["resource_status"]["requests_per_minute"]
    assert performance["requests_per_second_last_minute"] == last_minute / 60
    assert performance["error_rate_last_5_minutes"] == performance["error_rate"] > 0
    average = performance["avg_response_time"]
    assert performance["avg_response_time_last_5_minutes"] == pytest.approx(average, rel=0.05)
    listed = system_connections(shared, settings)
    assert listed["current_connections"] == len(listed["connections"])
    for each in listed["connections"]:
        opened = datetime.fromisoformat(each["start_time_iso"]).timestamp()
        assert abs(opened - each["start_time"]) < 1e-3
    counted = reports.counted(shared)  # test.ping
    assert counted["requests_succeeded"] == performance["successful_requests"]
    for name in set(counted) - set(NEVER):  # those are computed from the time of the call
        assert counted[name] == metrics["system_stats"][name]
    for event in reports.recent_events(shared):
        assert event["event_type"] == event["event"]
        assert event["client_info"] == f"pid {event['pid']}, uid {event['uid']}"


def test_numbers_that_several_reports_have_agree(works: Works) -> None:
    shared, settings = works.worked().shared, works.settings
    metrics = reports.metrics(shared, settings, MODULES)
    stats = reports.stats(shared, settings)
    connections = system_connections(shared, settings)
    performance, gate = metrics["performance_metrics"], metrics["gate"]
    assert performance["total_requests"] == (
        performance["successful_requests"] + performance["failed_requests"]
    )
    assert stats["requests_processed"] == performance["total_requests"]
    assert stats["requests_failed"] == performance["failed_requests"]
    assert sum(w["requests"] for w in metrics["workers"]) == performance["total_requests"]
    assert sum(w["failed"] for w in metrics["workers"]) == performance["failed_requests"]
    assert sum(w["running"] for w in metrics["workers"]) == gate["running"] == 1
    assert metrics["resource_status"]["concurrent_requests"] == gate["running"]
    assert metrics["resource_status"]["requests_per_minute"] == gate["admitted_last_minute"]
    assert sum(w["connections"] for w in metrics["workers"]) == gate["connections"] == 2
    assert connections["active_connections"] == len(connections["connections"]) == 2
    assert connections["total_connections"] == stats["connections_total"] == 101
    assert stats["security_events"] == sum(stats["security_metrics"]["events_by_type"].values())
    assert len(stats["security_metrics"]["recent_events"]) == stats["security_events"]
    assert stats["requests_rejected"] == metrics["security_summary"]["requests_rejected"]
    assert stats["connections_rejected"] == 1
    assert gate["overloaded"] == {"verdict": 0, "connections": 0, "concurrency": 0, "rate": 1}
    assert stats["performance_summary"].keys() == performance.keys()


def test_another_process_reports_the_same(works: Works) -> None:
    shared = works.worked().shared
    other = Shared.attach(os.dup(shared.fd))
    for name in ("workers", "performance_metrics", "security_summary", "connection_summary"):
        ours = reports.metrics(shared, works.settings, MODULES)[name]
        theirs = reports.metrics(other, works.settings, MODULES)[name]
        for each in [ours, theirs]:
            for worker in each if isinstance(each, list) else [each]:
                worker.pop("uptime_seconds", None)
                worker.pop("requests_per_second", None)
        assert ours == theirs
    assert reports.recent_errors(shared) == reports.recent_errors(other)
    assert reports.recent_events(shared) == reports.recent_events(other)
    os.close(other.fd)


def test_a_dead_workers_counts_are_not_lost_and_what_it_ran_has_failed(works: Works) -> None:
    shared = works.worked().shared
    shared.clear(shared.slots[0])
    metrics = reports.metrics(shared, works.settings, MODULES)
    assert metrics["performance_metrics"]["total_requests"] == 101
    assert metrics["performance_metrics"]["failed_requests"] == 4
    assert metrics["gate"]["running"] == 0
    assert metrics["connection_summary"]["active_connections"] == 1
    assert metrics["connection_summary"]["total_connections"] == 101
    (dead, alive) = metrics["workers"]
    assert (dead["pid"], dead["uptime_seconds"], dead["memory_mb"]) == (0, 0.0, 0.0)
    assert (dead["connections"], dead["running"]) == (0, 0)
    assert alive["pid"] == 101
    assert len(reports.recent_errors(shared)) == 3
    listed = system_connections(shared, works.settings)["connections"]
    assert [each["worker"] for each in listed] == [1]


def test_slots_that_were_never_used_are_not_listed(works: Works) -> None:
    assert len(reports.workers(works.shared)) == 2
    works.shared.use_slot(2)
    assert [each["worker"] for each in reports.workers(works.shared)] == [0, 1, 2]


def test_a_worker_is_reported_with_its_last_functions(works: Works) -> None:
    (first, second) = reports.workers(works.worked().shared)
    assert first["recent_functions"] == ["db.query", "stats.mean"]
    assert second["recent_functions"] == ["test.ping", "db.query", "stats.mean"]


def test_the_gate_is_reported_with_what_waits(works: Works) -> None:
    shared = works.shared
    shared.header.backlog = 5
    shared.slots[0].accept_waits_for = WAITS_FOR_RATE
    shared.slots[1].queued = 3
    shared.header.deaths, shared.header.retired = 4, 2
    set_overload_state(shared, works.wakeups, GATE_CLOSED)
    gate = reports.metrics(shared, works.settings, MODULES)["gate"]
    assert (gate["verdict"], gate["verdict_closings"]) == ("closed", 1)
    assert (gate["waiting_clients"], gate["waiting_doors"], gate["waiting_requests"]) == (5, 1, 3)
    assert (gate["worker_deaths"], gate["workers_retired_for_memory"]) == (4, 2)


def test_limits_that_a_reload_has_changed_are_reported(works: Works) -> None:
    limits = Limits(max_connections=7, max_concurrent_requests=5, max_requests_per_minute=3)
    assert works.shared.apply_limits(limits)
    gate = reports.metrics(works.shared, works.settings, MODULES)["gate"]
    assert gate["max_connections"] == 7
    assert gate["max_concurrent_requests"] == 5
    assert gate["max_requests_per_minute"] == 3
    report = system_connections(works.shared, works.settings)["connection_limits"]
    assert report["max_concurrent"] == 7
    limit = {reading.kind: reading.limit for reading in totals.readings(works.shared)}
    assert limit == {
        Kind.MEMORY: 1024,
        Kind.CPU: 200,
        Kind.REQUESTS: 3,
        Kind.CONCURRENT: 5,
        Kind.CONNECTIONS: 7,
        Kind.CGROUP_MEMORY: 0,
    }


def test_the_lower_limit_of_memory_holds_and_is_named(works: Works) -> None:
    def reported() -> dict[str, Any]:
        metrics = reports.metrics(works.shared, works.settings, MODULES)
        limit: dict[str, Any] = metrics["resource_status"]["memory_limit"]
        assert limit["mb"] == totals.readings(works.shared)[Kind.MEMORY].limit
        return limit

    assert reported() == {"mb": 1000, "from": "configuration"}
    works.shared.header.tightest_cgroup = 180 * MEGABYTE
    assert reported() == {"mb": 180, "from": "cgroup"}
    works.shared.header.tightest_cgroup = 1800 * MEGABYTE
    assert reported() == {"mb": 1000, "from": "configuration"}


# -- connections, errors, events --


def test_each_connection_is_reported_with_what_it_does(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = works.worked()
    now = time.monotonic_ns() + 1000 * SECOND
    clock = types.SimpleNamespace(monotonic_ns=lambda: now, time=lambda: 1_700_000_000.0)
    for module in ("reports", "connections", "times"):
        monkeypatch.setattr(f"cpanbridge.supervisor.reports.{module}.time", clock)
    report = system_connections(works.shared, works.settings)
    (running, resting) = report["connections"]
    assert report["stale_connections"] == 1  # not the one whose request runs
    assert (running["status"], resting["status"]) == ("running", "stale")
    assert (running["requests_count"], resting["requests_count"]) == (1, 1)
    for each in (running, resting):
        assert 1000 <= each["idle_time"] <= each["duration_seconds"] < 1100
        assert each["start_time"] == pytest.approx(1_700_000_000 - each["duration_seconds"])
        assert each["last_activity"] == pytest.approx(1_700_000_000 - each["idle_time"])


def test_no_two_connections_ever_have_the_same_id(works: Works) -> None:
    seen = []
    for _ in range(5):
        entries = [(worker, works.connect(worker)) for worker in (0, 1, 0)]
        listed = system_connections(works.shared, works.settings)["connections"]
        seen += [each["connection_id"] for each in listed]
        for worker, entry in entries:
            works.leave(worker, entry)
    assert len(set(seen)) == len(seen) == 15


def test_recent_errors_are_the_newest_of_all_workers(works: Works) -> None:
    for number in range(40):
        works.serve(number % 2, f"m.f{number % 3}", number, f"error {number}")
    errors = reports.recent_errors(works.shared)
    assert [each["error"] for each in errors] == [f"error {n}" for n in range(39, 39 - RECENT, -1)]
    assert errors[0]["module_function"] == "m.f0"
    assert errors[0]["duration_ms"] == 39
    assert errors[0]["timestamp"] == pytest.approx(time.time(), abs=600)


def test_the_error_of_a_function_that_has_just_been_named_is_reported(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's function fails for its first time while the report is being made."""
    names = works.shared.names.all

    def read_before_it_is_named() -> Any:
        found = names()
        monkeypatch.undo()
        works.serve(1, "late.comer", 5, "an error")
        return found

    monkeypatch.setattr(works.shared.names, "all", read_before_it_is_named)
    assert reports.recent_errors(works.shared) in (
        [],
        [
            {
                "timestamp": pytest.approx(time.time(), abs=600),
                "module_function": "late.comer",
                "error": "an error",
                "duration_ms": 5,
            }
        ],
    )


def test_recent_events_have_kind_message_and_process(works: Works) -> None:
    works.statistics[0].event("permission_denied", "system.shutdown\nis not", 17, 1001)
    works.statistics[1].event("invalid_request", "", -1, -1)
    (last, first) = reports.recent_events(works.shared)
    assert (last["event"], last["message"], last["pid"]) == ("invalid_request", "", -1)
    assert (first["event"], first["message"]) == ("permission_denied", "system.shutdown\nis not")
    assert (first["pid"], first["uid"]) == (17, 1001)


def test_functions_beyond_the_end_of_the_table_have_a_common_name(works: Works) -> None:
    works.statistics[0].error(0, 1, "an error")
    assert reports.recent_errors(works.shared)[0]["module_function"] == OTHERS


# -- clocks --


def every_number(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from every_number(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from every_number(inner, name)
    elif isinstance(value, Number) and not isinstance(value, bool):
        yield name, value


def test_a_wall_clock_that_was_set_back_an_hour_makes_no_age_negative(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = works.worked()
    shared, settings = works.shared, works.settings

    def all_reports() -> list[dict[str, Any]]:
        return [
            reports.metrics(shared, settings, MODULES),
            system_connections(shared, settings),
            reports.stats(shared, settings),
            reports.info(shared, settings, MODULES),
        ]

    before = [number for report in all_reports() for number in every_number(report)]
    back = time.time() - 3600
    clock = types.SimpleNamespace(monotonic_ns=time.monotonic_ns, time=lambda: back)
    for module in ("reports", "connections", "times"):
        monkeypatch.setattr(f"cpanbridge.supervisor.reports.{module}.time", clock)
    after = [number for report in all_reports() for number in every_number(report)]
    for (name, old), (_, new) in zip(before, after, strict=True):
        assert new >= 0 or name == "pid", name
        if name in ("last_activity", "last_cleanup", "last_resource_check"):
            assert back - 600 < new <= back  # by the wall clock as it is now
        elif "seconds" in name or name in ("uptime", "idle_time"):
            assert old <= new < old + 600, name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0h 0m 0s"),
        (0.999, "0h 0m 0s"),
        (59.9, "0h 0m 59s"),
        (3661, "1h 1m 1s"),
        (86_400, "24h 0m 0s"),
        (100 * 86_400 + 1, "2400h 0m 1s"),
    ],
)
def test_durations_are_in_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# -- totals --


def test_counts_that_are_read_while_they_change_are_never_below_zero(works: Works) -> None:
    """A worker opens, admits, finishes and closes between any two of the reader's reads."""
    shared = works.shared
    slot = shared.slots[0]

    class Changing:
        def __getattr__(self, name: str) -> int:
            value: int = getattr(slot, name)
            slot.opened += 1
            slot.admitted += 1
            slot.succeeded += 1
            slot.closed += 1
            return value

    class Fake:
        used_slots = (Changing(), shared.slots[1])
        admitted_in_window = shared.admitted_in_window

    for _ in range(3):
        counts = totals.count(Fake())  # type: ignore[arg-type]
        assert counts.running >= 0
        assert counts.connections >= 0


def test_rates_without_requests_are_zero(works: Works) -> None:
    counts = totals.count(works.shared)
    assert (counts.error_rate, counts.average_seconds, counts.finished) == (0, 0, 0)


def test_a_request_is_in_every_report_before_its_reply_is_sent(works: Works) -> None:
    """A client that asks for a report finds its own call in it."""
    entry = works.connect(0)
    works.begin(0, entry)
    works.end(0, entry, "m.f", 5)
    metrics = reports.metrics(works.shared, works.settings, MODULES)
    assert metrics["performance_metrics"]["total_requests"] == 1
    assert metrics["performance_metrics"]["p50_response_time"] > 0
    assert metrics["workers"][0]["recent_functions"] == ["m.f"]
