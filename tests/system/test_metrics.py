"""`cpanbridged metrics`: the numbers in Prometheus' format, in every state of the daemon."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, one_shot, until
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


class Samples(dict[tuple[str, Labels], float]):
    """The samples of a scrape: `samples("name", label=value)`, without the common prefix."""

    def __call__(self, name: str, **labels: str) -> float:
        return self[f"cpanbridged_{name}", frozenset(labels.items())]


def scrape(daemon: Daemon) -> Samples:
    """The command's output, read by Prometheus' own parser."""
    done = daemon.command("metrics")
    assert (done.returncode, done.stderr) == (0, "")
    samples = Samples()
    for family in text_string_to_metric_families(done.stdout):
        assert family.documentation.endswith("."), family
        assert family.type in ("counter", "gauge", "summary"), family
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            samples[sample.name, frozenset(sample.labels.items())] = sample.value
    return samples


def hang(daemon: Daemon, stack: contextlib.ExitStack, calls: int) -> None:
    """Have so many calls run until the test is over."""
    go = daemon.folder / "go"
    for number in range(calls):
        started = daemon.folder / f"runs-{number}"
        thread = threading.Thread(
            target=one_shot, args=(daemon.path, "probe", "run_until", [str(go), str(started)])
        )
        thread.start()
        stack.callback(thread.join, 30)
        until(started.exists)
    stack.callback(go.touch)


def numbers(daemon: Daemon) -> dict[str, Any]:
    """What the command prints, from the master, without the command."""
    found: dict[str, Any] = daemon.control("metrics")["metrics"]
    return found


def test_counters_count_the_calls(daemon: Daemon) -> None:
    fresh = scrape(daemon)
    assert fresh("requests_total", outcome="succeeded") == 0
    assert math.isnan(fresh("request_duration_seconds", quantile="0.5"))
    for number in range(5):
        daemon.call("test", "echo", [number])
    for _ in range(2):
        assert not one_shot(daemon.path, "probe", "fail")["success"]
    assert not one_shot(daemon.path, "os", "remove", ["x"])["success"]
    with Framed(daemon.path) as kept:
        assert kept.call("probe", "nap", [0.2]) is not None
        found = scrape(daemon)
        assert found("connections_open") == 1
    assert found("requests_total", outcome="succeeded") == 6
    assert found("requests_total", outcome="failed") == 2
    assert found("requests_refused_total") == 1
    assert found("security_events_total", event="module_not_allowed") == 1
    assert found("connections_opened_total") - found("connections_handed_over_total") == 9
    assert found("function_calls_total", module="test", function="echo") == 5
    assert found("function_failures_total", module="test", function="echo") == 0
    assert found("function_failures_total", module="probe", function="fail") == 2
    assert found("function_busy_seconds_total", module="probe", function="nap") >= 0.2
    assert sum(found("worker_requests_total", worker=each) for each in "01") == 8
    assert sum(found("worker_failures_total", worker=each) for each in "01") == 2
    assert found("request_duration_seconds_count") == 8
    assert found("request_duration_seconds_sum") >= 0.2
    assert found("request_duration_seconds", quantile="0.99") == pytest.approx(0.2, rel=0.5)
    assert found("requests_last_minute") == 8


def test_it_reports_the_load_and_the_limits(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 3\n[limits]\nmax_memory_mb = 500\nmax_cpu_percent = 150\nmax_connections = 7\n"
        "max_concurrent_requests = 5\nmax_requests_per_minute = 0"
    ).run()
    until(lambda: numbers(daemon)["resource_status"]["memory_mb"] > 1)
    found = scrape(daemon)
    assert found("gate_open") == 1
    assert found("memory_limit_bytes") == 500 << 20
    assert found("memory_bytes") < found("memory_limit_bytes")
    assert found("cpu_limit_cores") == 1.5
    assert found("connections_limit") == 7
    assert found("requests_running_limit") == 5
    assert found("requests_last_minute_limit") == math.inf
    assert found("workers") == found("workers_wanted") == 3
    assert found("start_time_seconds") == pytest.approx(found_at(daemon), abs=60)


def found_at(daemon: Daemon) -> float:
    """When the daemon's configuration was written, which is shortly before its start."""
    return daemon.config.stat().st_mtime


