"""Calls that take too long: clients are answered in time, the log says where, others go on."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, request, send_one_shot, until

ANSWER_SECONDS = 0.2  # after its time, a hung call's client has its reply
TRIES = 5  # for that, on a machine that has other things to do
PROBE = Path(__file__).parents[1] / "modules" / "probe.py"


def where_nap_sleeps() -> int:
    """The line of the tests' module on which `nap` hangs."""
    lines = PROBE.read_text().splitlines()
    return (
        lines.index("    time.sleep(seconds)", lines.index("def nap(seconds: float) -> float:")) + 1
    )


def timed_out(daemon: Daemon, limit: float, reply: dict[str, Any] | None) -> None:
    """See that a reply says that the call took too long."""
    assert reply is not None
    assert reply["error_type"] == "RequestTimeout"
    assert reply["error"] == f"probe.nap did not return within {limit:g} s; it may still run"


@pytest.mark.parametrize("form", ["one-shot", "framed"])
def test_a_hung_calls_client_is_answered_and_the_log_names_the_line(
    new_daemon: NewDaemon, form: str
) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits.request_timeout = 1\nlimits.graceful_timeout = 1"
    ).run()
    before = set(daemon.workers())
    if form == "one-shot":
        timed_out(daemon, 1, one_shot(daemon.path, "probe", "nap", [60], request_id="hung"))
    else:
        with Framed(daemon.path) as client:
            timed_out(daemon, 1, client.call("probe", "nap", [60], request_id="hung"))
            assert client.receive() is None  # and nothing more was read
    until(lambda: "is given up; it is at" in daemon.log())
    logged = daemon.log().partition("probe.nap (request hung of an unknown caller) has been")[2]
    first, second, *_ = logged.splitlines()[1:]
    assert first.strip() == f'File "{PROBE}", line {where_nap_sleeps()}, in nap'
    assert second.strip() == "time.sleep(seconds)"
    # Its worker is replaced, and ends though the call does not.
    until(lambda: "is retired: a call hangs" in daemon.log())
    until(lambda: len(before & set(daemon.workers())) == 1 and len(daemon.workers()) == 2)
    until(lambda: daemon.metrics()["gate"]["running"] == 1)
    assert daemon.metrics()["performance_metrics"]["failed_requests"] == 1


def hung_for(daemon: Daemon, form: str, **fields: Any) -> float:
    """Seconds until a hung call's client receives that its time is over."""
    sent = time.monotonic()
    if form == "one-shot":
        body = json.dumps(request("probe", "nap", [60], **fields)).encode()
        reply = json.loads(send_one_shot(daemon.path, body))
    else:
        with Framed(daemon.path) as client:
            sent = time.monotonic()
            reply = client.call("probe", "nap", [60], **fields)
    told = time.monotonic()
    assert reply is not None
    assert reply["error_type"] == "RequestTimeout"
    return told - sent


@pytest.mark.parametrize(
    ("form", "daemons", "clients"),
    [("one-shot", 0.5, 60), ("one-shot", 0, 0.5), ("framed", 0.5, 0), ("framed", 60, 0.5)],
)
def test_a_hung_calls_client_is_answered_within_a_fifth_of_a_second_of_its_time(
    new_daemon: NewDaemon, form: str, daemons: float, clients: float
) -> None:
    limit = 0.5  # the shorter of the two that there are
    daemon = new_daemon(
        f"workers = 2\nlimits.graceful_timeout = 1\nlimits.request_timeout = {daemons}"
    ).run()
    fields = {"timeout": clients} if clients else {}
    waited: list[float] = []
    while len(waited) < TRIES and min(waited, default=60) > limit + ANSWER_SECONDS:
        waited.append(hung_for(daemon, form, **fields))
    assert limit <= min(waited) <= limit + ANSWER_SECONDS


@pytest.mark.parametrize("form", ["one-shot", "framed"])
def test_an_answered_call_takes_no_room_from_others(new_daemon: NewDaemon, form: str) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits.request_timeout = 0.5\nlimits.graceful_timeout = 600\n"
        "limits.max_concurrent_requests = 2\nlimits.max_connections = 4"
    ).run()
    for _ in range(5):  # more than there is room for, and no worker has ended meanwhile
        if form == "one-shot":
            timed_out(daemon, 0.5, one_shot(daemon.path, "probe", "nap", [600]))
        else:
            with Framed(daemon.path) as client:
                timed_out(daemon, 0.5, client.call("probe", "nap", [600]))
    gate = until(lambda: (found := daemon.metrics()["gate"])["connections"] == 1 and found)
    assert gate["running"] == 1
    assert daemon.stop(signal.SIGQUIT) == 0


def test_an_answered_call_that_returns_gives_its_room_back_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 1\nlimits.request_timeout = 1\nlimits.graceful_timeout = 600"
    ).run()
    with ThreadPoolExecutor(2) as pool:  # one that never returns, which keeps their worker
        hung = [pool.submit(one_shot, daemon.path, "probe", "nap", [n]) for n in (600, 2)]
        for each in hung:
            timed_out(daemon, 1, each.result())
    error = "it took longer than its request_timeout"
    until(lambda: error in json.dumps(daemon.call("system", "performance")))
    gate = until(lambda: (found := daemon.metrics()["gate"])["connections"] == 1 and found)
    assert gate["running"] == 1
    assert daemon.stop(signal.SIGQUIT) == 0


def test_others_in_the_worker_finish_and_a_replacement_is_there_before_it_leaves(
    new_daemon: NewDaemon,
) -> None:
    table = '[modules.other]\nimport = "time"\nfunctions = ["sleep"]\nrequest_timeout = 1'
    daemon = new_daemon(f"workers = 1\n{table}").run()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(one_shot, daemon.path, "probe", "span", [4, str(event)])
        until(event.exists)
        hung = one_shot(daemon.path, "other", "sleep", [60])
        assert hung["error_type"] == "RequestTimeout"
        until(lambda: "is retired" in daemon.log())
        until(lambda: daemon.call("probe", "worker_pid") != int(event.read_text()))
        assert not slow.done()
        assert slow.result()["success"]


