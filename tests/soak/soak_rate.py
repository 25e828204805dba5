"""Two minutes of more calls than the rate limit: it is exact in every minute, wherever it starts.

Run by `make soak`, not by `make test`.
"""

import json
import threading
import time

import pytest
from conftest import NewDaemon
from plain_client import Framed, one_shot

LIMIT = 120
SECONDS = 130
CLIENTS = 30
MINUTE_NS = 60 * 10**9


def test_no_minute_has_more_than_the_limit_for_two_minutes(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three workers, thirty clients of both forms that call as fast as they can.

    A call is admitted between its sending and the time stamp that its function writes, so the k-th
    admission is never before the k-th sending, nor after the k-th time stamp (both sorted).
    """
    daemon = new_daemon(f"workers = 3\nlimits.max_requests_per_minute = {LIMIT}").run()
    file = daemon.folder / "stamps"
    end = time.monotonic() + SECONDS
    sent: list[int] = []
    replies: list[bool] = []

    def call_one_shot() -> None:
        while time.monotonic() < end:
            sent.append(time.monotonic_ns())
            reply = one_shot(daemon.path, "probe", "stamp", [str(file)], timeout=120)
            replies.append(reply["success"])

    def call_framed() -> None:
        with Framed(daemon.path, timeout=120) as client:
            while time.monotonic() < end:
                sent.append(time.monotonic_ns())
                reply = client.call("probe", "stamp", [str(file)])
                replies.append(reply is not None and reply["success"])

    threads = [
        threading.Thread(target=call_framed if number % 2 else call_one_shot)
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 120)
    stamps = sorted(map(int, file.read_text().split()))
    assert len(stamps) == len(sent) == len(replies)
    assert all(replies)
    sent.sort()
    for earlier, later in zip(sent, stamps[LIMIT:], strict=False):
        assert later - earlier > MINUTE_NS
    # And the limit was used fully: each permit again as soon as it was free.
    late = [b - a - MINUTE_NS for a, b in zip(stamps, stamps[LIMIT:], strict=False)]
    with capsys.disabled():
        told = {
            "calls": len(stamps),
            "least_over_a_minute_ms": min(late) / 1e6,
            "most_over_a_minute_ms": max(late) / 1e6,
        }
        print(f"\n  {json.dumps(told)}")
    assert len(stamps) >= LIMIT * (SECONDS // 60)
    assert max(late) < 2e9
