"""State is found again: a call runs in the worker that has what earlier calls left there."""

import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import COMMAND, Daemon, NewDaemon, daemons, halt, is_idle
from plain_client import Framed, connect, most_at_once, one_shot, read_to_end, request, until
from stateful import ClientProcess

HELPERS = Path(__file__).parents[1] / "helpers"
CROWD = Path(__file__).parents[1] / "crowd.py"
NAMESAKE = Path(__file__).parents[1] / "namesake.py"
UNLIMITED = "limits.max_requests_per_minute = 0"
CLIENTS, HANDLES = 6, 10


def configured(new_daemon: NewDaemon, top: str = "", *, workers: int = 4) -> Daemon:
    """A daemon that has one helper as `c` (affinity client), `m` and `m2` (module), `n` (none)."""
    tables = "".join(
        f'[modules.{name}]\nimport = "keeper"\nfunctions = "*"\naffinity = "{affinity}"\n'
        for name, affinity in (("c", "client"), ("m", "module"), ("m2", "module"), ("n", "none"))
    )
    return new_daemon(
        f'workers = {workers}\npython_path = ["{HELPERS}"]\n{UNLIMITED}\n{top}\n{tables}'
    )


def stateful(new_daemon: NewDaemon, top: str = "", *, workers: int = 4) -> Daemon:
    """The same, running."""
    return configured(new_daemon, top, workers=workers).run()


@contextmanager
def clients(daemon: Daemon, count: int, form: str = "one-shot") -> Iterator[list[ClientProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ClientProcess(daemon.path, form)) for _ in range(count)]


