"""What the master passes to a process that it forks, and the messages between the two.

This is the whole contract between them, besides the shared memory: to the master a worker is "a
function that is called with a WorkerContext", and a template likewise. So nothing in the master
imports what they are made of.

A template and the master talk over a pair of SOCK_SEQPACKET sockets, which keep messages apart. The
template reports each module that it is about to import, and once how its imports went. Then it
receives the number of a slot for each worker to
fork, with the descriptor of that worker's `report`, one of such a pair too. The worker writes its
pid there at first and waits for a byte: only then does the master know it, and handles whatever
becomes of it. Then it reports what it imports, and how its boot went.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.listener_box import ListenerBox
from cpanbridge.supervisor.memory.wakeups import Wakeups
from cpanbridge.supervisor.system.log_text import escaped, printable


class WorkerContext(NamedTuple):
    """What a worker receives. Descriptors stay the master's; the child has copies of them."""

    slot: int
    generation: int
    settings: Settings
    shared: Shared
    wakeups: Sequence[Wakeups]  # of all slots
    listeners: Sequence[socket.socket]
    lent: bool  # the listening sockets are the service manager's as well, and outlive the daemon
    lifeline: int  # reads end of file when the master is gone
    report: int  # where the worker writes its Reports
    opening: int  # an eventfd, readable from when the worker may accept; it is never read
    # An eventfd: written when the worker asks the master for something, in the shared memory. After
    # an upgrade it is an earlier master's; the present one looks there by itself, twice a second.
    wake_master: int
    reopen_logs: Callable[[], None]  # raises LogError
    listener_box: ListenerBox  # the listening sockets, once they are others than `listeners`


class TemplateContext(NamedTuple):
    """What a template receives."""

    worker: WorkerContext  # that of its workers, but for the slot and the report
    commands: socket.socket  # the template's end of the pair
    kept_out: Collection[str]  # modules that it must not import


class Report(msgspec.Struct):
    """What a worker imports now, or how its boot went: without `error` it is ready to accept."""

    importing: str | None = None  # the module, as errors name it; "": none any more
    error: str | None = None


class Imports(msgspec.Struct):
    """What a template imports now, or how its imports went.

    With an `error` or with `unfit` modules it is of no use.
    """

    importing: str | None = None  # the module, as errors name it
    error: str | None = None  # a module cannot be imported, in one line
    unfit: dict[str, str] = {}  # modules that left something that processes must not share: what
    shared: int = 0  # modules that it has imported


class Mains(NamedTuple):
    """What the processes of a daemon run. The functions do not return."""

    worker: Callable[[WorkerContext], None]
    template: Callable[[TemplateContext], None]
    command: str = "start"  # the subcommand that a master of other flags is started by


UNASSIGNED = -1  # slot and report of a context that no worker has yet
BEGIN = b"\0"

_LONGEST_MESSAGE = 1 << 20
_MAX_ERROR = 900  # characters; none takes more than 4 bytes as they are sent


def send_report(descriptor: int, error: str | None) -> None:
    """Called in the worker, once: it is ready, or it cannot boot."""
    _report(descriptor, Report(error=error and _one_line(error)))


def report_import(descriptor: int, label: str) -> None:
    """Called in the worker before each import, so that the master can name one that hangs."""
    _report(descriptor, Report(importing=_one_line(label)))


def _report(descriptor: int, report: Report) -> None:
    with contextlib.suppress(BrokenPipeError):  # the master is gone, as the lifeline tells too
        os.write(descriptor, msgspec.json.encode(report))


def read_report(data: bytes) -> Report | None:
    """Called in the master, with a message as it was read; None at the end of file."""
    return msgspec.json.decode(data, type=Report) if data else None


def tell_imports(commands: socket.socket, imports: Imports) -> None:
    """Called in a template: before each import, and once at the end."""
    for each in (name for name in ("importing", "error") if getattr(imports, name)):
        setattr(imports, each, _one_line(getattr(imports, each)))
    imports.unfit = {name: _one_line(reason) for name, reason in imports.unfit.items()}
    with contextlib.suppress(BrokenPipeError):  # the master is gone
        commands.send(msgspec.json.encode(imports))


def receive_imports(commands: socket.socket) -> Imports | None:
    """Called in the master; None when the template's end is closed without a message.

    Raises BlockingIOError.
    """
    try:
        data = commands.recv(_LONGEST_MESSAGE)
    except ConnectionResetError:  # it has left commands unread
        data = b""
    return msgspec.json.decode(data, type=Imports) if data else None


def send_command(commands: socket.socket, slot: int, report: int) -> None:
    """Called in the master: have the template fork a worker. Raises OSError."""
    socket.send_fds(commands, [str(slot).encode()], [report])


def receive_command(commands: socket.socket) -> tuple[int, int] | None:
    """Called in a template: wait for the next command, a slot and a report; None at the end."""
    data, descriptors, *_ = socket.recv_fds(commands, _LONGEST_MESSAGE, 1)
    if not data:
        return None
    os.set_inheritable(descriptors[0], False)
    return int(data), descriptors[0]


def wait_to_begin(report: int) -> bool:
    """Called in a worker that a template has forked; False when it is not needed any more."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(report, str(os.getpid()).encode())
        return os.read(report, len(BEGIN)) == BEGIN
    return False


def _one_line(text: str) -> str:
    text = escaped(printable(text))
    return text if len(text) <= _MAX_ERROR else text[:_MAX_ERROR] + "..."
