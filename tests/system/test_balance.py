"""Kept connections spread over the workers, whoever let them in, and lose nothing on their way."""

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from conftest import Daemon, NewDaemon, halt, is_idle
from plain_client import Framed, one_shot, until

UNLIMITED = "workers = {}\nlimits.max_requests_per_minute = 0"
STATE = """
python_path = ["{folder}"]
[modules.state]
import = "probe"
functions = ["worker_pid"]
affinity = "client"
"""


@contextmanager
def crowd(daemon: Daemon, count: int) -> Iterator[list[Framed]]:
    """Many kept connections."""
    with ExitStack() as stack:
        yield [stack.enter_context(Framed(daemon.path)) for _ in range(count)]


def where(clients: Sequence[Framed]) -> list[int]:
    """The process id of the worker that each has come to; all ask at once."""
    for client in clients:
        client.send("probe", "worker_pid")
    replies = [client.receive() for client in clients]
    return [reply["result"] for reply in replies if reply is not None and reply["success"]]


def is_even(daemon: Daemon, pids: Sequence[int]) -> bool:
    """Whether every worker has its part of the clients that have come to these."""
    numbers = [Counter(pids)[pid] for pid in daemon.workers()]
    return max(numbers) - min(numbers) <= 2


def spread(daemon: Daemon, clients: Sequence[Framed]) -> bool:
    """Whether the clients are spread, once all have made a call more."""
    pids = where(clients)
    assert len(pids) == len(clients)
    return is_even(daemon, pids)


def test_those_that_come_all_at_once_are_spread(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(UNLIMITED.format(8)).run()
    with crowd(daemon, 32) as clients:
        until(lambda: spread(daemon, clients))
    gate = daemon.metrics()["gate"]
    assert gate["worker_deaths"] == 0


def test_those_that_come_one_by_one_are_spread_where_threads_is_set(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(UNLIMITED.format(4) + "\nthreads = 8").run()
    with ExitStack() as stack:
        clients = []
        for _ in range(12):
            clients.append(stack.enter_context(Framed(daemon.path)))
            where(clients[-1:])
            until(lambda: all(map(is_idle, daemon.workers())))
        # Not at once: the worker that has just run a call may accept the next client as well.
        until(lambda: len({pid for client in clients for pid in where([client])}) > 2)


def test_a_worker_that_is_added_gets_its_part(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(UNLIMITED.format(1)).run()
    with crowd(daemon, 20) as clients:
        assert len(set(where(clients))) == 1
        os.kill(daemon.pid, signal.SIGTTIN)
        until(lambda: len(daemon.workers()) == 2)
        until(lambda: spread(daemon, clients))


def test_one_whose_state_is_here_stays(new_daemon: NewDaemon) -> None:
    folder = os.path.dirname(__file__) + "/../modules"
    daemon = new_daemon(UNLIMITED.format(1) + STATE.format(folder=folder)).run()
    with crowd(daemon, 20) as clients, Framed(daemon.path) as keeper:
        keeper.send("state", "worker_pid")
        reply = keeper.receive()
        assert reply is not None
        home = reply["result"]
        os.kill(daemon.pid, signal.SIGTTIN)
        until(lambda: len(daemon.workers()) == 2)
        until(lambda: len(set(where(clients))) == 2)
        assert all(where([keeper]) == [home] for _ in range(200))


def test_what_was_sent_ahead_goes_along(new_daemon: NewDaemon) -> None:
    """Nothing but such batches moves the clients. Of half of them one is large, and may stay."""
    daemon = new_daemon(UNLIMITED.format(1)).run()
    with crowd(daemon, 20) as clients:
        where(clients)
        os.kill(daemon.pid, signal.SIGTTIN)
        until(lambda: len(daemon.workers()) == 2)
        small = [{"number": number} for number in range(12)]
        large = [*small[:6], {"text": "x" * 20_000}, *small[6:]]

        def is_even_after_a_batch_each() -> bool:
            pids = []
            for number, client in enumerate(clients):
                for each in large if number % 2 else small:
                    client.send("probe", "echo", each)
                client.send("probe", "worker_pid")
            for number, client in enumerate(clients):
                sent = large if number % 2 else small
                *replies, last = [client.receive() for _ in range(len(sent) + 1)]
                assert [reply and reply["result"] for reply in replies] == sent
                assert last is not None
                pids.append(last["result"])
            return is_even(daemon, pids)

        until(is_even_after_a_batch_each)


def test_a_worker_that_does_nothing_keeps_nobody_from_being_served(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(UNLIMITED.format(2)).run()
    stopped, other = daemon.workers()
    halt(stopped)
    try:
        with crowd(daemon, 30) as clients:
            for client in clients:
                assert where([client]) == [other]
            for _ in range(200):
                assert one_shot(daemon.path, "test", "ping")["success"]
            os.kill(stopped, signal.SIGCONT)
            until(lambda: spread(daemon, clients))
    finally:
        os.kill(stopped, signal.SIGCONT)