def test_the_modules_own_time_replaces_the_global_one_and_the_clients_shortens_both(
    new_daemon: NewDaemon,
) -> None:
    table = '[modules.other]\nimport = "time"\nfunctions = ["sleep"]\nrequest_timeout = 0'
    daemon = new_daemon(f"workers = 2\nlimits.request_timeout = 0.5\n{table}").run()
    assert daemon.call("other", "sleep", [1.0]) is None
    body = json.dumps(request("other", "sleep", [60], timeout=0.3)).encode()
    assert json.loads(send_one_shot(daemon.path, body))["error_type"] == "RequestTimeout"
    assert one_shot(daemon.path, "probe", "nap", [60])["error_type"] == "RequestTimeout"


def test_the_clients_own_time_is_kept(daemon: Daemon) -> None:
    body = json.dumps(request("probe", "nap", [60], timeout=0.5)).encode()
    timed_out(daemon, 0.5, json.loads(send_one_shot(daemon.path, body)))


def test_a_call_that_ends_in_time_is_no_hung_one(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.request_timeout = 5").run()
    before = sorted(daemon.workers())
    for _ in range(50):
        daemon.call("probe", "echo", {})
    assert daemon.call("probe", "nap", [1])
    assert sorted(daemon.workers()) == before
    assert "given up" not in daemon.log()


def test_a_call_that_returns_too_late_gives_no_second_reply(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.request_timeout = 0.5").run()
    with Framed(daemon.path) as client:
        client.send("probe", "nap", [1], request_id="late")
        client.send("probe", "echo", {}, request_id="next")
        reply = client.receive()
        assert reply is not None
        assert (reply["request_id"], reply["error_type"]) == ("late", "RequestTimeout")
        assert client.receive() is None
        assert client.socket.recv(1) == b""
    until(lambda: daemon.metrics()["gate"]["running"] == 1)


def test_a_slow_request_is_shown_once_and_goes_on(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.slow_request = 0.5").run()
    before = sorted(daemon.workers())
    assert daemon.call("probe", "nap", [1.5], perl_caller="report.pl:12")
    assert daemon.log().count("and goes on; it is at") == 1
    assert "probe.nap (request without id of report.pl:12) has been running for " in daemon.log()
    assert f"line {where_nap_sleeps()}, in nap" in daemon.log()
    daemon.call("probe", "nap", [0.1])
    assert daemon.log().count("and goes on") == 1
    assert sorted(daemon.workers()) == before


def test_a_request_whose_client_has_left_is_not_run(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    event, stamps = daemon.folder / "runs", daemon.folder / "stamps"
    body = json.dumps(request("probe", "stamp", [str(stamps)])).encode()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(one_shot, daemon.path, "probe", "span", [1.5, str(event)])
        until(event.exists)
        for _ in range(5):
            with connect(daemon.path) as impatient:
                impatient.sendall(body)
        assert running.result()["success"]
    assert send_one_shot(daemon.path, body, shut_down=True)  # one that only has said all
    until(stamps.exists)
    assert len(stamps.read_text().splitlines()) == 1


def test_a_request_that_found_no_room_in_its_clients_time_is_not_run(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_concurrent_requests = 1").run()
    event, stamps = daemon.folder / "runs", daemon.folder / "stamps"
    with Framed(daemon.path) as waits, ThreadPoolExecutor(1) as pool:
        assert waits.call("test", "ping") is not None
        running = pool.submit(one_shot, daemon.path, "probe", "span", [3, str(event)])
        until(event.exists)
        waits.send("probe", "stamp", [str(stamps)], timeout=0.5)
        reply = waits.receive()
        assert not running.done()  # it is told in its time
        assert waits.call("test", "ping") is not None
        assert running.result()["success"]
    assert reply is not None
    assert reply["error_type"] == "RequestTimeout"
    waited = r"The call was not run: it waited \d\.\d s for limits\.max_concurrent_requests"
    assert re.fullmatch(waited, reply["error"])
    assert not stamps.exists()


def test_a_worker_is_replaced_when_it_has_run_its_requests_and_nobody_notices(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nmax_requests = 50\nlimits.max_requests_per_minute = 0").run()
    before = set(daemon.workers())
    over = threading.Event()
    errors: list[object] = []

    def hammer() -> None:
        while not over.is_set():
            reply = one_shot(daemon.path, "probe", "echo", {})
            if not reply["success"]:
                errors.append(reply)
            time.sleep(0.005)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(hammer)
        try:
            until(lambda: not before & set(daemon.workers()), 30)
        finally:
            over.set()
    assert errors == []
    assert "is retired: it has run max_requests" in daemon.log()
    assert daemon.stop() == 0


@pytest.mark.parametrize("change", [signal.SIGHUP, signal.SIGUSR2])
def test_a_hung_call_does_not_keep_a_worker_that_drains_without_a_limit(
    new_daemon: NewDaemon, change: signal.Signals
) -> None:
    daemon = new_daemon(
        "workers = 1\nlimits.request_timeout = 3\nlimits.graceful_timeout = 1"
    ).run()
    event = daemon.folder / "runs"
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(one_shot, daemon.path, "probe", "span", [60, str(event)])
        until(event.exists)
        os.kill(daemon.pid, change)
        until(lambda: "Reloaded" in daemon.log())
        assert hung.result()["error_type"] == "RequestTimeout"
    until(lambda: not psutil.pid_exists(int(event.read_text())))
