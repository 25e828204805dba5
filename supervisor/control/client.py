"""What the command does with a running daemon: find it, send it requests, stop it.

It is found by its lock and stopped by a signal, so both work whatever state it is in. Everything
else is a request at the control socket (see `server`), which the master itself answers. Called in
the `cpanbridged` command.
"""

import contextlib
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

from cpanbridge.supervisor.config import KILL_MARGIN, Settings
from cpanbridge.supervisor.control.server import Reply, Request
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import running_pid
from cpanbridge.supervisor.system import privileges

_STOP_MARGIN = 10.0
_CONNECT_SECONDS = 5.0
_TIMEVAL = struct.pack("ll", int(_CONNECT_SECONDS), 0)
_STATUS_SECONDS = 3.0
_POLL_SECONDS = 0.2

Show = Callable[[str], None]


class ControlError(Exception):
    """The master was not reached, or the command failed; one line that says why and what to do."""


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


class Exchange:
    """One request to the master, and its replies. Raises ControlError if it cannot be sent."""

    def __init__(self, settings: Settings, command: str) -> None:
        self._path = settings.sockets[0] + listener.CONTROL
        self._lines = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # With a full listen queue connect(2) waits for SO_SNDTIMEO. With Python's own timeout, for
        # which the descriptor is non-blocking, it would fail at once (EAGAIN).
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        try:
            self._socket.connect(self._path)
            self._socket.settimeout(_CONNECT_SECONDS)
            self._socket.sendall(msgspec.json.encode(Request(command)) + b"\n")
        except OSError as error:
            self._socket.close()
            raise ControlError(f"{self._path}: {error.strerror or error}") from None

    def close(self) -> None:
        """End the exchange."""
        self._socket.close()

    def fileno(self) -> int:
        """For poll(2): readable when there is a reply, or the end."""
        return self._socket.fileno()

    def receive(self) -> list[Reply] | None:
        """Wait for replies; None at the end."""
        try:
            data = self._socket.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        *lines, rest = bytes(self._lines + data).split(b"\n")
        self._lines = bytearray(rest)
        return [msgspec.json.decode(line, type=Reply) for line in lines]


def ask(settings: Settings, command: str, timeout: float | None, show: Show) -> Any:
    """The result of a command. `timeout` is in seconds between two replies; None: no limit.

    Raises ControlError, with the reason when the master refuses or fails; EndedError when it ends.
    """
    exchange = Exchange(settings, command)
    try:
        poll = select.poll()
        poll.register(exchange, select.POLLIN)
        while poll.poll(timeout * 1000 if timeout is not None else None):
            replies = exchange.receive()
            if replies is None:
                raise EndedError("the master hung up before it answered; its log may say why")
            for reply in replies:
                if reply.error is not None:
                    raise ControlError(reply.error)
                if reply.progress is None:
                    return reply.result
                show(reply.progress)
        raise ControlError(f"the master does not answer within {timeout:g} s")
    finally:
        exchange.close()


def wait_until_running(settings: Settings, show: Show) -> None:
    """Wait until a new master has taken over. Raises ControlError."""
    while ask(settings, "status", _STATUS_SECONDS, show)["state"] != "running":
        time.sleep(_POLL_SECONDS / 10)


def watch_until(descriptor: int, settings: Settings, show: Show, seconds: float = math.inf) -> bool:
    """Show the master's progress until a descriptor is readable; False: not in time."""
    until = time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    exchange: Exchange | None = None
    try:
        while (left := until - time.monotonic()) > 0:
            ready = [fd for fd, _ in poll.poll(min(_POLL_SECONDS, left) * 1000)]
            if descriptor in ready:
                return True
            if exchange is None:
                # A master that does not listen yet, or no longer: the descriptor will say so.
                with contextlib.suppress(ControlError):
                    exchange = Exchange(settings, "watch")
                    poll.register(exchange, select.POLLIN)
            elif ready:
                replies = exchange.receive()
                if replies is None:
                    poll.unregister(exchange)
                for reply in replies or ():
                    show(reply.progress or "")
        return False
    finally:
        if exchange is not None:
            exchange.close()


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
        _wait_for_end(handle, pid, settings, show)
    except PermissionError:
        raise ControlError(f"not allowed to stop pid {pid}: it is another user's") from None
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return pid


def numbers(settings: Settings) -> dict[str, Any] | None:
    """The master's numbers (see `reports.numbers`), whatever the workers do; None: none runs.

    Raises ControlError, ListenError, InstanceError, PrivilegeError.
    """
    if master_pid(settings) is None:
        return None
    result: dict[str, Any] = ask(settings, "metrics", _STATUS_SECONDS, lambda _: None)
    return result


def _wait_for_end(handle: int, pid: int, settings: Settings, show: Show) -> None:
    seconds = settings.limits.graceful_timeout + KILL_MARGIN + _STOP_MARGIN
    if not watch_until(handle, settings, show, seconds):
        raise ControlError(
            f"pid {pid} is still stopping after {seconds:g} s; kill -QUIT {pid} ends it at once"
        )


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
