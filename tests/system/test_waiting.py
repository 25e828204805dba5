"""Clients are accepted, requests wait in order, and whether the daemon lives is told at once."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, read_to_end, request, until


class Hog:
    """A call that runs until it is let go."""

    def __init__(self, pool: ThreadPoolExecutor, daemon: Daemon, name: str = "hog") -> None:
        self._started = daemon.folder / f"{name}-runs"
        self._end = daemon.folder / f"{name}-ends"
        paths = [str(self._end), str(self._started)]
        self.reply: Future[Any] = pool.submit(
            one_shot, daemon.path, "probe", "run_until", paths, timeout=60
        )

    def begin(self) -> "Hog":
        """Wait until it runs."""
        until(self._started.exists)
        return self

    @property
    def worker(self) -> int:
        """The pid of the worker that it runs in."""
        return int(self._started.read_text())

    def end(self) -> None:
        """Let it return."""
        self._end.touch()
        assert self.reply.result()["success"]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as pool:
        yield pool


def waiting(daemon: Daemon) -> int:
    """How many requests wait."""
    return int(daemon.status()["gate"]["waiting_requests"])


def enter(
    pool: ThreadPoolExecutor, daemon: Daemon, numbers: range, file: Path
) -> list[Future[dict[str, Any]]]:
    """Let clients come one after the other, whose requests wait; their replies."""
    replies = []
    before = waiting(daemon)
    for count, number in enumerate(numbers, 1):
        body = [number, str(file)]
        replies.append(pool.submit(one_shot, daemon.path, "probe", "record", body, timeout=60))
        until(lambda wanted=before + count: waiting(daemon) == wanted)
    return replies


def test_requests_have_their_turn_in_the_order_in_which_they_came(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    workers = 4
    daemon = new_daemon(f"workers = {workers}\nlimits.max_concurrent_requests = 1").run()
    hog = Hog(pool, daemon).begin()
    file = daemon.folder / "order"
    replies = enter(pool, daemon, range(40), file)
    hog.end()
    assert all(reply.result()["success"] for reply in replies)
    order = [int(line) for line in file.read_text().split()]
    assert sorted(order) == list(range(40))
    for place, number in enumerate(order):
        overtaken_by = sum(each > number for each in order[:place])
        assert overtaken_by <= workers, order
    assert waiting(daemon) == 0
    waited = daemon.metrics()["gate"]["waited"]["concurrency"]
    assert waited["count"] == 40
    assert waited["seconds"] > 0 < waited["p50"] <= waited["p99"]


LIMITS = {
    "concurrency": "limits.max_concurrent_requests = 1",
    "rate": "limits.max_requests_per_minute = 1",
    "overload": "limits = {max_memory_mb = 5, memory_grace = 600, sample_interval = 0.2}",
    "threads": "threads = 1",
}


@pytest.mark.parametrize("overload", ["wait", "reject"])
@pytest.mark.parametrize("limit", LIMITS)
def test_whether_it_lives_is_answered_in_any_state_and_charged_to_no_limit(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor, limit: str, overload: str
) -> None:
    daemon = new_daemon(f'workers = 1\noverload = "{overload}"\n{LIMITS[limit]}').run()
    if limit == "overload":
        until(lambda: daemon.status()["gate"]["verdict"] == "closed")
    elif limit == "rate":
        daemon.call("test", "echo", 1)
    else:
        hog = Hog(pool, daemon).begin()
    charged = daemon.status()["gate"]["admitted_last_minute"]
    with Framed(daemon.path) as kept, connect(daemon.path) as waits:
        waits.sendall(json.dumps(request("probe", "worker_pid")).encode())
        if overload == "wait" or limit == "threads":
            until(lambda: waiting(daemon) == 1)
        for _ in range(3):
            assert one_shot(daemon.path, "test", "ping")["result"]["message"] == "pong"
            reply = kept.call("test", "ping")
            assert reply is not None
            assert reply["success"]
    gate = daemon.status()["gate"]
    assert gate["admitted_last_minute"] == charged
    assert gate["pings"] == 6
    if limit in ("concurrency", "threads"):
        hog.end()


def test_a_client_that_waits_and_leaves_is_forgotten_and_not_charged(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    hog = Hog(pool, daemon).begin()
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(connect(daemon.path))
            client.sendall(json.dumps(request("probe", "worker_pid")).encode())
        until(lambda: waiting(daemon) == 12)
        assert "  12 requests wait to run\n" in daemon.command("status").stdout
    until(lambda: waiting(daemon) == 0)
    assert "to run" not in daemon.command("status").stdout
    with Framed(daemon.path) as impatient:
        late = impatient.call("probe", "worker_pid", timeout=0.2)
        assert late is not None
        assert late["error_type"] == "RequestTimeout"
    until(lambda: daemon.status()["gate"]["connections"] == 1)
    gate = daemon.status()["gate"]
    assert (gate["connections"], gate["admitted_last_minute"]) == (1, 1)
    hog.end()


def test_a_reload_lets_requests_that_wait_keep_their_places(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    hog = Hog(pool, daemon).begin()
    file = daemon.folder / "order"
    with Framed(daemon.path, timeout=60) as kept:
        assert kept.call("test", "ping")
        kept.send("probe", "record", [0, str(file)])
        until(lambda: waiting(daemon) == 1)
        replies = enter(pool, daemon, range(1, 10), file)
        before = daemon.workers()
        daemon.reload()
        until(lambda: set(daemon.workers()) & set(before) == {hog.worker})  # the other one is gone
        until(lambda: waiting(daemon) == 10)  # the last one may have been on its way
        replies += enter(pool, daemon, range(10, 15), file)
        hog.end()
        reply = kept.receive()
        assert reply is not None
        assert reply["success"]
        assert kept.call("test", "ping")  # and the connection goes on
    assert all(reply.result()["success"] for reply in replies)
    order = [int(line) for line in file.read_text().split()]
    assert sorted(order) == list(range(15))
    assert all(sum(each > number for each in order[:n]) <= 4 for n, number in enumerate(order))


def test_a_request_that_is_complete_after_its_worker_was_told_to_exit_waits_in_another(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    hog = Hog(pool, daemon).begin()
    data = json.dumps(request("probe", "worker_pid")).encode()
    before = daemon.workers()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(daemon.path)) for _ in range(6)]
        for client in clients:
            client.sendall(data[:9])
        until(lambda: daemon.status()["gate"]["connections"] == 7)
        daemon.reload()
        for client in clients:
            client.sendall(data[9:])
        until(lambda: waiting(daemon) == 6)
        hog.end()
        replies = [json.loads(read_to_end(client)) for client in clients]
    assert all(reply["success"] for reply in replies), replies
    assert not {reply["result"] for reply in replies} & set(before)


def test_where_a_worker_bears_one_thread_none_runs_beside_a_call_that_hangs(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 1\nthreads = 1").run()
    (hung,) = daemon.workers()
    with connect(daemon.path) as hangs:
        end, begun = daemon.folder / "end", daemon.folder / "begun"
        paths = [str(end), str(begun)]
        hangs.sendall(json.dumps(request("probe", "run_until", paths, timeout=0.5)).encode())
        until(begun.exists)
        waits = pool.submit(one_shot, daemon.path, "probe", "worker_pid", timeout=60)
        assert json.loads(read_to_end(hangs))["error_type"] == "RequestTimeout"
    assert waits.result()["result"] != hung
    end.touch()


def test_a_request_that_waits_for_a_thread_goes_to_the_worker_that_has_one(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nthreads = 1").run()
    hogs = [Hog(pool, daemon, name).begin() for name in ("first", "second")]
    file = daemon.folder / "order"
    replies = enter(pool, daemon, range(6), file)
    hogs[1].end()
    assert all(reply.result()["success"] for reply in replies)
    assert not hogs[0].reply.done()
    hogs[0].end()


def test_a_worker_that_does_not_run_keeps_the_others_requests_from_nothing(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    hog = Hog(pool, daemon).begin()
    replies = enter(pool, daemon, range(20), daemon.folder / "order")
    (stopped,) = set(daemon.workers()) - {hog.worker}
    with held(stopped):
        hog.end()
        # Those that wait in the other worker; which these are is the kernel's choice.
        until(lambda: waiting(daemon) == 20 - sum(reply.done() for reply in replies) < 20)
    assert all(reply.result()["success"] for reply in replies)


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """Meanwhile a process does not run."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_large_requests_that_wait_keep_the_gate_from_nothing(
    new_daemon: NewDaemon, pool: ThreadPoolExecutor
) -> None:
    """They would take more memory than the daemon may use, and could not run to give it back."""
    limits = "{max_memory_mb = 200, memory_grace = 600, sample_interval = 0.2, "
    daemon = new_daemon(
        f"workers = 2\nlimits = {limits}max_concurrent_requests = 1, max_requests_per_minute = 0}}"
    ).run()
    hog = Hog(pool, daemon).begin()
    text = "x" * 9_000_000
    replies = [
        pool.submit(one_shot, daemon.path, "test", "echo", [text], timeout=60) for _ in range(30)
    ]
    until(lambda: waiting(daemon) == 30)
    until(lambda: daemon.status()["gate"]["verdict"] == "open")
    hog.end()
    for reply in replies:
        assert reply.result()["result"] == [text]
