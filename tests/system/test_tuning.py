"""The examples of docs/tuning.md do what it says of them."""

import re
import select
import threading
import time
from pathlib import Path

import pytest
from conftest import NewDaemon
from plain_client import connect, most_at_once, one_shot, until

TUNING = Path(__file__).parents[2] / "docs" / "tuning.md"
EXAMPLES = [
    dict(re.findall(r"^export (\w+)=(\S+)$", block, re.MULTILINE))
    for block in re.findall(r"```sh\n(.*?)```", TUNING.read_text(), re.DOTALL)
]
BUSY, SMALL, TEST = EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=["busy", "small", "test"])
def test_every_setting_of_an_example_takes_effect(
    new_daemon: NewDaemon, example: dict[str, str]
) -> None:
    daemon = new_daemon("workers = 2", **example).run()
    configuration = daemon.call("system", "info")["configuration"]
    for name, value in example.items():
        assert configuration[name.removeprefix("CPAN_BRIDGE_").lower()] == float(value)
    events = [line for line in daemon.log().splitlines() if "[WARNING]" in line]
    assert all("it will never be reached" in line for line in events)  # on a smaller machine


def test_the_busy_server_runs_200_requests_and_keeps_500_connections(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2", **BUSY).run()
    spans: list[list[float]] = []

    def span() -> None:
        spans.append(daemon.call("probe", "span", [1.0], timeout=60.0))

    threads = [threading.Thread(target=span) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(spans) == 200
    assert most_at_once(spans) > 100  # the document's old limit
    clients = [connect(daemon.path) for _ in range(450)]
    until(lambda: daemon.metrics()["gate"]["connections"] == 451)
    for client in clients:
        client.close()


def test_the_small_host_retires_a_worker_that_leaks(new_daemon: NewDaemon) -> None:
    daemon = new_daemon("workers = 2\nlimits.memory_grace = 1", **SMALL).run()
    pid = daemon.call("probe", "hoard", [250])
    until(lambda: pid not in daemon.workers(), what="the retirement")
    assert daemon.call("test", "echo", True)
    assert "RESOURCE VIOLATION: ['Memory usage" in daemon.log()


def test_on_the_test_host_the_eleventh_call_waits_and_the_log_says_so(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2", **TEST).run()
    for _ in range(10):
        daemon.call("test", "echo", True)
    with connect(daemon.path) as client:
        client.sendall(b'{"module": "test", "function": "echo"}')
        began = time.monotonic()
        until(lambda: daemon.log().count("VIOLATION: ['Request rate 11/min") == 3, 30)
        assert time.monotonic() - began > 5
        assert not select.select([client], [], [], 0)[0]


def test_on_the_test_host_the_eleventh_call_is_rejected_with_a_time_to_retry(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon("workers = 2", CPAN_BRIDGE_OVERLOAD="reject", **TEST).run()
    for _ in range(10):
        daemon.call("test", "echo", True)
    reply = one_shot(daemon.path, "test", "echo")
    assert reply["error_type"] == "Overloaded"
    assert 0 < reply["retry_after"] <= 60