def test_totals_stay_when_a_worker_dies_and_at_a_reload(daemon: Daemon) -> None:
    for _ in range(4):
        daemon.call("test", "echo", True)
    os.kill(daemon.workers()[0], signal.SIGKILL)
    until(lambda: numbers(daemon)["gate"]["worker_deaths"] == 1)
    daemon.reload()
    found = scrape(daemon)
    assert found("generation") == 2
    assert found("requests_total", outcome="succeeded") == 4
    assert found("function_calls_total", module="test", function="echo") == 4


def test_it_answers_while_the_gate_is_closed(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits = {max_memory_mb = 200, memory_grace = 600}").run()
    until(lambda: numbers(daemon)["resource_status"]["memory_mb"] > 1)
    daemon.call("probe", "hoard", [250])
    # A sample may have been taken while it was allocated: of less, but already over the limit.
    until(lambda: max(each["memory_mb"] for each in numbers(daemon)["workers"]) > 250)
    found = scrape(daemon)
    assert found("gate_open") == 0
    assert found("memory_bytes") > found("memory_limit_bytes")
    assert found("gate_closings_total") == 1
    assert found("alerts_total", limit="memory") == 1
    assert max(found("worker_memory_bytes", worker=each) for each in "01") > 250 << 20
    daemon.stop(signal.SIGQUIT)


def test_it_answers_while_all_threads_hang(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nthreads = 2\nlimits.max_concurrent_requests = 4").run()
    with contextlib.ExitStack() as stack:
        hang(daemon, stack, 4)
        found = scrape(daemon)
        assert found("requests_running") == 4
        assert sum(found("worker_requests_running", worker=each) for each in "01") == 4


def test_it_answers_while_all_workers_are_stopped(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    with daemon.held():
        assert scrape(daemon)("workers") == 2


def names(report: Any) -> Any:
    """The fields of an object, and of those within it or within its lists."""
    if isinstance(report, dict):
        return {name: names(value) for name, value in report.items()}
    if isinstance(report, list):
        return [names(each) for each in report if isinstance(each, dict)]
    return None


def test_as_json_it_is_the_object_of_system_metrics(daemon: Daemon) -> None:
    daemon.call("test", "echo", True)
    asked = daemon.metrics()
    del asked["module_status"]  # the master has no modules
    done = daemon.command("metrics", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert names(printed) == names(asked)
    assert printed["performance_metrics"]["total_requests"] == 2


def test_without_a_daemon_it_is_exit_status_3(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    for flags in ((), ("--json",)):
        done = daemon.command("metrics", *flags)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"cpanbridged: not running at {daemon.path}\n"


def test_a_master_that_does_not_answer_is_exit_status_1(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        done = daemon.command("metrics")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cpanbridged: the master does not answer within 3 s; ")


def test_the_line_for_the_textfile_collector_replaces_the_file_as_a_whole(daemon: Daemon) -> None:
    """The line in docs/operations.md: node_exporter never reads half a file, nor an empty one."""
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    (line,) = [each for each in page.read_text().splitlines() if "cpanbridged metrics >" in each]
    command = line.strip().removeprefix("* * * * * ")
    collected = daemon.folder / "cpanbridged.prom"
    command = command.replace("/var/lib/node_exporter/cpanbridged.prom", str(collected))
    environment = {
        **daemon.environment,
        "CPAN_BRIDGE_SOCKET": daemon.path,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run() -> int:
        return subprocess.run(
            ["sh", "-c", command], env=environment, timeout=60, check=False, capture_output=True
        ).returncode

    assert run() == 0
    first = collected.read_text()
    assert "cpanbridged_gate_open 1.0\n" in first
    assert daemon.stop() == 0
    assert run() == 3
    assert collected.read_text() == first


def test_the_daemon_does_not_import_what_only_the_command_needs(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "loaded.py").write_text("import sys\ndef modules():\n    return list(sys.modules)\n")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{helpers}"')
    daemon.run()
    assert daemon.command("metrics").returncode == 0
    loaded = {name.partition(".")[0] for name in daemon.call("loaded", "modules")}
    assert "cpanbridge" in loaded
    assert loaded.isdisjoint({"rich", "prometheus_client"})
