"""What the master hands to a process that it forks, and what that tells back.

This is the whole contract between the two besides the shared memory: the master knows a worker only
as "a function that is run with a Place", and a template likewise, so nothing in the master imports
what they are made of.

The talk with a template goes over a pair of sockets that keeps messages apart (SOCK_SEQPACKET). It
says once how its imports went, and is then sent the number of a slot for each worker to fork, with
the descriptor that is the worker's `report`. There the worker says its pid at first, and waits for
a byte: only then the master knows it, and whatever becomes of it is told under its number.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.system.log_text import escaped, printable


class WorkerContext(NamedTuple):
    """A worker's place in the daemon. Descriptors stay the master's; the child has its copies."""

    slot: int
    generation: int
    settings: Settings
    shared: Shared
    wakeups: Sequence[Wakeups]  # of all slots
    listeners: Sequence[socket.socket]
    lent: bool  # the listening sockets are the service manager's as well, and outlive the daemon
    lifeline: int  # reads end of file when the master is gone
    report: int  # where the worker writes its Report, once
    opening: int  # an eventfd, readable from when the worker may accept; nobody reads it
    retirement_request: int  # an eventfd: written when the worker has put a plea into its slot
    reopen_logs: Callable[[], None]  # raises LogError


class TemplateContext(NamedTuple):
    """A template's place in the daemon."""

    worker: WorkerContext  # its workers' one, but for the slot and the report
    commands: socket.socket  # the template's end of the talk
    kept_out: Collection[str]  # modules that it must not import


class Report(msgspec.Struct):
    """What a worker says of its boot: `error` is None when it is ready to accept."""

    error: str | None = None


class Imports(msgspec.Struct):
    """What a template says of its imports. With an `error` or something `unfit` it is of no use."""

    error: str | None = None  # a module cannot be imported, in one line
    unfit: dict[str, str] = {}  # modules that left something that processes must not share: what
    shared: int = 0  # modules that it has imported


class Mains(NamedTuple):
    """The functions that the processes of a daemon run. They do not return."""

    worker: Callable[[WorkerContext], None]
    template: Callable[[TemplateContext], None]


UNASSIGNED = -1  # a place's slot and report, before it is anybody's
BEGIN = b"\0"

_PIPE_BUF = 4096  # a write of up to so many bytes to a pipe is atomic on Linux
_LONGEST_MESSAGE = 1 << 20
_MAX_ERROR = 900  # characters; none takes more than 4 bytes as they are sent


def send_report(descriptor: int, error: str | None) -> None:
    """Called in the worker, once: it is ready, or it cannot boot."""
    line = msgspec.json.encode(Report(_one_line(error) if error is not None else None))
    assert len(line) <= _PIPE_BUF
    with contextlib.suppress(BrokenPipeError):  # the master is gone; the lifeline tells as well
        os.write(descriptor, line)


def read_report(data: bytes) -> Report:
    """Called in the master, with what one read of the pipe gave."""
    return msgspec.json.decode(data, type=Report)


def tell_imports(commands: socket.socket, imports: Imports) -> None:
    """Called in a template, once."""
    error = _one_line(imports.error) if imports.error is not None else None
    unfit = {name: _one_line(reason) for name, reason in imports.unfit.items()}
    with contextlib.suppress(BrokenPipeError):  # the master is gone
        commands.send(msgspec.json.encode(Imports(error, unfit, imports.shared)))


def hear_imports(commands: socket.socket) -> Imports | None:
    """Called in the master; None when the template has said nothing, and its end is closed.

    Raises BlockingIOError.
    """
    try:
        data = commands.recv(_LONGEST_MESSAGE)
    except ConnectionResetError:  # it has left orders unread
        data = b""
    return msgspec.json.decode(data, type=Imports) if data else None


def send_command(commands: socket.socket, slot: int, report: int) -> None:
    """Called in the master: have the template fork a worker. Raises OSError."""
    socket.send_fds(commands, [str(slot).encode()], [report])


def receive_command(commands: socket.socket) -> tuple[int, int] | None:
    """Called in a template: wait for the next one, a slot and a report; None: there is none."""
    data, descriptors, *_ = socket.recv_fds(commands, _PIPE_BUF, 1)
    if not data:
        return None
    os.set_inheritable(descriptors[0], False)
    return int(data), descriptors[0]


def wait_to_begin(report: int) -> bool:
    """Called in a worker that a template has forked; False when it is not wanted any more."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(report, str(os.getpid()).encode())
        return os.read(report, len(BEGIN)) == BEGIN
    return False


def _one_line(text: str) -> str:
    text = escaped(printable(text))
    return text if len(text) <= _MAX_ERROR else text[:_MAX_ERROR] + "..."
