"""Which process a client is: as the kernel says, and never mistaken for a later one."""

import os
import subprocess

from cpanbridge.workers.client.identity import start_time


def test_a_process_keeps_its_start_time_and_has_none_once_it_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        start = start_time(process.pid)
        assert start is not None
        assert start >= (start_time(os.getpid()) or 0)
        assert start_time(process.pid) == start
        process.kill()
    assert start_time(process.pid) is None
