"""The resources that a daemon holds, and those that it leaves behind when it has ended."""

import contextlib
import os
from pathlib import Path

from conftest import Daemon

MEMORY = "/memfd:cpanbridged (deleted)"


def memory_of(daemon: Daemon) -> int:
    """The bytes of the daemon's shared memory."""
    for each in Path(f"/proc/{daemon.pid}/fd").iterdir():
        if os.readlink(each) == MEMORY:
            return 512 * each.stat().st_blocks
    raise AssertionError("it has none")


def users_of(folder: Path) -> list[int]:
    """Processes that have a file of a daemon's folder open, as all processes of a daemon have."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            links = Path(f"/proc/{pid}/fd").iterdir()
            if any(str(folder) in os.readlink(each) for each in links):
                found.append(int(pid))
    return found


def left_in(folder: Path) -> set[str]:
    """The files in a daemon's folder."""
    return {each.name for each in folder.iterdir()}
