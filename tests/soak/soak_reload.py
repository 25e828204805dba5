"""The cost of a reload: the time from SIGHUP to the new generation, and clients' latency meanwhile.

Run by `make soak`, not by `make test`; it needs an otherwise idle machine.
"""

import os
import signal
import time
from collections.abc import Sequence

import pytest
from conftest import Daemon, NewDaemon
from hammer import Hammer
from plain_client import until

RELOADS = 10
IMPORT_SECONDS = 0.5  # of the slowest module
MARGIN_SECONDS = 0.5


def reload_seconds(daemon: Daemon) -> float:
    """The seconds until the new generation serves and no old worker accepts."""
    before = daemon.log().count("Reloaded: ")
    began = time.monotonic()
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: daemon.log().count("Reloaded: ") > before)
    return time.monotonic() - began


def p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]


def test_a_new_generation_serves_half_a_second_after_its_imports(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon()
    folder = daemon.folder / "helpers"
    folder.mkdir()
    (folder / "slow.py").write_text(f"import time\ntime.sleep({IMPORT_SECONDS})\n")
    daemon.write_config(f'workers = 2\n[[module_dirs]]\npath = "{folder}"')
    daemon.run()
    took = [reload_seconds(daemon) for _ in range(RELOADS)]
    with capsys.disabled():
        print(f"\nreloads: {min(took) - IMPORT_SECONDS:.3f} to {max(took) - IMPORT_SECONDS:.3f} s")
        print("beyond the import of the slowest module")
    assert max(took) < IMPORT_SECONDS + MARGIN_SECONDS


def test_calls_take_at_most_three_times_as_long_while_it_reloads(
    new_daemon: NewDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = new_daemon("workers = 2\nlimits.max_requests_per_minute = 0").run()
    hammer = Hammer(daemon.path, one_shots=4, framed=4)
    try:
        time.sleep(5)
        before = hammer.times[:]
        for _ in range(RELOADS):
            reload_seconds(daemon)
            time.sleep(0.5)
        during = hammer.times[len(before) :]
    finally:
        hammer.stop()
    with capsys.disabled():
        print(f"\np99 {p99(before) * 1000:.2f} ms before, {p99(during) * 1000:.2f} ms with reloads")
    assert hammer.errors == []
    assert p99(during) <= 3 * p99(before)
