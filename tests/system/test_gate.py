"""The limits hold over all workers together, at every instant, and no client is rejected."""

import contextlib
import itertools
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from conftest import Daemon, NewDaemon
from plain_client import Framed, connect, most_at_once, one_shot, until

MINUTE_NS = 60 * 10**9


def spans(daemon: Daemon, seconds: float, *, one_shots: int, framed: int) -> list[list[float]]:
    """Run so many `probe.span` at once, each on a connection of its own; when each began and ended.

    All connections are there before the first request is sent.
    """
    together = threading.Barrier(one_shots + framed)

    def in_one_shot() -> Any:
        together.wait(30)
        return daemon.call("probe", "span", [seconds])

    def in_frames() -> Any:
        with Framed(daemon.path) as client:
            together.wait(30)
            reply = client.call("probe", "span", [seconds])
        assert reply is not None
        assert reply["success"], reply
        return reply["result"]

    with ThreadPoolExecutor(one_shots + framed) as pool:
        calls = [pool.submit(in_one_shot) for _ in range(one_shots)]
        calls += [pool.submit(in_frames) for _ in range(framed)]
        return [call.result() for call in calls]


def cpu_seconds(daemon: Daemon) -> float:
    """What the master and the workers have used so far."""
    master = psutil.Process(daemon.pid)
    times = [each.cpu_times() for each in (master, *master.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def in_background(stack: ExitStack, call: Callable[[], object]) -> None:
    """Let a thread make a call that may never be answered: it ends with the daemon."""

    def attempt() -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):  # the daemon was ended first
            call()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    stack.callback(thread.join, 30)


# -- max_requests_per_minute --


@pytest.mark.waits_long
def test_no_minute_wherever_it_starts_has_more_requests_than_the_limit(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred calls, a pause, then as many as they can: 20 clients, both forms, three workers.

    What is exact here, on however busy a machine: a call is admitted between the moment it is sent
    and the stamp that its function writes. So the k-th admission is never before the k-th sending,
    nor after the k-th stamp (both sorted), and the limit demands that the stamp 200 places after a
    sending is over a minute later. Only how soon that is depends on the machine.
    """
    limit, first_batch, calls, pause = 200, 100, 310, 1.0
    daemon = new_daemon(f"workers = 3\nlimits.max_requests_per_minute = {limit}").run()
    file = daemon.folder / "stamps"
    sent: list[int] = []
    taken = 0
    lock = threading.Lock()

    def claim(batch: int) -> bool:
        nonlocal taken
        with lock:
            taken += 1
            if taken > batch:
                return False
            sent.append(time.monotonic_ns())
            return True

    def call_one_shot(batch: int) -> None:
        while claim(batch):
            daemon_reply = one_shot(daemon.path, "probe", "stamp", [str(file)], timeout=90)
            assert daemon_reply["success"], daemon_reply

    def call_framed(batch: int) -> None:
        with Framed(daemon.path, timeout=90) as client:
            while claim(batch):
                reply = client.call("probe", "stamp", [str(file)])
                assert reply is not None
                assert reply["success"], reply

    with ThreadPoolExecutor(20) as pool:
        for batch in (first_batch, calls):
            clients = [pool.submit(call_one_shot, batch) for _ in range(10)]
            clients += [pool.submit(call_framed, batch) for _ in range(10)]
            for client in clients:
                client.result()
            if batch == first_batch:
                # A limiter that counts in whole minutes would forget these too early.
                time.sleep(pause)
                taken = first_batch

    stamps = sorted(map(int, file.read_text().split()))
    assert len(stamps) == calls
    sent.sort()
    for earlier, later in zip(sent, stamps[limit:], strict=False):
        assert later - earlier > MINUTE_NS
    # The full limit was there to be used at once, and each place was used again as it came free.
    assert stamps[limit - 1] < stamps[0] + MINUTE_NS
    late = [
        later - earlier - MINUTE_NS for earlier, later in zip(stamps, stamps[limit:], strict=False)
    ]
    with capsys.disabled():
        print(f"\n  first call after the window moved: {late[0] / 1e6:.2f} ms after it")
    # 10 ms on a quiet machine. Less than the 60 ms that the kernel may add to a minute's poll(2).
    assert late[0] < 40e6
    assert max(late) < 2e9


# -- max_concurrent_requests --


def test_as_many_requests_as_allowed_run_at_the_same_time(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 40").run()
    ran = spans(daemon, 1.0, one_shots=20, framed=20)
    assert most_at_once(ran) == 40
    begins = [began for began, _ in ran]
    assert max(begins) - min(begins) < 0.9


def test_never_more_requests_run_than_allowed(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 3\nlimits.max_concurrent_requests = 20").run()
    # Room is given back after the function's end, so the functions can never overlap by more.
    ran = spans(daemon, 0.5, one_shots=20, framed=20)
    assert most_at_once(ran) == 20
    ends = sorted(ended for _, ended in ran)
    begins = sorted(began for began, _ in ran)
    assert begins[20] >= ends[0]
    assert begins[39] >= ends[19]


def test_room_for_a_request_is_used_soon_after_it_comes_free(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 1").run()
    ran = sorted(spans(daemon, 0.05, one_shots=10, framed=10))
    assert most_at_once(ran) == 1
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(ran)]
    with capsys.disabled():
        print(f"\n  from a request's end to the next one's begin: at most {max(gaps) * 1e3:.1f} ms")
    assert max(gaps) < 1.0


def test_an_idle_framed_connection_takes_no_requests_room(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_concurrent_requests = 2").run()
    with ExitStack() as stack:
        for _ in range(6):
            idle = stack.enter_context(Framed(daemon.path))
            assert idle.call("test", "ping") is not None
        assert most_at_once(spans(daemon, 0.5, one_shots=1, framed=1)) == 2
        until(lambda: daemon.metrics()["gate"]["connections"] == 7)
        assert daemon.metrics()["gate"]["running"] == 1


# -- max_connections --


def test_never_more_connections_are_open_than_allowed_and_the_others_are_served_in_turn(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon("workers = 3\nlimits.max_connections = 5").run()
    waits = []
    with ExitStack() as stack:
        clients = [stack.enter_context(Framed(daemon.path)) for _ in range(30)]
        for number, client in enumerate(clients):
            client.send("probe", "echo", {"number": number})

        def answered(wanted: int, seconds: float) -> list[int]:
            """The clients that have a reply to read, when there are as many or the time is over."""
            poll = [client.socket for client in clients if client.socket.fileno() >= 0]
            end = time.monotonic() + seconds
            while True:
                ready = select.select(poll, [], [], 0.01)[0]
                if len(ready) >= wanted or time.monotonic() > end:
                    return [n for n, client in enumerate(clients) if client.socket in ready]

        def read(number: int) -> None:
            reply = clients[number].receive()
            assert reply is not None
            assert reply["result"] == {"number": number}

        assert answered(5, 20) == [0, 1, 2, 3, 4]
        assert answered(6, 0.5) == [0, 1, 2, 3, 4]
        for number in range(5):
            read(number)
        for number in range(5, 30):
            clients[number - 5].socket.close()
            closed_at = time.monotonic()
            assert answered(1, 20) == [number]
            waits.append(time.monotonic() - closed_at)
            read(number)
            assert not answered(1, 0.02)
    with capsys.disabled():
        print(f"\n  accepted after another one left: {max(waits) * 1e3:.1f} ms at most")
    assert sorted(waits)[len(waits) // 2] < 1.0  # without being woken, a worker looks once a second
    until(lambda: daemon.metrics()["gate"]["connections"] == 1)
    assert daemon.metrics()["gate"]["waiting_doors"] == 0


def test_clients_that_come_all_at_once_never_open_more_connections_than_allowed(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 3\nlimits.max_connections = 5").run()
    ran = spans(daemon, 0.05, one_shots=30, framed=30)
    assert most_at_once(ran) == 5
    assert daemon.metrics()["connection_summary"]["peak_connections"] == 5


def test_a_client_that_has_sent_nothing_is_a_connection_too(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_connections = 2").run()
    with connect(daemon.path) as first, connect(daemon.path), Framed(daemon.path) as third:
        third.send("test", "ping")
        assert not select.select([third.socket], [], [], 0.5)[0]
        first.close()
        assert third.receive() is not None


# -- waiting costs nothing --


def rate_is_used_up(daemon: Daemon, stack: ExitStack) -> None:
    for _ in range(10):
        daemon.call("test", "ping")
    for _ in range(10):
        in_background(stack, lambda: one_shot(daemon.path, "test", "ping"))
        # These were accepted when there was room, and wait with their connection open.
        stack.enter_context(Framed(daemon.path)).send("test", "ping")


def requests_are_running(daemon: Daemon, stack: ExitStack) -> None:
    framed = [stack.enter_context(Framed(daemon.path)) for _ in range(20)]
    for client in framed:
        assert client.call("test", "ping") is not None
    event = daemon.folder / "runs"
    in_background(stack, lambda: one_shot(daemon.path, "probe", "span", [30, str(event)]))
    until(event.exists)
    for client in framed:
        client.send("test", "ping")
    for _ in range(10):
        in_background(stack, lambda: one_shot(daemon.path, "test", "ping"))


def connections_are_open(daemon: Daemon, stack: ExitStack) -> None:
    for _ in range(30):
        stack.enter_context(connect(daemon.path))
    for _ in range(10):
        in_background(stack, lambda: one_shot(daemon.path, "test", "ping"))


def nobody_is_there(daemon: Daemon, stack: ExitStack) -> None:
    assert daemon.call("test", "ping")["message"] == "pong"


@pytest.mark.parametrize(
    ("limit", "fill"),
    [
        ("max_requests_per_minute = 10", rate_is_used_up),
        ("max_concurrent_requests = 1", requests_are_running),
        ("max_connections = 30", connections_are_open),
        ("max_connections = 100", nobody_is_there),
    ],
)
def test_a_closed_gate_uses_hardly_any_cpu(
    new_daemon: NewDaemon,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    fill: Callable[[Daemon, ExitStack], None],
) -> None:
    daemon = new_daemon(f"workers = 3\nlimits.{limit}").run()
    with ExitStack() as stack:
        fill(daemon, stack)

        def settled() -> bool:
            before = cpu_seconds(daemon)
            time.sleep(0.2)
            return cpu_seconds(daemon) - before < 0.05

        until(settled)
        before, since = cpu_seconds(daemon), time.monotonic()
        time.sleep(2)
        share = (cpu_seconds(daemon) - before) / (time.monotonic() - since)
        with capsys.disabled():
            print(f"\n  {fill.__name__}: {share:.1%} of a core")
        assert share < 0.05
        daemon.stop(signal.SIGQUIT)  # so that the clients that still wait end
