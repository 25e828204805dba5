"""Overload slows the daemon down and never takes it down, and the log says why."""

import contextlib
import json
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, until

LIMIT_MB = 160
SMALL = f"""
workers = 3
[limits]
max_requests_per_minute = 0
max_memory_mb = {LIMIT_MB}
memory_grace = 1
sample_interval = 0.5
"""


def lines(daemon: Daemon, pattern: str) -> list[str]:
    """The log's lines that match, without their time."""
    found = (line.partition(" [")[2] for line in daemon.log().splitlines())
    return [f"[{line}" for line in found if re.search(pattern, f"[{line}")]


def waiting(daemon: Daemon, client: socket.socket, seconds: float = 0.3) -> bool:
    """Whether a client that has sent its call still has no reply."""
    return not select.select([client], [], [], seconds)[0]


@contextlib.contextmanager
def one_shot_call(daemon: Daemon, function: str, params: list[Any]) -> Iterator[socket.socket]:
    """A client that has sent its call."""
    with connect(daemon.path, timeout=60) as client:
        client.sendall(
            json.dumps({"module": "probe", "function": function, "params": params}).encode()
        )
        yield client


def succeeds(client: Framed) -> bool:
    reply = client.call("test", "echo", True)
    return reply is not None and reply["success"]


def reply_of(client: socket.socket) -> dict[str, Any]:
    data = b""
    while piece := client.recv(65536):
        data += piece
    reply: dict[str, Any] = json.loads(data)
    return reply


# -- memory --


def test_a_hoarding_worker_is_retired_and_nobody_gets_an_error(new_daemon: NewDaemon) -> None:
    """Warning, violation, gate closed, clients wait, the hoarder exits, the gate opens, all served.

    A request that runs in the hoarder meanwhile finishes; a kept connection there is
    ended, so that its client goes elsewhere.
    """
    daemon = new_daemon(SMALL).run()
    until(lambda: daemon.metrics()["resource_status"]["memory_mb"] > 0)
    with contextlib.ExitStack() as stack:
        # A kept connection stays with its worker: so all of these reach the same one.
        hoarder = stack.enter_context(Framed(daemon.path, timeout=60))
        reply = hoarder.call("probe", "hoard", [100])
        assert reply is not None
        pid = reply["result"]
        until(lambda: lines(daemon, r"Resource warning: \['Memory usage"), what="a warning")
        runs = stack.enter_context(one_shot_call(daemon, "span", [6.0]))
        while_running = [
            stack.enter_context(one_shot_call(daemon, "span", [6.0])) for _ in range(2)
        ]
        hoarder.send("probe", "hoard", [LIMIT_MB - 100])
        until(lambda: lines(daemon, "throttling connections"), what="a violation")

        late = [stack.enter_context(one_shot_call(daemon, "echo", [])) for _ in range(4)]
        kept = stack.enter_context(Framed(daemon.path, timeout=60))
        kept.send("probe", "worker_pid")
        assert all(waiting(daemon, client, 0.05) for client in late)
        until(lambda: lines(daemon, rf"\(pid {pid}\) is retired: memory has been over its limit"))

        for client in (runs, *while_running):
            began, ended = reply_of(client)["result"]
            assert ended - began >= 6.0
        for client in late:
            assert reply_of(client)["success"]
        answer = kept.receive()
        assert answer is not None
        assert answer["result"] != pid
        reply = hoarder.receive()  # of the second hoard
        assert reply is not None
        assert reply["success"]
        assert hoarder.receive() is None  # its worker leaves: further calls go elsewhere

    until(lambda: daemon.metrics()["gate"]["verdict"] == "open")
    until(lambda: lines(daemon, "Resource violations are over"))
    metrics = daemon.metrics()
    assert pid not in daemon.workers()
    assert metrics["performance_metrics"]["failed_requests"] == 0
    assert metrics["gate"]["worker_deaths"] == 0
    assert metrics["gate"]["workers_retired_for_memory"] == 1
    assert metrics["resource_status"]["alerts"]["memory"] == 1
    assert metrics["resource_status"]["peak_memory"] > LIMIT_MB
    assert metrics["resource_status"]["violations"] == []
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"\[WARNING\] Resource warning: "
        rf"\['Memory usage {number}MB approaching limit {LIMIT_MB}MB'\]",
        lines(daemon, "Resource warning")[0],
    )
    (violation,) = lines(daemon, "RESOURCE VIOLATION")
    assert re.fullmatch(
        rf"\[CRITICAL\] RESOURCE VIOLATION: "
        rf"\['Memory usage {number}MB exceeds limit {LIMIT_MB}MB'\]",
        violation,
    )
    (throttling,) = lines(daemon, "throttling")
    assert throttling.startswith(
        "[WARNING] Resource violations detected, throttling connections: ['Memory usage "
    )


