"""The modules that every daemon has: `test` and `system`."""

import json
import os
import platform
import re
import signal
import threading
import time
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, send_one_shot, until


@pytest.fixture(scope="module")
def daemon(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


def test_ping(daemon: Daemon) -> None:
    result = daemon.call("test", "ping", {"a": 1})
    assert set(result) == {
        *("message", "daemon_version", "python_version", "platform", "uptime", "stats", "input"),
    }
    assert result["message"] == "pong"
    assert result["python_version"] == platform.python_version()
    assert 0 < result["uptime"] < 3600
    assert result["input"] == {"a": 1}
    assert {"requests_processed", "requests_failed", "start_time"} <= set(result["stats"])
    assert daemon.call("test", "ping")["input"] is None


@pytest.mark.parametrize(
    "params",
    [None, 5, [5], [], {}, {"a": [None]}, "text", "", False, 0, 2.5, [[5]], 2**70, "\u2603"],
)
def test_echo_distinguishes_what_a_call_would_not(daemon: Daemon, params: Any) -> None:
    result = daemon.call("test", "echo", params)
    assert result == params
    assert type(result) is type(params)


def test_echo_without_params_is_null(daemon: Daemon) -> None:
    with Framed(daemon.path) as client:
        client.send_bytes(b'{"module": "test", "function": "echo"}')
        reply = client.receive()
    assert reply is not None
    assert reply["result"] is None


def test_info(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3\nlimits.max_connections = 17\nlimits.idle_timeout = 99").run()
    info = daemon.call("system", "info")
    assert {
        *("daemon_version", "python_version", "python_executable", "platform"),
        *("working_directory", "socket_path", "uptime", "loaded_modules"),
        *("active_connections", "configuration"),
    } <= set(info)
    assert info["socket_path"] == daemon.path
    assert info["loaded_modules"] == ["probe", "system", "test"]
    assert info["active_connections"] == 1
    assert os.path.samefile(info["python_executable"], f"/proc/{daemon.pid}/exe")
    configuration = info["configuration"]
    assert configuration["max_connections"] == 17
    assert configuration["connection_timeout"] == 99
    assert configuration["max_request_size"] == 10_485_760
    assert configuration["cleanup_interval"] == 300
    assert configuration["workers"] == 3


@pytest.mark.parametrize("function", ["info", "metrics"])
@pytest.mark.parametrize("params", [{"a": 1}, [1], 5])
def test_reports_take_no_params(daemon: Daemon, function: str, params: Any) -> None:
    reply = one_shot(daemon.path, "system", function, params)
    assert reply["error_type"] == "InvalidParams"
    for nothing in ("null", "[]", "{}"):
        daemon.call("system", function, json.loads(nothing))


def test_metrics_has_its_fields(daemon: Daemon) -> None:
    metrics = daemon.metrics()
    assert {
        *("timestamp", "daemon_info", "resource_status", "performance_metrics"),
        *("security_summary", "connection_summary", "module_status", "workers", "gate"),
    } <= set(metrics)
    assert abs(metrics["timestamp"] - time.time()) < 60
    assert set(metrics["module_status"]) == {
        *("loaded_modules", "loaded_modules_count", "available_modules"),
    }
    assert sorted(worker["pid"] for worker in metrics["workers"]) == sorted(daemon.workers())
    assert metrics["gate"]["verdict"] == "open"


def test_metrics_equal_an_independent_count(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3\nlimits.max_requests_per_minute = 10000").run()
    clients, each = 6, 20

    def work(number: int) -> None:
        for n in range(each):
            one_shot(daemon.path, "probe", "two", [n])
        with Framed(daemon.path) as client:
            for n in range(each):
                client.call("probe", "two", [n])
            for _ in range(3):
                client.call("probe", "fail")
                client.call("probe", "two", [1, 2, 3])  # InvalidParams: it was admitted
            client.call("no", "no")
            client.call("probe", "no")
            client.send_bytes(b"nonsense")
            client.receive()
        send_one_shot(daemon.path, b"{}")
        connect(daemon.path).close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asked = 0

    def at_rest() -> Any:
        """The metrics, once the asking connection is the only one."""
        nonlocal asked
        asked += 1
        metrics = daemon.metrics()
        return metrics["gate"]["connections"] == 1 and metrics

    metrics = until(at_rest)
    ran, failed = clients * (2 * each + 6), clients * 6
    polls = asked - 1  # the last one is not finished when it counts
    performance = metrics["performance_metrics"]
    assert performance["total_requests"] == ran + polls
    assert performance["failed_requests"] == failed
    assert performance["successful_requests"] == ran - failed + polls
    assert performance["error_rate"] == pytest.approx(failed / (ran + polls))
    assert performance["avg_response_time"] > 0
    resources = metrics["resource_status"]
    assert resources["requests_per_minute"] == ran + polls + 1
    assert resources["concurrent_requests"] == 1
    assert metrics["security_summary"] == {
        "total_security_events": 4 * clients,
        "validation_failures": 2 * clients,
        "requests_rejected": 4 * clients,
    }
    connections = metrics["connection_summary"]
    assert connections["active_connections"] == 1
    assert connections["total_connections"] == clients * (each + 3) + polls + 1
    assert 1 <= connections["peak_connections"] <= 2 * clients + 2
    gate = metrics["gate"]
    assert (gate["connections"], gate["running"], gate["worker_deaths"]) == (1, 1, 0)
    assert (gate["waiting_doors"], gate["waiting_requests"]) == (0, 0)
    assert gate["admitted_last_minute"] == ran + polls + 1
    assert sum(worker["requests"] for worker in metrics["workers"]) == ran + polls
    assert sum(worker["running"] for worker in metrics["workers"]) == 1


def test_metrics_see_what_runs_in_other_workers(daemon: Daemon) -> None:
    naps = [Framed(daemon.path) for _ in range(5)]
    for nap in naps:
        nap.send("probe", "nap", [1.0])
    until(lambda: daemon.metrics()["gate"]["running"] == 6)
    info = daemon.call("system", "info")
    assert info["active_connections"] >= 6
    for nap in naps:
        assert nap.receive()
        nap.socket.close()
    until(lambda: daemon.metrics()["gate"]["connections"] == 1)


def test_totals_survive_a_worker(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_requests_per_minute = 0").run()
    for n in range(10):
        daemon.call("probe", "two", [n])
    with connect(daemon.path) as client:
        client.sendall(b'{"module": "probe", "function": "die"}')
        assert client.recv(1) == b""
    until(lambda: daemon.metrics()["gate"]["worker_deaths"] == 1)
    metrics = until(
        lambda: (
            (m := daemon.metrics())["gate"]["running"] == 1
            and all(w["pid"] for w in m["workers"])
            and m
        )
    )
    performance = metrics["performance_metrics"]
    assert performance["total_requests"] >= 11
    assert (
        performance["successful_requests"] + performance["failed_requests"]
        == performance["total_requests"]
    )


def test_totals_equal_what_clients_saw_though_workers_are_killed(new_daemon: NewDaemon) -> None:
    """Each reply that a client has is counted, and nothing else but calls lost with a worker."""
    daemon = new_daemon("workers = 2\nlimits.max_requests_per_minute = 0").run()
    stop = threading.Event()
    seen = {"good": 0, "bad": 0, "lost": 0}
    lock = threading.Lock()

    def work(number: int) -> None:
        while not stop.is_set():
            function = "fail" if number % 3 == 0 else "worker_pid"
            try:
                reply = one_shot(daemon.path, "probe", function)
                outcome = "good" if reply["success"] else "bad"
            except (OSError, ValueError):  # closed without a reply, or in the midst of one
                outcome = "lost"
            with lock:
                seen[outcome] += 1
            time.sleep(0.005)  # or they would take the processor from what is tested

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for deaths in range(1, 4):
        calls = sum(seen.values())
        until(lambda calls=calls: sum(seen.values()) > calls + 50)
        os.kill(daemon.workers()[0], signal.SIGKILL)
        until(lambda deaths=deaths: daemon.log().count("; replacing it") == deaths)
        until(lambda deaths=deaths: len(re.findall(r"Worker \d ready", daemon.log())) == 2 + deaths)
    stop.set()
    for thread in threads:
        thread.join(60)
    asked = 0

    def at_rest() -> Any:
        nonlocal asked
        asked += 1
        metrics = daemon.metrics()
        return metrics["gate"]["connections"] == metrics["gate"]["running"] == 1 and metrics

    performance = until(at_rest)["performance_metrics"]
    good = performance["successful_requests"] - (asked - 1)
    bad = performance["failed_requests"]
    assert performance["total_requests"] == good + bad + asked - 1
    assert seen["good"] <= good
    assert seen["bad"] <= bad
    assert good + bad <= sum(seen.values())
    assert daemon.metrics()["gate"]["worker_deaths"] == 3
    functions = {
        each["module_function"]: each
        for each in daemon.call("system", "performance")["module_performance"]["top_modules"]
    }
    counted = functions["probe.worker_pid"]["requests"] + functions["probe.fail"]["requests"]
    assert seen["good"] + seen["bad"] <= counted <= good + bad
    assert functions["probe.fail"]["error_rate"] == 1.0
    assert functions["probe.worker_pid"]["error_rate"] == 0.0
