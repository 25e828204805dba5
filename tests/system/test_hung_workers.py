"""Calls that let nothing else of their worker run: the master sees to them, and others go on."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon, halt
from plain_client import Framed, request, send_one_shot, until

PROBE = Path(__file__).parents[1] / "modules" / "probe.py"
TRIES = 3

Reply = dict[str, Any] | None


def call(daemon: Daemon, function: str, params: Any, **fields: Any) -> dict[str, Any]:
    """A one-shot call, with fields such as the client's own `timeout`; the whole reply."""
    body = json.dumps(request("probe", function, params, **fields)).encode()
    reply: dict[str, Any] = json.loads(send_one_shot(daemon.path, body))
    return reply


class Caller:
    """A client whose call hangs."""

    def __init__(self, pool: ThreadPoolExecutor, daemon: Daemon, form: str, **fields: Any) -> None:
        self._pool = pool
        self._daemon = daemon
        self._form = form
        self._fields = fields

    def call(self, function: str, *params: Any) -> tuple[int, Future[Reply]]:
        """Begin it; the pid of the worker that runs it, and what the client receives."""
        event = self._daemon.folder / "note"
        event.unlink(missing_ok=True)
        reply = self._pool.submit(self._call, function, [*params, str(event)])
        return int(until(lambda: event.exists() and event.read_text(), what="the begin")), reply

    def _call(self, function: str, params: list[Any]) -> Reply:
        if self._form == "one-shot":
            return call(self._daemon, function, params, **self._fields)
        with Framed(self._daemon.path) as client:
            return client.call("probe", function, params, **self._fields)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def where_deadlock_hangs() -> int:
    """The line of the tests' module on which `deadlock` hangs."""
    lines = PROBE.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if "mutex_lock(" in line)


def serves_beside(daemon: Daemon, pid: int) -> bool:
    """See that others answer while a worker hangs; whether it is still there."""
    assert daemon.call("probe", "worker_pid") != pid
    return pid in daemon.workers()


def counts(daemon: Daemon) -> dict[str, int]:
    """The calls that run and the clients that are connected, as the daemon counts them."""
    gate = daemon.metrics()["gate"]
    return {name: gate[name] for name in ("running", "connections")}


@pytest.mark.parametrize("form", ["one-shot", "framed"])
def test_a_call_that_keeps_the_interpreter_lock_is_shown_and_its_worker_replaced_and_killed(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor, form: str
) -> None:
    daemon = new_daemon(
        "workers = 2\nlimits.request_timeout = 0.5\nlimits.graceful_timeout = 1"
    ).run()
    pid, reply = Caller(pool, daemon, form).call("deadlock")
    until(lambda: f"(pid {pid}) is retired: a call hangs" in daemon.log())
    while serves_beside(daemon, pid):
        time.sleep(0.1)
    with pytest.raises((EOFError, ConnectionError, ValueError)):  # the connection has ended
        reply.result()
    log = daemon.log()
    assert re.search(rf"\[ERROR\] Worker \d \(pid {pid}\): the time of probe.deadlock is over", log)
    assert f'File "{PROBE}", line {where_deadlock_hangs()} in deadlock' in log
    assert f"(pid {pid}) does not end: killed" in log
    # Its replacement was there long before that, and nobody else was disturbed.
    assert log.index(" ready (pid", log.index("is retired")) < log.index("does not end")
    assert log.count("is retired") == 1
    assert len(daemon.workers()) == 2
    # And nothing of it is left in the counts.
    until(lambda: counts(daemon) == {"running": 1, "connections": 1})  # the question itself
    assert daemon.metrics()["performance_metrics"]["failed_requests"] == 1


def test_it_is_found_soon_after_its_time(new_daemon: NewDaemon, pool: ThreadPoolExecutor) -> None:
    """The master checks 0.2 s after the call's time; the log has the time."""
    daemon = new_daemon('log_format = "json"\nworkers = 2').run()
    late: list[float] = []
    while len(late) < TRIES and min(late, default=1.0) > 0.4:
        began = time.time()
        pid, reply = Caller(pool, daemon, "one-shot", timeout=1.0).call("deadlock")
        line = until(lambda pid=pid: re.search(rf".*pid {pid}\): the time of.*", daemon.log()))
        late.append(json.loads(line[0])["timestamp"] - began - 1.0)
        os.kill(pid, signal.SIGKILL)
        assert reply.exception() is not None
    assert 0.15 < min(late) < 0.4  # the worker itself comes first


