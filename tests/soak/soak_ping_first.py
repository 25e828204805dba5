"""Three minutes of clients that ping before each call, and take a daemon for dead that is silent.

As scripts do that were written for a daemon which they start themselves: the ping has two seconds.
Run by `make soak`, not by `make test`.
"""

import threading
import time

import pytest
from conftest import NewDaemon
from plain_client import one_shot

CLIENTS = 20
LIMIT = 300
SECONDS = 180


def test_no_ping_is_late_and_no_call_lost_while_the_rate_holds_all_clients_back(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon(f"workers = 4\nlimits.max_requests_per_minute = {LIMIT}").run()
    end = time.monotonic() + SECONDS
    pings: list[float] = []
    calls: list[bool] = []
    file = daemon.folder / "calls"

    def work(client: int) -> None:
        number = 0
        while time.monotonic() < end:
            began = time.monotonic()
            assert one_shot(daemon.path, "test", "ping", timeout=30)["success"]
            pings.append(time.monotonic() - began)
            number += 1
            body = [1000 * client + number, str(file)]
            reply = one_shot(daemon.path, "probe", "record", body, timeout=120)
            calls.append(reply["success"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = file.read_text().split()
    with capsys.disabled():
        print(f"\n  {len(pings)} pings, the slowest {max(pings):.3f} s; {len(calls)} calls")
    assert all(calls)
    assert len(pings) == len(calls) == len(done) == len(set(done))
    assert max(pings) < 1.0
    # The rate was used in each minute, and all clients had their share (at first, and when the
    # minute of that is over, whoever is the fastest has more).
    assert len(calls) >= LIMIT * SECONDS // 60 - CLIENTS
    shares = [sum(int(each) // 1000 == client for each in done) for client in range(CLIENTS)]
    assert max(shares) <= 1.5 * min(shares)