def at_once(work: Callable[[ClientProcess], Any], processes: list[ClientProcess]) -> list[Any]:
    """Do something with each client process, all at the same time."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(work, processes))


def workers_report(daemon: Daemon) -> list[dict[str, Any]]:
    report: list[dict[str, Any]] = daemon.metrics()["workers"]
    return report


def sessions(daemon: Daemon) -> int:
    return sum(each["sessions"] for each in workers_report(daemon))


def connections(daemon: Daemon) -> list[dict[str, Any]]:
    report: list[dict[str, Any]] = daemon.call("system", "connections")["connections"]
    return report


def slot_of(daemon: Daemon, pid: int) -> int:
    (slot,) = (each["worker"] for each in workers_report(daemon) if each["pid"] == pid)
    return int(slot)


def handed_over(daemon: Daemon) -> int:
    return sum(each["taken_over"] for each in workers_report(daemon))


@pytest.fixture(scope="module")
def keeper() -> Iterator[Daemon]:
    """One daemon for tests that leave it as it was."""
    with daemons() as make:
        yield stateful(make)


# -- it is found again --


@pytest.mark.parametrize("form", ["one-shot", "framed"])
@pytest.mark.parametrize("module", ["c", "m"])
def test_no_state_is_lost_over_many_processes_and_workers(
    keeper: Daemon, module: str, form: str
) -> None:
    def work(client: ClientProcess) -> set[int]:
        handles = [client.call(module, "put", [[client.pid, n]]) for n in range(HANDLES)]
        for _ in range(3):
            for number, handle in enumerate(handles):
                assert client.call(module, "get", [handle]) == [client.pid, number]
        return {client.call(module, "where") for _ in range(4)}

    with clients(keeper, CLIENTS, form) as processes:
        places = at_once(work, processes)
    assert all(len(context) == 1 for context in places)
    used = set().union(*places)
    assert len(used) == 1 if module == "m" else len(used) > 1


def test_clients_that_come_one_by_one_are_spread(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon)
    with clients(daemon, 8) as processes:
        places: Counter[int] = Counter()
        for client in processes:
            places[client.call("c", "where")] += 1
            until(lambda: all(map(is_idle, daemon.workers())))
        assert len(places) == 4
        assert max(places.values()) <= 4
        assert [client.call("c", "where") for client in processes for _ in range(3)]


def test_a_module_without_affinity_runs_in_any_worker(keeper: Daemon) -> None:
    with ClientProcess(keeper.path) as client:
        until(lambda: len({client.call("n", "where") for _ in range(20)}) > 1)


def test_modules_are_spread_over_the_workers(keeper: Daemon) -> None:
    assert keeper.call("m", "where") != keeper.call("m2", "where")


def test_pipelined_calls_to_different_modules_are_answered_in_order(keeper: Daemon) -> None:
    modules = ["m", "n", "c", "m2", "c", "m", "n", "m2"] * 10
    with Framed(keeper.path) as client:
        for number, module in enumerate(modules):
            client.send(module, "where", request_id=str(number))
        replies = [client.receive() for _ in modules]
    assert [r and r["request_id"] for r in replies] == [str(n) for n in range(len(modules))]
    places: dict[str, set[int]] = {}
    for reply in replies:
        assert reply is not None
        places.setdefault(reply["module"], set()).add(reply["result"])
    assert [len(places[name]) for name in ("m", "m2", "c")] == [1, 1, 1]


@pytest.mark.parametrize("form", ["one-shot", "framed"])
def test_a_request_of_any_size_is_handed_over_whole(keeper: Daemon, form: str) -> None:
    with clients(keeper, 3, form) as processes:
        for client in processes:  # of three modules in four workers, some are elsewhere
            for size in (0, 16_000, 17_000, 1_500_000):
                for module in ("c", "m", "m2"):
                    assert client.call(module, "length", ["\u00e9" * size]) == size


def test_a_kept_connection_is_handed_over_once_and_stays(keeper: Daemon) -> None:
    with ClientProcess(keeper.path) as first, ClientProcess(keeper.path, "framed") as second:
        owner = first.call("m", "where")
        before = handed_over(keeper)
        assert {second.call("m", "where") for _ in range(50)} == {owner}
        # Once for `second`; the reports' own calls have no affinity.
        assert handed_over(keeper) - before <= 1


@pytest.mark.parametrize("rest", [b"", b"\0\0"])
def test_a_kept_connection_that_was_handed_over_ends_in_no_silence(
    keeper: Daemon, rest: bytes
) -> None:
    """The worker that had it before may have ended its reading side when it was about to leave."""
    with Framed(keeper.path) as client:
        for module in ("m", "m2"):
            client.call(module, "where")
        client.socket.sendall(rest)
        client.socket.shutdown(socket.SHUT_WR)  # stands for that: the worker sees the same
        assert client.receive() is None


def test_connections_keep_their_age_and_their_requests_when_they_are_handed_over(
    keeper: Daemon,
) -> None:
    with Framed(keeper.path) as client:
        for module in ("n", "m", "m2", "m", "m2", "c"):
            assert client.call(module, "where") is not None
        report = client.call("system", "connections")
        assert report is not None
        counted = [each["requests_count"] for each in report["result"]["connections"]]
    assert 7 in counted


def test_a_forked_child_is_another_client_but_shares_what_all_share(keeper: Daemon) -> None:
    with ClientProcess(keeper.path) as parent:
        shared = parent.call("m", "put", ["shared"])
        with ClientProcess(keeper.path) as child:
            assert child.call("m", "get", [shared]) == "shared"


# -- reload --


@pytest.mark.parametrize(("module", "form"), [("c", "framed"), ("m", "one-shot")])
def test_sessions_survive_reloads_until_their_client_ends(
    new_daemon: NewDaemon, module: str, form: str
) -> None:
    daemon = stateful(new_daemon)
    old = set(daemon.workers())
    over = threading.Event()

    def work(client: ClientProcess) -> tuple[set[int], Counter[str]]:
        """Keeps handles, and reads them again and again until all reloads are over."""
        handles: dict[str, int] = {}
        kinds: Counter[str] = Counter()
        places: set[int] = set()

        def call(function: str, *params: Any) -> Any:
            while True:
                reply = client.reply(module, function, list(params))
                if reply is not None:
                    break  # a kept connection was ended before it had a session: once more
            kinds[reply.get("error_type", "")] += 1
            assert reply["success"], reply
            return reply["result"]

        for number in range(HANDLES):
            handles[call("put", number)] = number
        while True:
            last = over.wait(0.1)  # or the clients would keep the reloads from the processor
            for handle, number in handles.items():
                assert call("get", handle) == number
            places.add(call("where"))
            if last:
                return places, kinds

    with clients(daemon, CLIENTS, form) as processes:
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = [pool.submit(work, client) for client in processes]
            until(lambda: sessions(daemon) >= 1)
            for _ in range(2):
                daemon.reload()
            over.set()
            results = [each.result() for each in done]
        assert all(len(places) == 1 for places, _ in results)
        owners = set().union(*(places for places, _ in results))
        assert owners & old
        assert owners <= set(daemon.workers())  # they are still there
        # Who comes now is served by the new ones.
        with ClientProcess(daemon.path) as newcomer:
            assert newcomer.call(module, "where") not in old
    until(lambda: not old & set(daemon.workers()))  # the clients have ended, so they leave
    assert "died" not in daemon.log()


def test_a_worker_that_drains_leaves_when_its_sessions_are_silent(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "limits.stale_timeout = 1", workers=2)
    with ClientProcess(daemon.path) as client:
        owner = client.call("c", "where")
        daemon.reload()
        until(lambda: f"(pid {owner}) has left" in daemon.log())
        lost = client.reply("c", "where")
        assert lost["error_type"] == "SessionLost"
        assert client.call("c", "where") in daemon.workers()


def test_drain_timeout_ends_the_sessions_of_a_worker_that_drains(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "limits.drain_timeout = 1", workers=2)
    with ClientProcess(daemon.path) as client:
        owner = client.call("c", "where")
        daemon.reload()
        until(lambda: f"(pid {owner}) has left" in daemon.log())
        assert client.reply("c", "where")["error_type"] == "SessionLost"
        assert client.call("c", "where") in daemon.workers()


# -- a worker that dies --


@pytest.mark.parametrize(("module", "form"), [("c", "framed"), ("m", "one-shot")])
def test_each_client_of_a_killed_worker_gets_one_error(
    new_daemon: NewDaemon, module: str, form: str
) -> None:
    daemon = stateful(new_daemon)
    kills = 2
    with clients(daemon, CLIENTS, form) as processes:
        at = {client: client.call(module, "where") for client in processes}
        for _ in range(kills):
            # Workers of which nobody calls now, so that no call is cut.
            victim = at[processes[0]]
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: f"(pid {victim}) died" in daemon.log())
            until(lambda: len(daemon.workers()) == 4)
            for client in processes:
                kinds: Counter[str] = Counter()
                for _ in range(4):
                    reply = client.reply(module, "where")
                    kinds[reply.get("error_type", "")] += 1
                    if reply["success"]:
                        at[client] = reply["result"]
                    elif reply["error_type"] == "SessionLost":
                        assert f"'{module}'" in reply["error"]
                        assert "worker" in reply["error"]
                kinds.pop("(lost)", None)  # a kept connection to the worker that was killed
                assert kinds["SessionLost"] == (1 if at[client] != victim else 0) or kinds == {
                    "": 4
                }
                assert set(kinds) <= {"", "SessionLost"}
                assert kinds["SessionLost"] <= 1
            assert victim not in at.values()


def test_exactly_the_clients_of_a_killed_worker_get_an_error(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon)
    with clients(daemon, CLIENTS) as processes:
        at = {client: client.call("c", "where") for client in processes}
        victim = at[processes[0]]
        os.kill(victim, signal.SIGKILL)
        until(lambda: f"(pid {victim}) died" in daemon.log())
        for client in processes:
            replies = [client.reply("c", "where") for _ in range(5)]
            kinds = [reply.get("error_type") for reply in replies]
            if at[client] == victim:
                assert kinds == ["SessionLost", None, None, None, None]
            else:
                assert kinds == [None] * 5
                assert {reply["result"] for reply in replies} == {at[client]}


def test_a_call_whose_owner_dies_before_it_has_it_gets_an_error(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon)
    with ClientProcess(daemon.path) as client:
        owner = client.call("m", "where")
        halt(owner)
        client.begin("m", "where")
        waiting = lambda: any(  # noqa: E731
            each["status"] == "waiting"
            for each in daemon.call("system", "connections")["connections"]
        )
        until(waiting)
        os.kill(owner, signal.SIGKILL)
        reply = client.end()
        assert reply["error_type"] == "WorkerLost"
        assert "not run" in reply["error"]
        assert client.reply("m", "where")["error_type"] == "SessionLost"
        assert client.call("m", "where") in daemon.workers()


def test_a_first_call_whose_owner_dies_while_it_is_on_its_way_runs_elsewhere(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon)
    with ClientProcess(daemon.path) as first, ClientProcess(daemon.path) as second:
        owner = first.call("m", "where")
        halt(owner)
        second.begin("m", "where")
        time.sleep(0.1)
        os.kill(owner, signal.SIGKILL)
        reply = second.end()
        assert reply["success"]
        assert reply["result"] != owner


def test_a_dead_workers_handoff_queue_holds_no_client(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, workers=2)
    with clients(daemon, 6) as processes:
        owner = processes[0].call("m", "where")
        halt(owner)
        for client in processes:
            client.begin("m", "where")
        time.sleep(0.2)
        for pid in daemon.workers():
            os.kill(pid, signal.SIGKILL)
        for client in processes:  # answered, or cut off with its worker: not silent
            assert client.end() is not None
        until(lambda: daemon.metrics()["gate"]["connections"] == 1)


# -- full --


def test_a_call_waits_for_a_full_owner_no_longer_than_its_client(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "threads = 1", workers=2)
    with ClientProcess(daemon.path) as busy, ClientProcess(daemon.path) as late:
        owner = busy.call("m", "where")
        busy.begin("m", "where_after", [4])
        until(lambda: daemon.metrics()["gate"]["running"] == 2)
        reply = late.reply("m", "where", timeout=0.3)
        assert reply["error_type"] == "RequestTimeout"
        assert "for a thread of its worker (threads)" in reply["error"]
        assert late.call("m", "where") == owner  # waits its turn
        assert busy.end()["result"] == owner


def test_a_timeout_counts_from_the_arrival_wherever_the_call_runs(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "threads = 1", workers=2)
    with ClientProcess(daemon.path) as busy, ClientProcess(daemon.path) as late:
        owner = busy.call("m", "where")
        busy.begin("m", "where_after", [3])
        until(lambda: daemon.metrics()["gate"]["running"] == 2)
        # It waits for the owner's thread at first, and then would run for as long again.
        reply = late.reply("m", "where_after", [3], timeout=4)
        assert reply["error_type"] == "RequestTimeout", reply
        assert busy.end()["result"] == owner


def test_a_client_that_waits_for_a_thread_is_answered_in_time(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon, "threads = 1", workers=2)
    with clients(daemon, 3) as (busy, other, late):
        owner = busy.call("m", "where")
        busy.begin("m", "where_after", [8])
        until(lambda: daemon.metrics()["gate"]["running"] == 2)
        late.begin("m", "where", timeout=1.5)
        until(lambda: [c["status"] for c in connections(daemon)].count("waiting") == 1)
        other.begin("n", "where_after", [8])  # now no thread is left anywhere
        reply = late.end()
        assert reply["error_type"] == "RequestTimeout"
        assert "for a thread of its worker (threads)" in reply["error"]
        assert not busy.has_replied()
        assert not other.has_replied()
        assert busy.end()["result"] == owner
        assert other.end()["result"] != owner


def test_a_client_that_waits_for_a_thread_is_answered_at_once_when_the_daemon_stops(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon, "threads = 1", workers=2)
    with clients(daemon, 3) as (busy, other, late):
        owner = busy.call("m", "where")
        busy.begin("m", "where_after", [8])
        until(lambda: daemon.metrics()["gate"]["running"] == 2)
        late.begin("m", "where")
        until(lambda: [c["status"] for c in connections(daemon)].count("waiting") == 1)
        other.begin("n", "where_after", [8])  # now both workers have something to finish
        until(lambda: daemon.status()["gate"]["running"] == 2)
        os.kill(daemon.pid, signal.SIGTERM)
        assert late.end()["error_type"] == "ShuttingDown"
        assert not busy.has_replied()
        assert not other.has_replied()
        assert busy.end()["result"] == owner
        assert other.end()["result"] != owner


def test_workers_with_one_thread_each_take_each_others_clients(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "threads = 1", workers=2)
    with clients(daemon, 8) as processes:

        def work(client: ClientProcess) -> None:
            for _ in range(10):
                client.call("m", "where")
                client.call("m2", "where")
                client.call("c", "where")

        at_once(work, processes)


def test_more_sessions_than_the_table_holds_are_refused_clearly(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "limits.max_sessions = 2", workers=2)
    with clients(daemon, 3) as (first, second, third):
        assert first.call("c", "where")
        assert second.call("c", "where")
        reply = third.reply("c", "where")
        assert reply["error_type"] == "Overloaded"
        assert "no session is left of 2 (limits.max_sessions)" in reply["error"]
        assert reply["retry_after"] > 0
        assert first.call("c", "where")
        second.kill()
        until(lambda: third.reply("c", "where")["success"])


def test_rows_of_clients_that_ended_after_their_worker_are_used_again(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon, "limits.max_sessions = 2", workers=2)
    for _ in range(3):
        with clients(daemon, 2) as processes:
            for client in processes:
                owner = until(lambda c=client: c.reply("c", "where").get("result"))
                os.kill(owner, signal.SIGKILL)
                until(lambda o=owner: o not in daemon.workers())
                until(lambda: len(daemon.workers()) == 2)


def test_an_owner_whose_descriptors_are_used_up_by_clients_takes_one_that_has_its_state(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon, workers=2)
    with ClientProcess(daemon.path) as client, ClientProcess(daemon.path) as other:
        owner = client.call("m", "where")
        used = max(int(name) for name in os.listdir(f"/proc/{owner}/fd")) + 1
        before = resource.prlimit(owner, resource.RLIMIT_NOFILE)
        resource.prlimit(owner, resource.RLIMIT_NOFILE, (used, before[1]))
        gaps = used - len(os.listdir(f"/proc/{owner}/fd"))
        with ExitStack() as stack:
            for _ in range(gaps + 4):  # what is free below the limit is taken by clients
                kept = stack.enter_context(Framed(daemon.path))
                kept.send("m", "where")
            until(lambda: "Too many open files" in daemon.log())
            assert client.call("m", "where", timeout=20) == owner
            assert other.call("m", "where", timeout=20) == owner
            resource.prlimit(owner, resource.RLIMIT_NOFILE, before)


# -- the limits --


def test_limits_are_exact_while_all_calls_are_handed_over(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "limits.max_connections = 6\nlimits.max_concurrent_requests = 3")

    def work(client: ClientProcess) -> list[list[float]]:
        return [client.call("m", "span", [0.02]) for _ in range(15)]

    with clients(daemon, CLIENTS) as processes:
        spans = [span for each in at_once(work, processes) for span in each]
    assert most_at_once(spans) == 3
    until(lambda: daemon.metrics()["gate"]["connections"] == 1)
    metrics = daemon.metrics()
    assert metrics["connection_summary"]["peak_connections"] <= 6
    assert handed_over(daemon) > len(spans) / 3
    # A client that changed hands is one connection, as each call is one request.
    finished = sum(each["requests"] for each in metrics["workers"])
    assert metrics["connection_summary"]["total_connections"] == finished + 1


def test_the_rate_is_exact_while_calls_are_handed_over(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        f'workers = 4\nlimits.max_requests_per_minute = 50\npython_path = ["{HELPERS}"]\n'
        '[modules.m]\nimport = "keeper"\nfunctions = "*"\naffinity = "module"\n'
    ).run()
    done = Counter[str]()
    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                reply = one_shot(daemon.path, "m", "where", timeout=8)
            except TimeoutError:
                return
            with lock:
                done["ok" if reply["success"] else "failed"] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == {"ok": 50}


# -- sessions --


def test_what_a_client_leaves_is_found_by_handle_and_by_name(
    keeper: Daemon, tmp_path: Path
) -> None:
    event = str(tmp_path / "closed")
    with ClientProcess(keeper.path) as client, ClientProcess(keeper.path) as other:
        handle = client.call("c", "keep", [event, 7])
        assert client.call("c", "keep", [event, 8, "named"]) == "named"
        assert client.call("c", "find", [handle]) == 7
        assert client.call("c", "find", ["named"]) == 8
        assert client.call("c", "keep", [event, 9, "named"]) == "named"
        assert Path(event).read_text() == "8\n"  # replaced, so closed
        assert client.call("c", "find", ["named"]) == 9
        for who in (handle, "named"):
            assert other.reply("c", "find", [who])["error_type"] == "UnknownHandle"
        client.call("c", "drop", [handle])
        assert Path(event).read_text() == "8\n7\n"
        assert client.reply("c", "find", [handle])["error_type"] == "UnknownHandle"


def test_objects_are_closed_when_their_client_ends(keeper: Daemon, tmp_path: Path) -> None:
    event = tmp_path / "closed"
    with ClientProcess(keeper.path) as client:
        for module in ("c", "m"):
            client.call(module, "keep", [str(event), module])
            client.call(module, "keep_bad")
    until(lambda: event.exists() and sorted(event.read_text().split()) == ["c", "m"])
    until(lambda: "it cannot be closed" in keeper.log())


def test_what_is_left_after_the_session_has_ended_is_closed_at_once(
    keeper: Daemon, tmp_path: Path
) -> None:
    event, go_on = tmp_path / "closed", tmp_path / "go on"
    with ClientProcess(keeper.path) as client:
        client.call("c", "keep", [str(event), "before"])
        client.call("c", "keep_later", [str(event), str(go_on)])
    until(event.exists)
    go_on.touch()
    until(lambda: event.read_text() == "before\nlate\ntold\n")


def freed_after(daemon: Daemon, event: Path) -> float:
    """In how many seconds the state of 200 processes is closed that end without a word."""
    crowd = subprocess.Popen(
        [sys.executable, "-S", str(CROWD), daemon.path, "200", "c", "keep", str(event)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert crowd.stdin is not None
    assert crowd.stdout is not None
    assert crowd.stdout.readline() == "200\n"
    assert sessions(daemon) == 200
    crowd.stdin.write("\n")
    crowd.stdin.flush()
    killed = float(crowd.stdout.readline())
    until(lambda: event.exists() and len(event.read_text().split()) == 200)
    until(lambda: sessions(daemon) == 0)
    assert sorted(map(int, event.read_text().split())) == list(range(200))
    crowd.communicate()
    return event.stat().st_mtime - killed


def test_the_state_of_200_processes_that_end_without_a_word_is_freed_within_a_second(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = stateful(new_daemon, "limits.max_connections = 300")
    for attempt in range(3):  # a busy machine may be late itself
        if freed_after(daemon, tmp_path / f"closed{attempt}") < 1:
            return
    pytest.fail("never within a second")


def test_silence_closes_what_a_client_left_and_it_gets_one_error(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = stateful(new_daemon, "limits.stale_timeout = 0.5", workers=2)
    event = tmp_path / "closed"
    with ClientProcess(daemon.path) as client, ClientProcess(daemon.path) as plain:
        handle = client.call("c", "keep", [str(event), 1])
        kept = plain.call("c", "put", ["a module's own state"])
        until(event.exists)
        reply = client.reply("c", "find", [handle])
        assert reply["error_type"] == "SessionLost"
        assert "limits.stale_timeout" in reply["error"]
        assert client.reply("c", "find", [handle])["error_type"] == "UnknownHandle"
        # Of what a module keeps by itself nothing is closed, so nothing is lost.
        assert plain.call("c", "get", [kept]) == "a module's own state"


def test_objects_are_closed_when_the_daemon_stops(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = stateful(new_daemon, workers=2)
    event = tmp_path / "closed"
    with ClientProcess(daemon.path) as client:
        for number in range(3):
            client.call("c", "keep", [str(event), number])
        assert daemon.stop() == 0
        assert event.read_text().split() == ["2", "1", "0"]  # the newest first


def test_what_a_running_call_uses_is_closed_after_it(keeper: Daemon, tmp_path: Path) -> None:
    event = tmp_path / "closed"
    with ClientProcess(keeper.path) as client:
        client.call("c", "keep", [str(event), 1, "thing"])
        client.begin("c", "use", ["thing", 1.0])
        until(lambda: keeper.metrics()["gate"]["running"] == 2)
        client.kill()
    until(lambda: event.exists() and event.read_text().split() == ["used", "1"])


def test_a_module_without_affinity_has_no_session(keeper: Daemon) -> None:
    reply = one_shot(keeper.path, "n", "keep", ["note", 1])
    assert reply["error_type"] == "RuntimeError"
    assert "affinity" in reply["error"]
    assert one_shot(keeper.path, "n", "where")["success"]


def test_the_end_of_a_client_is_noticed_without_polling(keeper: Daemon) -> None:
    with ClientProcess(keeper.path) as client:
        owner = client.call("c", "where")
        process = psutil.Process(owner)
        switches = process.num_ctx_switches()
        time.sleep(2)
        more = process.num_ctx_switches()
        # One look a second by the main thread, and what other tests of this daemon may cause.
        assert more.voluntary - switches.voluntary < 30


# -- who a client is --


def test_a_client_of_another_pid_namespace_is_known_by_its_connection(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    """The daemon runs in a PID namespace of its own, so its clients have no number there."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    probe = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"no PID namespaces here: {probe.stderr.decode().strip()}")
    daemon = configured(new_daemon)
    daemon.process = subprocess.Popen(
        [*unshare, COMMAND, "run", "--config", str(daemon.config)],
        env=daemon.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: " ready: pid 1," in daemon.log(), 60)
    os.unlink(f"{daemon.path}.pid")  # it says 1, which is another process here
    event = tmp_path / "closed"
    with Framed(daemon.path) as kept, Framed(daemon.path) as other:
        reply = kept.call("c", "keep", [str(event), 1, "thing"])
        assert reply is not None
        assert reply["success"], reply
        for module in ("m", "m2", "n", "c"):  # the connection moves, and is still the same client
            assert kept.call(module, "where") is not None
        found = kept.call("c", "find", ["thing"])
        assert found is not None
        assert found["result"] == 1
        lost = other.call("c", "find", ["thing"])
        assert lost is not None
        assert lost["error_type"] == "UnknownHandle"
        assert not event.exists()
    until(event.exists)
    for _ in range(5):
        assert one_shot(daemon.path, "c", "keep", [str(event), 2])["success"]
    until(lambda: event.read_text().split() == ["1"] + ["2"] * 5)
    until(lambda: sessions(daemon) == 0)


