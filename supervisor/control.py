"""What the command does to a running daemon from outside: find it, stop it, look at it.

The kernel is asked, not the daemon, so all of this works whatever state the daemon is in.
"""

import contextlib
import os
import select
import signal
import time
from typing import Any

import psutil

from cpanbridge.supervisor import listener
from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.instance import running_pid
from cpanbridge.supervisor.seats import KILL_MARGIN

_STOP_MARGIN = 10.0


class ControlError(Exception):
    """The daemon could not be stopped; one line that says why, and what to do."""


def master_pid(settings: Settings) -> int | None:
    """The running master's pid; believed only where nobody else could have put the files.

    None if none runs. Raises ListenError, InstanceError.
    """
    path = settings.sockets[0]
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return None
    listener.prepare_folder(path, create=False)
    return running_pid(path)


def stop(settings: Settings) -> int | None:
    """Stop the daemon and wait until it has ended; returns its pid, None if none runs.

    Raises ControlError, ListenError, InstanceError.
    """
    path = settings.sockets[0]
    pid = master_pid(settings)
    if pid is None:
        return None
    seconds = settings.limits.graceful_timeout + KILL_MARGIN + _STOP_MARGIN
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid  # it has ended this moment
    try:
        # The handle may be of another process, which has got the pid meanwhile.
        if master_pid(settings) != pid:
            raise ControlError(f"the daemon at {path} changed while it was looked at; try again")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise ControlError(
                f"pid {pid} is still stopping after {seconds:g} s; kill -QUIT {pid} ends it at once"
            )
    except PermissionError:
        raise ControlError(f"not allowed to stop pid {pid}: it is another user's") from None
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return pid


def describe(pid: int, settings: Settings) -> dict[str, Any] | None:
    """What the kernel knows of the daemon's processes, whatever state they are in."""
    workers = []
    try:
        master = psutil.Process(pid)
        for child in master.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline()).strip()
                workers.append({"pid": child.pid, "title": title.removeprefix("cpanbridged: ")})
        uptime = max(0.0, time.time() - master.create_time())
    except psutil.NoSuchProcess:
        return None
    return {
        "running": True,
        "pid": pid,
        "uptime_seconds": uptime,
        "sockets": settings.sockets,
        "workers": sorted(workers, key=lambda each: each["title"]),
    }
