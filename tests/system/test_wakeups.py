"""Whom the kernel wakes for a client, and that no client depends on that one."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from conftest import Daemon, NewDaemon, is_idle
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


# -- the worker that was woken does not get to run --

NO_LOOKS = "from cpanbridge.workers import main_thread\nmain_thread.TICK_SECONDS = 3600.0\n"
NO_REPLACEMENT = (
    "from cpanbridge.supervisor.processes import pool\n"
    "pool.SETTLED_SECONDS = pool.PAUSE_AFTER_READY = 3600.0\n"
)
HELD_SECONDS = 40  # longer than anybody here waits


def called(daemon: Daemon) -> int:
    """The worker that is woken for a quick call by an idle daemon."""
    until(lambda: all(map(is_idle, daemon.workers())))
    pid: int = daemon.call("probe", "worker_pid")
    return pid


def hold_up(daemon: Daemon, folder: Path) -> int:
    """Let the worker that is woken first not get to run for a while; returns its process id.

    What keeps it from that is neither a call nor a thread that Python knows.
    """
    for number in range(100):
        file = folder / f"begin-{number}"
        params = {"seconds": HELD_SECONDS, "file": str(file), "known": False}
        pid = daemon.call("probe", "hold_interpreter_aside", params)
        called(daemon)  # its leader began to wait during that call: it is woken besides this once
        if all(called(daemon) == pid for _ in range(10)):
            hold(daemon, file)
            return int(pid)
    raise AssertionError("another worker is woken each time")


def hold(daemon: Daemon, file: Path) -> None:
    """Have the thread begin that waits for this file."""
    until(lambda: all(map(is_idle, daemon.workers())))
    file.touch()
    until(lambda: not file.exists())


def test_a_client_for_whom_a_worker_was_woken_that_does_not_get_to_run_is_served_by_another(
    daemon: Daemon, tmp_path: Path
) -> None:
    hold_up(daemon, tmp_path)
    for _ in range(3):
        assert one_shot(daemon.path, "probe", "echo", {"value": 1})["success"]


def test_a_worker_with_a_modules_thread_is_not_woken_in_place_of_others(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon(UNLIMITED.format(2))
    daemon.will_run(NO_LOOKS)
    daemon.run()
    file = tmp_path / "begin"
    params = {"seconds": HELD_SECONDS, "file": str(file), "known": True}
    pid = daemon.call("probe", "hold_interpreter_aside", params)
    for _ in range(10):
        called(daemon)  # so that it accepts and is idle again
    with ExitStack() as stack:
        # Both are woken for each client, so the other one accepts at last.
        while True:
            kept = stack.enter_context(Framed(daemon.path))
            kept.send("probe", "worker_pid")
            reply = kept.receive()
            assert reply is not None
            until(lambda: all(map(is_idle, daemon.workers())))
            if reply["result"] != pid:
                break
        hold(daemon, file)
        for _ in range(3):
            assert one_shot(daemon.path, "probe", "echo", {"value": 1})["success"]


def test_a_client_for_whom_a_worker_was_woken_that_dies_is_served_by_another(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon(UNLIMITED.format(2))
    daemon.will_run(NO_LOOKS + NO_REPLACEMENT)
    daemon.run()
    pid = hold_up(daemon, tmp_path)
    with connect(daemon.path) as client:
        client.sendall(ECHO)
        os.kill(pid, signal.SIGKILL)
        assert json.loads(read_to_end(client))["result"] == {"value": 1}
