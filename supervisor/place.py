"""What the master hands to a worker that it forks, and what the worker tells back.

This is the whole contract between the two processes besides the shared memory: the master knows a
worker only as "a function that is run with a Place", so nothing in the master imports what workers
are made of.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Bells
from cpanbridge.supervisor.shared import Shared
from cpanbridge.supervisor.text import escaped, printable


class Place(NamedTuple):
    """A worker's place in the daemon. Descriptors stay the master's; the child has its copies."""

    slot: int
    generation: int
    settings: Settings
    shared: Shared
    bells: Sequence[Bells]  # of all slots
    listeners: Sequence[socket.socket]
    lent: bool  # the listening sockets are the service manager's as well, and outlive the daemon
    lifeline: int  # reads end of file when the master is gone
    report: int  # where the worker writes its Report, once
    opening: int  # an eventfd, readable from when the worker may accept; nobody reads it
    plea: int  # an eventfd: written when the worker has put a plea into its slot
    reopen_logs: Callable[[], None]  # raises LogError


class Report(msgspec.Struct):
    """What a worker says of its boot: `error` is None when it is ready to accept."""

    error: str | None = None


WorkerMain = Callable[[Place], None]

_PIPE_BUF = 4096  # a write of up to so many bytes to a pipe is atomic on Linux
_MAX_ERROR = 900  # characters; none takes more than 4 bytes as they are sent


def send_report(descriptor: int, error: str | None) -> None:
    """Called in the worker, once: it is ready, or it cannot boot."""
    if error is not None:
        error = escaped(printable(error))
        if len(error) > _MAX_ERROR:
            error = error[:_MAX_ERROR] + "..."
    line = msgspec.json.encode(Report(error))
    assert len(line) <= _PIPE_BUF
    with contextlib.suppress(BrokenPipeError):  # the master is gone; the lifeline tells as well
        os.write(descriptor, line)


def read_report(data: bytes) -> Report:
    """Called in the master, with what one read of the pipe gave."""
    return msgspec.json.decode(data, type=Report)
