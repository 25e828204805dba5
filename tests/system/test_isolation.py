"""What a module does to its process does not reach other workers, clients or children."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, one_shot, request, until


def test_a_module_that_keeps_the_interpreter_lock_holds_up_no_other_worker(
    daemon: Daemon,
) -> None:
    begun = daemon.folder / "begun"

    def hold() -> None:
        with contextlib.suppress(OSError, ValueError):  # it ends when the daemon is killed
            one_shot(daemon.path, "probe", "hold_interpreter", [60, str(begun)])

    holder = threading.Thread(target=hold)
    holder.start()
    busy = int(until(lambda: begun.exists() and begun.read_text(), what="the call's begin"))
    for _ in range(20):
        assert daemon.call("probe", "worker_pid") != busy
    assert holder.is_alive(), "a call has waited for it"
    os.kill(busy, signal.SIGKILL)
    holder.join()


def test_a_default_timeout_set_by_a_module_changes_no_client(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_requests_per_minute = 0").run()
    daemon.call("probe", "set_default_timeout", [0.2])
    with connect(daemon.path) as silent:
        silent.settimeout(0.6)
        with contextlib.suppress(TimeoutError):
            assert silent.recv(1) != b"", "closed as if its time were over"
        began = time.monotonic()
        daemon.call("test", "echo", [1])
        assert time.monotonic() - began < 5
    assert daemon.call("probe", "nap", [0.5])


def test_a_fork_after_a_default_timeout_was_set_changes_no_client(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 1\nlimits.max_requests_per_minute = 0").run()
    daemon.call("probe", "set_default_timeout", [5])
    with Framed(daemon.path) as client:

        def is_being_read() -> bool:
            found = daemon.call("system", "connections")["connections"]
            return "reading" in [each["status"] for each in found]

        def call_in_two_pieces() -> None:
            whole = json.dumps(request("probe", "worker_pid")).encode()
            client.socket.sendall(len(whole).to_bytes(4, "big") + whole[:10])
            until(is_being_read)
            client.socket.sendall(whole[10:])
            reply = client.receive()
            assert reply is not None
            assert reply["success"]

        client.call("test", "ping")  # from now on its status says whether a request has begun
        call_in_two_pieces()
        daemon.call("probe", "fork_and_return")
        call_in_two_pieces()


def test_terminating_a_child_that_a_module_forked_ends_the_child_and_not_the_worker(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1").run()
    (worker,) = daemon.workers()
    assert daemon.call("probe", "terminate_a_child") == -15
    assert daemon.call("probe", "worker_pid") == worker
    assert daemon.workers() == [worker]


def test_a_child_that_a_module_leaves_running_keeps_no_client_waiting(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon("workers = 1").run()
    began = time.monotonic()
    child = daemon.call("probe", "leave_a_child", [30])
    assert time.monotonic() - began < 20
    assert Path(f"/proc/{child}").exists()
    daemon.call("probe", "kill", [child])
