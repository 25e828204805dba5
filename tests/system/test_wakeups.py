"""Whom the kernel wakes for a client, and that no client depends on that one."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Daemon, NewDaemon, halt
from plain_client import Framed, connect, one_shot, read_to_end, request, until

UNLIMITED = "workers = {}\nlimits.max_requests_per_minute = 0"
CALLS = 200
ECHO = json.dumps(request("probe", "echo", {"value": 1})).encode()


def sleeps(pid: int) -> int:
    """How often the threads of a process have waited for something so far."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        line = next(x for x in status.read_text().splitlines() if x.startswith("voluntary"))
        count += int(line.split()[1])
    return count


def test_a_lone_client_does_not_wake_all_workers(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(UNLIMITED.format(8)).run()

    def woken() -> int:
        before = sum(map(sleeps, daemon.workers()))
        for number in range(CALLS):
            reply = one_shot(daemon.path, "probe", "echo", {"value": number})
            assert reply["result"] == {"value": number}
        return sum(map(sleeps, daemon.workers())) - before

    # Where all are woken it is 8 for each call, and more. One is, and another one at most when that
    # one is still busy with the call before. On a machine with other work calls are slow at times,
    # and then those that run calls are woken besides.
    until(lambda: woken() < 4 * CALLS, 60)


@pytest.mark.parametrize("which", [0, 1])
def test_a_client_for_whom_a_stopped_worker_was_woken_is_served_by_another(
    daemon: Daemon, which: int
) -> None:
    pid = daemon.workers()[which]
    halt(pid)
    try:
        for number in range(3):
            reply = one_shot(daemon.path, "probe", "echo", {"value": number})
            assert reply["result"] == {"value": number}
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("which", [0, 1])
def test_a_client_for_whom_a_worker_was_woken_that_dies_is_served_by_another(
    daemon: Daemon, which: int
) -> None:
    pid = daemon.workers()[which]
    halt(pid)
    with connect(daemon.path) as client:
        client.sendall(ECHO)
        os.kill(pid, signal.SIGKILL)
        assert json.loads(read_to_end(client))["result"] == {"value": 1}


@pytest.mark.parametrize("which", [0, 1])
def test_a_client_for_whom_a_worker_was_woken_that_retires_is_served_by_another(
    daemon: Daemon, which: int
) -> None:
    pid = daemon.workers()[which]
    halt(pid)
    with connect(daemon.path) as client:
        client.sendall(ECHO)
        os.kill(daemon.pid, signal.SIGTTOU)
        until(lambda: "1 worker fewer" in daemon.log())
        os.kill(pid, signal.SIGCONT)
        assert json.loads(read_to_end(client))["result"] == {"value": 1}
    until(lambda: len(daemon.workers()) == 1)


def test_a_client_is_served_while_the_only_thread_of_the_woken_worker_is_busy(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon(UNLIMITED.format(2) + "\nthreads = 1").run()
    end = tmp_path / "end"
    # An idle daemon wakes the same worker for each client: this one's, when both come at one time.
    with ExitStack() as stack:
        kept = stack.enter_context(Framed(daemon.path))
        kept.send("probe", "worker_pid")
        kept.receive()
        with daemon.held():
            kept.send("probe", "run_until", {"file": str(end), "note": str(tmp_path / "note")})
            client = stack.enter_context(connect(daemon.path))
            client.sendall(ECHO)
        assert json.loads(read_to_end(client))["result"] == {"value": 1}
        end.touch()
        reply = kept.receive()
        assert reply is not None
        assert reply["success"]