def test_a_worker_that_holds_the_limit_alone_is_named_with_its_functions(
    new_daemon: NewDaemon,
) -> None:
    # Taking so much takes a while on a busy machine; it is not to be judged before.
    daemon = new_daemon(SMALL.replace("memory_grace = 1", "memory_grace = 4")).run()
    daemon.call("probe", "hoard", [LIMIT_MB + 20])
    (line,) = until(lambda: lines(daemon, "is retired"))
    assert re.search(r"it holds \d+\.\dMB alone, its last functions were probe\.hoard$", line)
    daemon.call("test", "echo", True)


def test_memory_that_is_no_workers_keeps_the_gate_closed_and_is_logged(
    new_daemon: NewDaemon,
) -> None:
    """Retiring workers that have done nothing would not help, so they are left alone."""
    daemon = new_daemon(
        "workers = 2\nlimits = {max_memory_mb = 5, memory_grace = 0, sample_interval = 0.2}"
    ).run()
    until(lambda: lines(daemon, "no worker has run anything since it was started"))
    assert not lines(daemon, "is retired")
    assert "note: memory is over its limit while no request runs" in daemon.command("status").stdout
    with connect(daemon.path) as client:
        client.sendall(b'{"module": "test", "function": "echo"}')
        assert waiting(daemon, client)
    assert daemon.stop() == 0