# Has the workers ask the kernel for what no kernel has, as one before Linux 6.5 would answer it.
NO_PEER_PIDFD = "from cpanbridge.workers.client import identity; identity.SO_PEERPIDFD = 9999"


@pytest.mark.parametrize("patch", ["", NO_PEER_PIDFD], ids=["pidfd", "start time"])
def test_a_connection_that_outlives_its_process_reads_no_session_of_the_next_with_its_pid(
    new_daemon: NewDaemon, patch: str, tmp_path: Path
) -> None:
    daemon = configured(new_daemon, workers=1)
    daemon.will_run(patch)
    daemon.run()
    program = [sys.executable, "-S", str(NAMESAKE), daemon.path, str(tmp_path / "closed")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        if said.startswith("skip"):
            pytest.skip(said)
        assert json.loads(said)["error_type"] == "UnknownHandle", said


def test_a_client_that_does_not_wait_for_its_reply_leaves_nothing(keeper: Daemon) -> None:
    body = json.dumps(request("c", "where")).encode()
    before = sessions(keeper)
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            connect(keeper.path).sendall(body)
            os._exit(0)
        os.waitpid(pid, 0)
    until(lambda: keeper.metrics()["gate"]["connections"] == 1)
    until(lambda: sessions(keeper) == before)


def test_a_crowd_that_does_not_wait_leaves_no_row_behind(new_daemon: NewDaemon) -> None:
    """Many clients at once that end while their calls are on the way, then a full table's worth."""
    daemon = stateful(new_daemon, "limits.max_sessions = 30", workers=2)
    script = (
        "import json, os, socket, sys\n"
        "for _ in range(40):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        for module in ('c', 'm', 'm2'):\n"
        "            client = socket.socket(socket.AF_UNIX)\n"
        "            client.connect(sys.argv[1])\n"
        "            call = {'module': module, 'function': 'size'}\n"
        "            client.send(json.dumps(call).encode())\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    crowds = [subprocess.Popen([sys.executable, "-S", "-c", script, daemon.path]) for _ in range(6)]
    for crowd in crowds:
        assert crowd.wait(60) == 0
    until(lambda: sessions(daemon) == 0)
    with clients(daemon, 25) as processes:
        for client in processes:
            until(lambda client=client: client.reply("c", "size")["success"])


def test_a_client_that_left_nothing_does_not_keep_others_from_being_silent(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = stateful(new_daemon, "limits.stale_timeout = 1", workers=1)
    event, dropped = tmp_path / "closed", tmp_path / "dropped"
    with ClientProcess(daemon.path) as busy, ClientProcess(daemon.path) as silent:
        busy.call("c", "drop", [busy.call("c", "keep", [str(dropped), 1])])
        silent.call("c", "keep", [str(event), 2])

        def closed() -> bool:
            assert busy.reply("c", "size")["success"]  # and nothing of it is lost
            return event.exists()

        until(closed)


def test_the_number_of_sessions_does_not_change_by_a_reload(new_daemon: NewDaemon) -> None:
    daemon = stateful(new_daemon, "limits.max_sessions = 30", workers=1)
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("max_sessions = 30", "max_sessions = 40"))
    done = daemon.command("reload")
    assert done.returncode == 1
    assert "limits.max_sessions = 40: the running daemon has room for 30; restart it" in done.stderr


def test_calls_that_wait_for_an_owner_with_a_full_queue_are_answered_in_time(
    new_daemon: NewDaemon,
) -> None:
    daemon = stateful(new_daemon, "limits.max_connections = 300", workers=2)
    with ClientProcess(daemon.path) as first:
        owner = first.call("m", "where")
        halt(owner)
        body: dict[str, Any] = {"module": "m", "function": "length", "params": ["x" * 15000]}
        with ExitStack() as stack:
            waiting = []
            for number in range(150):
                client = stack.enter_context(connect(daemon.path))
                body["timeout"] = 0.3 + number % 50 * 0.02
                client.sendall(json.dumps(body).encode())
                waiting.append(client)
            # Those that the halted owner has accepted itself are answered when it goes on.
            until(lambda: len(select.select(waiting, [], [], 0)[0]) > 50)
            assert owner in daemon.workers()
            os.kill(owner, signal.SIGCONT)
            for client in waiting:
                reply = json.loads(read_to_end(client))
                assert reply["success"] or reply["error_type"] == "RequestTimeout"
    assert "fault of the daemon" not in daemon.log()
    assert daemon.metrics()["gate"]["worker_deaths"] == 0


SMALL_QUEUE = (
    "from cpanbridge.supervisor.memory import handoff_sockets\nhandoff_sockets._BUFFER = 1\n"
)


def test_workers_with_full_handoff_queues_do_not_wait_for_each_other(new_daemon: NewDaemon) -> None:
    daemon = configured(new_daemon, "threads = 1\nlimits.max_connections = 400", workers=2)
    daemon.will_run(SMALL_QUEUE)
    daemon.run()
    until(lambda: len({daemon.call("n", "where") for _ in range(20)}) > 1)  # both serve
    daemon.call("m", "where"), daemon.call("m2", "where")  # one in each
    with ExitStack() as stack:
        with daemon.held():
            waiting = [stack.enter_context(connect(daemon.path)) for _ in range(300)]
            for client, module in zip(waiting, random.choices(["m", "m2"], k=300), strict=True):
                client.sendall(json.dumps(request(module, "span", [0.005])).encode())
        for client in waiting:
            assert json.loads(read_to_end(client))["success"]
