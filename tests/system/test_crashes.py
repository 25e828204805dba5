"""Whatever dies, and at whatever instant: no room is lost, nobody is blocked, no reply is wrong."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, most_at_once, one_shot, read_to_end, request, until


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def ready_workers(daemon: Daemon) -> list[int]:
    """The process ids of the workers that have booted."""
    titles = {}
    for pid in daemon.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            titles[pid] = " ".join(psutil.Process(pid).cmdline())
    return [pid for pid, title in titles.items() if " busy " in title]


def settled_workers(daemon: Daemon, count: int) -> list[int]:
    """Wait until so many workers are ready; their process ids."""

    def enough() -> list[int]:
        pids = ready_workers(daemon)
        return pids if len(pids) == count else []

    pids: list[int] = until(enough, 40, f"{count} workers ready")
    return pids


def only_the_asking_client(daemon: Daemon) -> bool:
    """Whether room is taken by the one who asks alone. What closes gives it back a bit later."""
    gate = daemon.metrics()["gate"]
    waiting = gate["waiting_doors"], gate["waiting_requests"]
    return (gate["connections"], gate["running"], *waiting) == (1, 1, 0, 0)


def raw_one_shot(path: str, body: bytes) -> bytes:
    """A reply's bytes, as many as came before the connection ended, in whatever way it did."""
    pieces = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError), connect(path) as client:
        client.sendall(body)
        while piece := client.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