def test_a_call_that_returns_after_all_has_its_answer_and_its_worker_leaves_in_peace(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.request_timeout = 0.5").run()
    pid, reply = Caller(pool, daemon, "one-shot").call("hold_interpreter", 4)
    answer = reply.result()
    assert "nothing in the worker gets to run" in daemon.log()  # it was found while it hung
    # Which of the two finds the other's word first is not said.
    assert answer is not None
    assert answer["success"] or answer["error_type"] == "RequestTimeout"
    until(lambda: f"(pid {pid}) has left: exit status 0" in daemon.log())
    until(lambda: daemon.metrics()["gate"]["running"] == 1)


def test_a_call_that_keeps_the_lock_within_its_time_is_no_hung_one(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2").run()
    before = sorted(daemon.workers())
    # Its worker has had calls with less time a moment ago.
    for _ in range(50):
        assert call(daemon, "echo", {}, timeout=0.3)["success"]
    _, reply = Caller(pool, daemon, "one-shot", timeout=20).call("hold_interpreter", 2)
    answer = reply.result()
    assert answer is not None
    assert answer["success"]
    assert sorted(daemon.workers()) == before
    assert "[ERROR]" not in daemon.log()


def test_a_worker_that_is_stopped_is_replaced_and_leaves_when_it_goes_on(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.request_timeout = 0.5").run()
    pid, reply = Caller(pool, daemon, "one-shot").call("span", 60)
    halt(pid)
    until(lambda: f"(pid {pid}) is retired: a call hangs" in daemon.log())
    until(lambda: len(daemon.workers()) == 3)
    assert serves_beside(daemon, pid)
    os.kill(pid, signal.SIGCONT)
    answer = reply.result()
    assert answer is not None
    assert answer["error_type"] == "RequestTimeout"
    until(lambda: daemon.metrics()["gate"]["running"] == 1)
    assert daemon.stop(signal.SIGQUIT) == 0


def test_a_daemon_that_was_stopped_as_a_whole_takes_no_worker_for_a_hung_one(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 1\nlimits.request_timeout = 0.7").run()
    _, reply = Caller(pool, daemon, "one-shot").call("span", 60)
    with daemon.held():
        os.kill(daemon.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(daemon.pid, signal.SIGCONT)
        time.sleep(0.05)  # it looks while its worker has not
    answer = reply.result()
    assert answer is not None
    assert answer["error_type"] == "RequestTimeout"
    until(lambda: "is retired: a call hangs" in daemon.log())
    assert "nothing in the worker gets to run" not in daemon.log()
    assert daemon.stop(signal.SIGQUIT) == 0


def test_a_stopped_worker_without_a_call_is_left_alone(daemon: Daemon) -> None:
    before = sorted(daemon.workers())
    with daemon.held():
        time.sleep(1.5)
    assert call(daemon, "echo", {}, timeout=5)["success"]
    assert sorted(daemon.workers()) == before
    assert "is retired" not in daemon.log()


def test_a_worker_that_hangs_inside_the_gate_is_killed_before_others_have_waited_long(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.request_timeout = 0.5").run()
    pid, _ = Caller(pool, daemon, "one-shot").call("hold_gate")
    assert daemon.call("probe", "worker_pid") != pid  # which is not before the lock is free
    log = daemon.log()
    assert f"(pid {pid}) is killed: it hangs, and the gate's lock does not come free" in log
    assert f"line {where_deadlock_hangs()} in deadlock" in log
    until(lambda: len(daemon.workers()) == 2 and pid not in daemon.workers())


def test_a_lock_that_does_not_come_free_ends_who_holds_it_and_not_who_hangs(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2").run()
    hanging, _ = Caller(pool, daemon, "one-shot", timeout=0.5).call("deadlock")
    with Framed(daemon.path) as client:  # it has no time limit: nobody finds this call overdue
        client.send("probe", "stop_with_gate")
        killed = r"\(pid (\d+)\) is killed: it hangs, and the gate's lock"
        holder = int(until(lambda: re.search(killed, daemon.log()))[1])
    assert holder != hanging
    assert hanging in daemon.workers()
    assert daemon.call("probe", "worker_pid") not in (hanging, holder)
    assert daemon.stop(signal.SIGQUIT) == 0


def test_new_state_does_not_go_to_a_worker_that_hangs(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    table = '[modules.kept]\nimport = "probe"\nfunctions = ["worker_pid"]\naffinity = "client"'
    daemon = new_daemon(
        f'python_path = ["{PROBE.parent}"]\nworkers = 1\nlimits.request_timeout = 0.5\n{table}'
    ).run()
    pid, _ = Caller(pool, daemon, "one-shot").call("backtrack")
    until(lambda: f"(pid {pid}) is retired: a call hangs" in daemon.log())
    until(lambda: len(daemon.workers()) == 2)
    assert daemon.call("kept", "worker_pid") != pid
    assert daemon.stop(signal.SIGQUIT) == 0