def test_what_a_worker_starts_counts_and_what_cannot_be_read_counts_by_rss(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nlimits.sample_interval = 0.1").run()
    before = daemon.metrics()["system_stats"]["processes"]
    assert before in (0, 4)  # it may not have looked yet
    pids = [daemon.call("probe", "start", ["sleep", "60"]) for _ in range(3)]
    try:
        until(lambda: daemon.metrics()["system_stats"]["processes"] == 7)
        info = daemon.call("system", "info")
        assert info["memory_measure"] == "pss"
    finally:
        for pid in pids:
            psutil.Process(pid).kill()
    until(lambda: daemon.metrics()["system_stats"]["processes"] == 4)


def test_a_program_that_outlives_its_retired_worker_is_ended_and_no_other_worker_is(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(SMALL).run()
    for _ in range(12):  # so that each worker has run something
        daemon.call("test", "echo", True)
    before = set(daemon.workers())
    pid = daemon.call("probe", "start_hoarder", [LIMIT_MB + 20])
    until(lambda: not psutil.pid_exists(pid), 40, "the end of the program")
    assert daemon.call("test", "echo", True)
    until(lambda: daemon.metrics()["gate"]["verdict"] == "open")
    assert len(lines(daemon, "is retired")) == 1
    (line,) = lines(daemon, "left by a worker that has ended, is ended")
    assert line.startswith(f"[WARNING] Process {pid} (python")
    assert len(before & set(daemon.workers())) == 2


def test_an_old_worker_that_holds_most_has_to_hurry(new_daemon: NewDaemon) -> None:
    """After a reload it may take as long as it likes, but not while the gate is closed for it."""
    # Two generations of processes fit beside the first hoard, not beside the second one.
    daemon = new_daemon(
        SMALL.replace(f"= {LIMIT_MB}", f"= {2 * LIMIT_MB}") + "graceful_timeout = 1"
    ).run()
    with Framed(daemon.path, timeout=60) as hoarder:
        reply = hoarder.call("probe", "hoard", [LIMIT_MB - 10])
        assert reply is not None
        event = daemon.folder / "runs"
        hoarder.send("probe", "span", [60, str(event)])
        until(event.exists)
        daemon.reload()
        assert daemon.call("test", "echo", True)
        daemon.call("probe", "hoard", [LIMIT_MB - 15])
        until(lambda: lines(daemon, rf"\(pid {reply['result']}\) has 1 s left to leave: memory"))
        with pytest.raises((EOFError, OSError)):
            hoarder.receive()
    until(lambda: daemon.metrics()["gate"]["verdict"] == "open")
    assert not lines(daemon, "is retired: memory")


def test_a_client_that_waits_for_the_rate_in_a_retired_worker_gets_no_shutdown_error(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(
        "workers = 1\nlimits = {max_requests_per_minute = 3, max_memory_mb = 100, "
        "memory_grace = 1, sample_interval = 0.2, graceful_timeout = 1}"
    ).run()
    with connect(daemon.path, timeout=60) as late:
        until(lambda: daemon.status()["gate"]["connections"] == 1)  # it is accepted
        daemon.call("test", "echo", True)
        daemon.call("test", "echo", True)
        daemon.call("probe", "hoard", [150])
        late.sendall(b'{"module": "test", "function": "echo"}')
        reply = reply_of(late)
    assert (reply["error_type"], reply["retry_after"]) == ("Overloaded", 1.0)
    assert "shutting down" not in reply["error"]


# -- CPU --


def test_burning_workers_close_the_gate_and_it_opens_by_itself(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 3\n"
        "limits = {max_cpu_percent = 10, sample_interval = 0.5, max_requests_per_minute = 0}"
    ).run()
    with contextlib.ExitStack() as stack:
        end = daemon.folder / "end"
        burning = stack.enter_context(one_shot_call(daemon, "burn_until", [str(end)]))
        until(lambda: lines(daemon, "throttling connections"))
        late = stack.enter_context(one_shot_call(daemon, "worker_pid", []))
        assert waiting(daemon, late)
        end.touch()
        assert reply_of(burning)["success"]
        recovered = time.monotonic()
        assert reply_of(late)["success"]
        assert time.monotonic() - recovered < 10  # a second on a quiet machine
    until(lambda: lines(daemon, "Resource violations are over"))
    assert re.fullmatch(
        r"\[CRITICAL\] RESOURCE VIOLATION: \['CPU usage \d+\.\d% exceeds limit 10%'\]",
        lines(daemon, "RESOURCE VIOLATION")[0],
    )
    metrics = daemon.metrics()
    assert metrics["gate"]["verdict_closings"] >= 1
    assert metrics["gate"]["workers_retired_for_memory"] == 0
    assert metrics["resource_status"]["peak_cpu"] > 10
    assert metrics["performance_metrics"]["failed_requests"] == 0


def test_a_violation_is_logged_once_and_then_once_in_each_interval(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits = "
        "{max_concurrent_requests = 1, sample_interval = 0.1, resource_check_interval = 2}"
    ).run()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(one_shot_call(daemon, "span", [6.0])) for _ in range(2)]
        until(lambda: len(lines(daemon, "RESOURCE VIOLATION")) == 3)
        since = [line[:19] for line in daemon.log().splitlines() if "RESOURCE VIOLATION" in line]
        first, _, third = (time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S")) for at in since)
        assert third - first >= 3  # the log has whole seconds
        for client in clients:
            assert reply_of(client)["success"]


# -- the rate and the other limits --


def test_clients_that_wait_for_the_rate_are_logged(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits = {max_requests_per_minute = 20, sample_interval = 0.1}"
    ).run()
    for _ in range(17):
        daemon.call("test", "echo", True)
    until(lambda: lines(daemon, r"Request rate 17/min approaching limit 20/min"))
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(one_shot_call(daemon, "worker_pid", []))
        # 20 are in; of the 26 that want to be, 6 wait, outside or inside.
        until(lambda: lines(daemon, r"VIOLATION: \['Request rate 2[1-6]/min exceeds limit 20/min'"))
        until(lambda: lines(daemon, r"throttling connections: \['Request rate"))


def test_clients_that_wait_for_a_request_permit_are_logged(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits = {max_concurrent_requests = 2, sample_interval = 0.1}"
    ).run()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(one_shot_call(daemon, "span", [2.0])) for _ in range(5)]
        until(lambda: lines(daemon, r"VIOLATION: \['Concurrent requests [345] exceeds limit 2'"))
        for client in clients:
            assert reply_of(client)["success"]


def test_full_and_many_connections_are_logged_in_the_documents_words(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nlimits = {max_connections = 10, sample_interval = 0.1}").run()
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Framed(daemon.path)).call("test", "echo", True)
        until(lambda: lines(daemon, r"\[INFO\] Elevated connection count: 3 active connections\."))
        for _ in range(7):
            stack.enter_context(Framed(daemon.path)).call("test", "echo", True)
        until(
            lambda: lines(
                daemon,
                r"\[WARNING\] High connection count detected: \d+ active connections\. "
                r"This may indicate a connection leak\.$",
            )
        )
        until(
            lambda: lines(
                daemon, r"\[WARNING\] Connection limit reached \(10\), rejecting new connections$"
            )
        )
    assert len(lines(daemon, "Connection limit reached")) == 1


# -- overload = "reject" --

REJECTING = 'workers = 2\noverload = "reject"\n'


def test_a_client_without_room_for_its_request_is_rejected_at_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(REJECTING + "limits.max_concurrent_requests = 1").run()
    event = daemon.folder / "runs"
    with (
        Framed(daemon.path) as kept,
        one_shot_call(daemon, "span", [30, str(event)]) as running,
    ):
        until(event.exists)
        reply = kept.call("test", "echo", request_id="r7")
        assert reply is not None
        # The kept connection was not admitted either, for the same reason.
        assert (reply["success"], reply["error_type"]) == (False, "Overloaded")
        assert (reply["request_id"], reply["retry_after"]) == ("r7", 0.1)
        assert waiting(daemon, running, 0)
        refused = one_shot(daemon.path, "test", "echo", request_id="r8")
        assert (refused["error_type"], refused["request_id"]) == ("Overloaded", "r8")
        assert "limits.max_concurrent_requests" in refused["error"]
        with Framed(daemon.path) as late:
            reply = late.call("test", "echo", request_id="r9")
            assert reply is not None
            assert (reply["error_type"], reply["request_id"]) == ("Overloaded", "r9")
            assert late.call("test", "ping") is not None
        daemon.stop(signal.SIGQUIT)


def test_a_kept_connection_goes_on_after_a_rejection(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(REJECTING + "limits.max_concurrent_requests = 1").run()
    event = daemon.folder / "runs"
    with Framed(daemon.path) as kept:
        assert kept.call("test", "echo", True)
        with one_shot_call(daemon, "span", [1.0, str(event)]) as running:
            until(event.exists)
            kept.send("test", "echo", request_id="r1")
            kept.send("test", "echo", request_id="r2")
            for name in ("r1", "r2"):
                reply = kept.receive()
                assert reply is not None
                assert (reply["error_type"], reply["request_id"]) == ("Overloaded", name)
            assert reply_of(running)["success"]

        until(lambda: succeeds(kept))


def test_the_rate_says_when_to_come_again(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(REJECTING + "limits.max_requests_per_minute = 3").run()
    for _ in range(3):
        daemon.call("test", "echo", True)
    reply = one_shot(daemon.path, "test", "echo")
    assert reply["error_type"] == "Overloaded"
    assert 30 < reply["retry_after"] <= 60


def test_more_clients_than_connections_are_turned_away_and_counted(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(REJECTING + "limits.max_connections = 3").run()
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(Framed(daemon.path)) for _ in range(3)]
        for client in kept:
            assert succeeds(client)
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(lambda _: one_shot(daemon.path, "test", "echo"), range(100)))
        assert {reply["error_type"] for reply in replies} == {"Overloaded"}
        reply = kept[0].call("system", "stats")
        assert reply is not None
        assert reply["result"]["connections_rejected"] == 100
        assert reply["result"]["requests_rejected"] == 100
        assert reply["result"]["peak_connections"] == 3
        reply = kept[0].call("system", "metrics")
        assert reply is not None
        assert reply["result"]["gate"]["overloaded"]["connections"] == 100
    until(lambda: one_shot(daemon.path, "test", "echo")["success"])


def test_one_worker_whose_connections_are_all_taken_turns_away_too(new_daemon: NewDaemon) -> None:
    daemon = new_daemon('workers = 1\noverload = "reject"\nlimits.max_connections = 2').run()
    with Framed(daemon.path) as first, Framed(daemon.path) as second:
        assert succeeds(first)
        assert succeeds(second)
        for _ in range(5):
            assert one_shot(daemon.path, "test", "echo")["error_type"] == "Overloaded"


def test_a_client_that_never_has_more_connections_than_allowed_is_never_turned_away(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(
        REJECTING + "limits.max_connections = 1\nlimits.max_requests_per_minute = 0"
    ).run()
    for _ in range(500):
        assert one_shot(daemon.path, "test", "echo")["success"]


def test_a_client_that_is_slow_to_speak_does_not_keep_others_from_being_turned_away(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(REJECTING + "limits.max_connections = 1").run()
    with contextlib.ExitStack() as stack:
        stack.enter_context(Framed(daemon.path)).call("test", "echo", True)
        for _ in range(20):
            stack.enter_context(connect(daemon.path))
        assert one_shot(daemon.path, "test", "echo")["error_type"] == "Overloaded"
        large = {"module": "probe", "function": "echo", "params": {"x": "y" * 5_000_000}}
        with connect(daemon.path) as client:
            # It sends on after the answer, and must find it all the same.
            def send() -> None:
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps(large).encode())

            sender = threading.Thread(target=send)
            sender.start()
            assert reply_of(client)["error_type"] == "Overloaded"
            sender.join(20)


# -- stale connections --


def test_connections_that_say_nothing_are_closed_after_stale_timeout(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2\nlimits = {stale_timeout = 0.5, read_timeout = 60}").run()
    with connect(daemon.path) as begun, connect(daemon.path) as silent:
        begun.sendall(b'{"module": "test"')
        reply = reply_of(begun)
        assert reply["error_type"] == "InvalidRequest"
        assert reply["error"].endswith("nothing came for 0.5 s (limits.stale_timeout)")
        assert silent.recv(1) == b""
    # A kept connection may rest between two requests for idle_timeout.
    with Framed(daemon.path) as kept:
        assert kept.call("test", "echo", True)
        time.sleep(1.0)
        assert kept.call("test", "echo", True)


def test_cleanup_closes_stale_connections_of_all_workers_at_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3\nlimits.stale_timeout = 1").run()
    with contextlib.ExitStack() as stack:
        resting = [stack.enter_context(Framed(daemon.path)) for _ in range(8)]
        for client in resting:
            assert client.call("test", "echo", True)

        def all_stale() -> bool:
            report = daemon.call("system", "connections")
            return bool(report["stale_connections"] == 8)

        until(all_stale)
        report = daemon.call("system", "connections")
        assert report["active_connections"] in (
            9,
            10,
        )  # one that asked before may be on its way out
        assert report["connection_limits"]["stale_timeout"] == 1
        stale = [each for each in report["connections"] if each["status"] == "stale"]
        assert len(stale) == 8
        assert all(each["requests_count"] == 1 and each["idle_time"] > 1 for each in stale)
        assert abs(stale[0]["start_time"] - time.time()) < 60
        assert "running" in {each["status"] for each in report["connections"]}  # who asks
        cleaned = daemon.call("system", "cleanup")
        assert cleaned["cleaned_connections"] == 8
        assert {each["connection_id"] for each in cleaned["connections_details"]} == {
            each["connection_id"] for each in stale
        }
        assert cleaned["remaining_connections"] == 1
        for client in resting:
            assert client.receive() is None  # it may send again elsewhere
        stats = daemon.call("system", "stats")
        assert abs(stats["last_cleanup"] - time.time()) < 60


# -- times that jump --


def test_a_wall_clock_that_is_set_back_changes_no_age_and_no_duration(
    new_daemon: NewDaemon,
) -> None:
    """In every process of the daemon the wall clock jumps back an hour when a file appears."""
    daemon = new_daemon("workers = 2\nlimits.sample_interval = 0.1")
    jump = daemon.folder / "jump"
    (daemon.folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "now, now_ns = time.time, time.time_ns\n"
        f"gone = lambda: os.path.exists({str(jump)!r})\n"
        "time.time = lambda: now() - 3600 * gone()\n"
        "time.time_ns = lambda: now_ns() - 3600 * 10**9 * gone()\n"
    )
    daemon.environment["PYTHONPATH"] = str(daemon.folder)
    daemon.run()
    with Framed(daemon.path) as kept:
        assert kept.call("probe", "fail")
        before = daemon.metrics()
        jump.touch()
        sampled = daemon.call("system", "health")["checks"]["monitor"]
        assert sampled["status"] == "pass"
        metrics = daemon.metrics()
        assert metrics["timestamp"] < before["timestamp"] - 3000  # it has jumped indeed
        assert metrics["daemon_info"]["uptime_seconds"] >= before["daemon_info"]["uptime_seconds"]
        assert 0 <= metrics["gate"]["verdict_seconds"] < 600
        assert metrics["resource_status"]["requests_per_minute"] == 4
        for each in daemon.call("system", "connections")["connections"]:
            assert 0 <= each["duration_seconds"] < 600
            assert 0 <= each["idle_time"] < 600
        assert daemon.call("system", "performance")["recent_errors"]
        until(lambda: daemon.metrics()["system_stats"]["processes"] == 4)
    assert daemon.stop() == 0


def test_a_daemon_that_was_stopped_for_a_while_draws_no_wrong_conclusions(
    new_daemon: NewDaemon,
) -> None:
    """As when the machine was suspended, or its virtual machine paused."""
    daemon = new_daemon(
        "workers = 2\nlimits = {sample_interval = 0.2, memory_grace = 1, max_cpu_percent = 90}"
    ).run()
    tree = [daemon.pid, *daemon.workers()]
    for pid in tree:
        psutil.Process(pid).suspend()
    time.sleep(3)
    for pid in tree:
        psutil.Process(pid).resume()
    assert daemon.call("test", "echo", True)
    until(lambda: daemon.call("system", "health")["overall_status"] == "healthy")
    assert not lines(daemon, "VIOLATION|retired|died")
    assert sorted(daemon.workers()) == sorted(tree[1:])


def test_status_says_that_the_gate_is_closed_and_why(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits = {max_memory_mb = 100, memory_grace = 600}").run()
    status = daemon.command("status").stdout
    assert "  gate open for " in status
    assert "of 100 connections, 0 of 100 requests running, 0 of 2000 in the last minute" in status
    daemon.call("probe", "hoard", [150])
    until(lambda: daemon.status()["gate"]["verdict"] != "open")
    assert "  gate closed for " in daemon.command("status").stdout
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(one_shot_call(daemon, "worker_pid", []))
        found = until(lambda: (s := daemon.status())["gate"]["waiting_requests"] == 3 and s)
        assert "  3 requests wait to run\n" in daemon.command("status").stdout
        (violation,) = found["resource_status"]["violations"]
        assert re.fullmatch(r"Memory usage \d+\.\dMB exceeds limit 100MB", violation)
        daemon.stop(signal.SIGQUIT)