class Hammer:
    """Clients that call without a pause, check each reply, and bear to lose a connection."""

    def __init__(self, path: str, clients: int) -> None:
        self._path = path
        self._over = threading.Event()
        self._numbers = itertools.count()
        self.answered = 0
        self.lost = 0
        self._pool = ThreadPoolExecutor(clients)
        lives = [self._framed if n % 2 else self._one_shot for n in range(clients)]
        self._clients = [self._pool.submit(life) for life in lives]

    def stop(self) -> None:
        """End the clients; raises what one of them found wrong."""
        self._over.set()
        for client in self._clients:
            client.result(60)
        self._pool.shutdown()

    def _check(self, number: int, reply: dict[str, Any]) -> None:
        assert reply["success"], reply
        assert reply["result"] == {"number": number}
        assert reply["request_id"] == f"r{number}"
        self.answered += 1

    @contextlib.contextmanager
    def _losing_a_connection(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            ending = str(error)
        else:
            return
        assert not ending.startswith("closed after") or ending == "closed after 0 of 4 bytes"
        self.lost += 1

    def _one_shot(self) -> None:
        while not self._over.is_set():
            number = next(self._numbers)
            params = {"seconds": 0.05, "number": number}  # so that kills meet running requests
            message = request("probe", "echo_after", params, request_id=f"r{number}")
            reply = raw_one_shot(self._path, json.dumps(message).encode())
            if reply:
                self._check(number, json.loads(reply))
            else:
                self.lost += 1

    def _framed(self) -> None:
        while not self._over.is_set():
            with self._losing_a_connection(), Framed(self._path) as client:
                while not self._over.is_set():
                    number = next(self._numbers)
                    client.send("probe", "echo", {"number": number}, request_id=f"r{number}")
                    reply = client.receive()
                    assert reply is not None
                    self._check(number, reply)
                    time.sleep(0.005)  # or they would take the processor from what is tested


def test_killed_workers_leak_no_room_and_no_reply_is_wrong(new_daemon: NewDaemon) -> None:
    workers, kills = 3, 15
    daemon = new_daemon(
        f"workers = {workers}\n"
        "limits.max_concurrent_requests = 40\nlimits.max_requests_per_minute = 0"
    ).run()
    totals: list[tuple[int, int, int]] = []

    def watch_totals() -> None:
        metrics = json.loads(raw_one_shot(daemon.path, metrics_call) or b"null")
        if metrics is not None:
            found = metrics["result"]
            totals.append(
                (
                    found["performance_metrics"]["total_requests"],
                    found["connection_summary"]["total_connections"],
                    found["connection_summary"]["peak_connections"],
                )
            )

    metrics_call = json.dumps(request("system", "metrics")).encode()
    random_ = random.Random(workers)
    hammer = Hammer(daemon.path, 8)
    try:
        for _ in range(kills):
            time.sleep(random_.uniform(0.02, 0.2))  # the instant of the kill is what is random here
            pids = until(lambda: ready_workers(daemon))
            with contextlib.suppress(ProcessLookupError):
                os.kill(random_.choice(pids), signal.SIGKILL)
            watch_totals()
    finally:
        hammer.stop()
    settled_workers(daemon, workers)
    watch_totals()
    for earlier, later in itertools.pairwise(totals):
        assert all(old <= new for old, new in zip(earlier, later, strict=True))
    assert hammer.answered > 100
    assert hammer.lost > 0
    assert totals[-1][0] >= hammer.answered
    until(lambda: only_the_asking_client(daemon))
    with ThreadPoolExecutor(40) as pool:
        naps = [pool.submit(daemon.call, "probe", "span", [1.5]) for _ in range(40)]
        assert most_at_once([nap.result() for nap in naps]) == 40
    assert daemon.stop() == 0


def test_a_call_that_kills_its_worker_ends_its_own_connection_only(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    before = settled_workers(daemon, 2)
    with Framed(daemon.path) as first, Framed(daemon.path) as second:
        clients = [first, second]
        homes = []
        for client in clients:
            reply = client.call("probe", "worker_pid")
            assert reply is not None
            homes.append(reply["result"])
        while homes[0] == homes[1]:  # until one of them is in each worker
            clients[1].socket.close()
            clients[1] = Framed(daemon.path)
            blocker = threading.Thread(target=daemon.call, args=("probe", "nap", [0.1]))
            blocker.start()
            reply = clients[1].call("probe", "worker_pid")
            blocker.join()
            assert reply is not None
            homes[1] = reply["result"]
        clients[0].send("probe", "die")
        assert read_to_end(clients[0].socket) == b""
        reply = clients[1].call("probe", "worker_pid")
        assert reply is not None
        assert reply["result"] == homes[1]
        assert daemon.call("test", "ping")["message"] == "pong"
        clients[1].socket.close()
    after = settled_workers(daemon, 2)
    assert homes[0] not in after
    assert homes[1] in after
    assert len(set(before) & set(after)) == 1
    assert re.search(
        rf"Worker \d \(pid {homes[0]}\) died: killed by signal 9 \(SIGKILL\)", daemon.log()
    )


def test_a_one_shot_client_of_a_dead_worker_sees_the_end_of_the_connection(
    shared_daemon: Daemon,
) -> None:
    daemon = shared_daemon
    body = json.dumps(request("probe", "die")).encode()
    assert raw_one_shot(daemon.path, body) == b""
    assert daemon.call("test", "ping")["message"] == "pong"


def test_a_module_that_breaks_later_is_retried_with_growing_pauses(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("")
    flag = daemon.folder / "broken"
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "fragile.py").write_text(
        f"import os\nif os.path.exists({str(flag)!r}):\n    os._exit(7)\n"
        "def fine() -> int:\n    return 1\n"
    )
    daemon.write_config(f'workers = 2\npreload = false\n[[module_dirs]]\npath = "{helpers}"')
    daemon.run()
    settled_workers(daemon, 2)
    flag.touch()
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGKILL)

    def pauses() -> list[float]:
        return [float(found) for found in re.findall(r"next start in ([\d.]+) s", daemon.log())]

    began = time.monotonic()
    until(lambda: len(pauses()) >= 5)
    assert time.monotonic() - began > 0.1 + 0.2 + 0.4 + 0.8
    assert pauses()[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert 4 <= daemon.log().count("exit status 7") <= 6
    assert daemon.call("fragile", "fine") == 1
    flag.unlink()
    settled_workers(daemon, 2)
    assert daemon.call("fragile", "fine") == 1


def test_one_death_at_boot_is_not_paused_for_what_came_after_earlier_boots(
    new_daemon: NewDaemon,
) -> None:
    """Deaths of workers that were ready are paused for a second at most; they say nothing of boots.

    A worker that the kernel kills while it boots is needed as much as any other.
    """
    daemon = new_daemon("")
    flag = daemon.folder / "slow"
    helpers = daemon.folder / "helpers"
    helpers.mkdir()
    (helpers / "slow.py").write_text(
        f"import os, time\nif os.path.exists({str(flag)!r}):\n    time.sleep(30)\n"
    )
    daemon.write_config(f'workers = 1\npreload = false\n[[module_dirs]]\npath = "{helpers}"')
    daemon.run()
    seen: set[int] = set()

    def kill_next() -> None:
        pid = until(lambda: next((pid for pid in daemon.workers() if pid not in seen), 0))
        if not flag.exists():
            until(lambda: pid in ready_workers(daemon))
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)

    for _ in range(6):
        kill_next()
    flag.touch()
    kill_next()
    until(lambda: daemon.log().count("died") == 7)
    pause = until(
        lambda: re.search(r"next start in ([\d.]+) s", daemon.log().rpartition("died")[2])
    )
    assert float(pause[1]) <= 1.0


@contextlib.contextmanager
def nothing_left_of(pids: list[int]) -> Iterator[None]:
    """See that these processes end by themselves."""
    try:
        yield
        until(lambda: not any(map(alive, pids)), 30, "the end of all workers")
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_when_the_master_is_killed_the_workers_finish_and_a_new_start_succeeds_at_once(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2").run()
    event = daemon.folder / "runs"
    orphans = settled_workers(daemon, 2)
    with nothing_left_of(orphans), ThreadPoolExecutor(1) as pool:
        nap = pool.submit(daemon.call, "probe", "span", [6, str(event)])
        until(event.exists)
        busy = int(event.read_text())
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()  # type: ignore[union-attr]
        daemon.run()
        assert daemon.call("probe", "worker_pid") in daemon.workers()
        assert alive(busy)
        _, ended = nap.result()
        assert time.monotonic() >= ended
    assert daemon.stop() == 0
    assert not Path(daemon.path).exists()


def test_idle_workers_end_when_the_master_is_killed_and_end_their_connections(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2").run()
    orphans = settled_workers(daemon, 2)
    with nothing_left_of(orphans), Framed(daemon.path) as idle:
        assert idle.call("test", "echo", True) is not None
        os.kill(daemon.pid, signal.SIGKILL)
        assert idle.receive() is None
        assert read_to_end(idle.socket) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(daemon.path)
    daemon.process.wait()  # type: ignore[union-attr]
    assert daemon.command("status").returncode == 3


def test_a_start_in_the_background_succeeds_after_everything_was_killed(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2").run()
    processes = [daemon.pid, *settled_workers(daemon, 2)]
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
    daemon.process.wait()  # type: ignore[union-attr]
    assert Path(daemon.path).exists()
    assert Path(f"{daemon.path}.pid").exists()
    assert daemon.command("start").returncode == 0
    assert daemon.call("test", "ping")["message"] == "pong"
    daemon.end()


@pytest.mark.parametrize("victim", ["the busy worker", "the other worker"])
def test_clients_that_wait_in_a_killed_worker_see_its_end_and_the_others_have_their_turn(
    new_daemon: NewDaemon, victim: str
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    workers = settled_workers(daemon, 2)
    event = daemon.folder / "runs"
    seconds = 30.0 if victim == "the busy worker" else 1.5
    body = json.dumps(request("probe", "span", [seconds, str(event)])).encode()
    with ThreadPoolExecutor(11) as pool:
        hog = pool.submit(raw_one_shot, daemon.path, body)
        until(event.exists)
        busy = int(event.read_text())
        bodies = [json.dumps(request("test", "echo", [n])).encode() for n in range(10)]
        waiting = [pool.submit(raw_one_shot, daemon.path, body) for body in bodies]
        until(lambda: daemon.status()["gate"]["waiting_requests"] == 10)
        if victim == "the busy worker":
            os.kill(busy, signal.SIGKILL)
            assert hog.result() == b""
        else:
            os.kill(next(pid for pid in workers if pid != busy), signal.SIGKILL)
            assert json.loads(hog.result())["success"]
        for number, client in enumerate(waiting):
            assert client.result() == b"" or json.loads(client.result())["result"] == [number]
    until(lambda: only_the_asking_client(daemon))
    assert daemon.status()["gate"]["waiting_requests"] == 0


def test_a_function_that_forks_and_returns_in_both_processes_gives_one_reply(
    daemon: Daemon,
) -> None:
    workers = settled_workers(daemon, 2)
    body = json.dumps(request("probe", "fork_and_return", request_id="f")).encode()
    reply = json.loads(raw_one_shot(daemon.path, body))
    assert reply["result"] in workers
    with Framed(daemon.path) as client:
        client.send("probe", "fork_and_return", request_id="g")
        client.send("test", "echo", [1], request_id="h")
        replies = [client.receive(), client.receive()]
        assert [reply and reply["request_id"] for reply in replies] == ["g", "h"]
    until(lambda: only_the_asking_client(daemon))
    assert settled_workers(daemon, 2) == workers
    # A reply has the calls before its own: each is counted before its reply is sent.
    asked = daemon.metrics()["connection_summary"]["total_connections"]
    performance = daemon.metrics()["performance_metrics"]
    # Each connection had one request, but for the framed one with two, and the asking one's own.
    assert performance["total_requests"] == asked + 1
    assert performance["failed_requests"] == 0


def test_a_function_that_calls_sys_exit_ends_nothing_but_its_call(daemon: Daemon) -> None:
    workers = settled_workers(daemon, 2)
    for _ in range(5):
        reply = one_shot(daemon.path, "probe", "leave", request_id="r")
        assert not reply["success"]
        assert reply["error_type"] == "SystemExit"
        assert reply["request_id"] == "r"
        assert reply["error"].startswith("Error in probe.leave: ")
    assert settled_workers(daemon, 2) == workers
    assert "died" not in daemon.log()


def test_a_worker_that_can_accept_no_more_is_replaced_though_a_call_hangs_in_it(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 1\nlimits.graceful_timeout = 1")
    flag = daemon.folder / "fault"
    daemon.will_run(
        "import os\n"
        "from cpanbridge.workers.accept.ready_clients import ReadyClients\n"
        "find = ReadyClients.next\n"
        "def find_or_fail(self):\n"
        f"    if os.path.exists({str(flag)!r}):\n"
        f"        os.unlink({str(flag)!r})\n"
        "        raise RuntimeError('a fault of the test')\n"
        "    return find(self)\n"
        "ReadyClients.next = find_or_fail\n"
    )
    daemon.run()
    (pid,) = daemon.workers()
    begun = daemon.folder / "begun"
    with connect(daemon.path) as hangs:
        request = {"module": "probe", "function": "span", "params": [60, str(begun)]}
        hangs.sendall(json.dumps(request).encode())
        until(begun.exists)
        flag.touch()
        assert daemon.call("test", "echo", [1]) == [1]  # by the one that replaces it, if need be
        until(lambda: not flag.exists() and pid not in daemon.workers())
        assert daemon.call("test", "echo", [2]) == [2]
    assert "No more clients can be accepted" in daemon.log()
