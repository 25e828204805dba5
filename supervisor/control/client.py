"""What the command does with a running daemon: find it, send it requests, stop it.

It is found by its lock and stopped by a signal, so both work whatever state it is in. Everything
else is a request at the control socket (see `server`), which the master itself answers. Called in
the `cpanbridged` command.
"""

import contextlib
import io
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil

from cpanbridge.supervisor.config import KILL_MARGIN, OperatorError, Settings
from cpanbridge.supervisor.control.server import Reply, Request
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import running_pid
from cpanbridge.supervisor.system import privileges
from cpanbridge.supervisor.wording import explain

_STOP_MARGIN = 10.0
_CONNECT_SECONDS = 5.0
_TIMEVAL = struct.pack("ll", int(_CONNECT_SECONDS), 0)
_STATUS_SECONDS = 3.0
_POLL_SECONDS = 0.2

Show = Callable[[str], None]


class ControlError(OperatorError):
    """The master was not reached, or the command failed."""


class EndedError(ControlError):
    """The master has ended, and the command's outcome is unknown."""


@contextlib.contextmanager
def shown_progress() -> Iterator[Show]:
    """On a terminal: one line on standard error with the progress, erased at the end."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return

    def show(text: str) -> None:
        width = os.get_terminal_size(2).columns if os.isatty(2) else 80
        sys.stderr.write("\r\x1b[K" + text[: width - 1])
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _request(settings: Settings, command: str) -> socket.socket:
    """A connection to the master, with the request sent. Raises ControlError."""
    path = settings.sockets[0] + listener.CONTROL
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # With a full listen queue connect(2) waits for SO_SNDTIMEO. With Python's own timeout, for
    # which the descriptor is non-blocking, it would fail at once (EAGAIN).
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
    try:
        connection.connect(path)
        connection.settimeout(_CONNECT_SECONDS)
        connection.sendall(msgspec.json.encode(Request(command)) + b"\n")
    except OSError as error:
        connection.close()
        raise ControlError(f"{path}: {explain(error)}") from None
    return connection


def _next_reply(lines: io.RawIOBase | io.BufferedIOBase) -> Reply | None:
    """Wait for a reply; None at the end. Raises TimeoutError."""
    try:
        line = lines.readline()
    except ConnectionError:
        return None
    return msgspec.json.decode(line, type=Reply) if line.endswith(b"\n") else None


def ask(settings: Settings, command: str, timeout: float | None, show: Show) -> Any:
    """The result of a command. `timeout` is in seconds between two replies; None: no limit.

    Raises ControlError, with the reason when the master refuses or fails; EndedError when it ends.
    """
    with _request(settings, command) as connection, connection.makefile("rb") as lines:
        connection.settimeout(timeout)
        try:
            while reply := _next_reply(lines):
                if reply.error is not None:
                    raise ControlError(reply.error)
                if reply.progress is None:
                    return reply.result
                show(reply.progress)
        except TimeoutError:
            raise ControlError(f"the master does not answer within {timeout:g} s") from None
    raise EndedError("the master hung up before it answered; its log may say why")


def wait_until_running(settings: Settings, show: Show) -> None:
    """Wait until a new master has taken over. Raises ControlError."""
    while ask(settings, "status", _STATUS_SECONDS, show)["state"] != "running":
        time.sleep(_POLL_SECONDS / 10)


def watch_until(descriptor: int, settings: Settings, show: Show, seconds: float = math.inf) -> bool:
    """Show the master's progress until a descriptor is readable; False: not in time."""
    until = time.monotonic() + seconds
    replies: io.RawIOBase | None = None
    watched: list[int | io.RawIOBase] = [descriptor]
    with contextlib.ExitStack() as stack:
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select(watched, [], [], min(_POLL_SECONDS, left))
            if descriptor in ready:
                return True
            if replies is None:
                # A master that does not listen yet, or no longer: the descriptor will say so.
                with contextlib.suppress(ControlError):
                    connection = stack.enter_context(_request(settings, "watch"))
                    # Without a buffer: what has arrived and is not read keeps it readable.
                    replies = stack.enter_context(connection.makefile("rb", buffering=0))
                    watched.append(replies)
            elif ready:
                reply = _next_reply(replies)
                if reply is None:
                    watched.remove(replies)
                else:
                    show(reply.progress or "")
    return False


def master_pid(settings: Settings) -> int | None:
    """The running master's pid, from files that no other user could have created.

    None if none runs. Raises ListenError, InstanceError, PrivilegeError.
    """
    path = settings.sockets[0]
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return None
    identity = privileges.identity(settings)
    owner = identity.uid if identity is not None else None
    listener.prepare_folder(path, create=False, owner=owner)
    return running_pid(path, owner)


def stop(settings: Settings, show: Show) -> int | None:
    """Stop the daemon and wait until it has ended; returns its pid, None if none runs.

    Raises ControlError, ListenError, InstanceError.
    """
    path = settings.sockets[0]
    pid = master_pid(settings)
    if pid is None:
        return None
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid  # it has just ended
    try:
        # The pid may have been given to another process before the handle was opened.
        if master_pid(settings) != pid:
            raise ControlError(f"the daemon at {path} changed meanwhile; try again")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        seconds = settings.limits.graceful_timeout + KILL_MARGIN + _STOP_MARGIN
        if not watch_until(handle, settings, show, seconds):
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


def numbers(settings: Settings) -> dict[str, Any] | None:
    """The master's numbers (see `reports.answers`), whatever the workers do; None: none runs.

    Raises ControlError, ListenError, InstanceError, PrivilegeError.
    """
    if master_pid(settings) is None:
        return None
    result: dict[str, Any] = ask(settings, "metrics", _STATUS_SECONDS, lambda _: None)
    return result


def describe(pid: int, settings: Settings) -> dict[str, Any] | None:
    """The master's status, and what the kernel knows of the processes.

    None when the master has ended meanwhile. If it does not answer there is only what the kernel
    knows, with the state `unresponsive` and the `problem`.
    """
    try:
        status = ask(settings, "status", _STATUS_SECONDS, lambda _: None)
    except ControlError as error:
        status = {"state": "unresponsive", "problem": str(error), "workers": []}
    templates = {each["pid"] for each in status.get("templates", ())}
    known = {each["pid"]: each for each in status.pop("workers")}
    workers = []
    try:
        master = psutil.Process(pid)
        # Workers that an earlier master has forked are not this one's children.
        children = {child.pid for child in master.children()} - templates
        for worker in children | known.keys() - {0}:
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(psutil.Process(worker).cmdline()).strip()
                title = title.removeprefix("cpanbridged: ")
                workers.append({"pid": worker, "title": title, **known.get(worker, {})})
        uptime = max(0.0, time.time() - master.create_time())
    except psutil.NoSuchProcess:
        return None
    return {
        "running": True,
        "pid": pid,
        "uptime_seconds": uptime,
        "sockets": settings.sockets,
        **status,
        "workers": sorted(workers, key=lambda each: each["title"]),
    }
