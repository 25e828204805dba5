"""What the command does with a running daemon: find it, send it requests, stop it.

That a daemon runs is told by its lock, which works from any namespace. What is done with it is a
request at the control socket (see `server`), which the master itself answers. No process is
signalled because a file has its number. Where the master does not answer, the error says what an
operator can do. Called in the `cpanbridged` command.
"""

import contextlib
import io
import math
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from cpanbridge.supervisor.config import KILL_MARGIN, Limits, OperatorError
from cpanbridge.supervisor.control.peer import Peer, open_pidfd, peer_of
from cpanbridge.supervisor.control.server import STOP, WATCH, Reply, Request
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import is_locked, named_pid
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.supervisor.wording import explain

# Seconds.
_STOP_MARGIN = 10.0
_CONNECT_SECONDS = 5.0
_TIMEVAL = struct.pack("ll", int(_CONNECT_SECONDS), 0)
# For a master that has its lock to listen at its control socket: it does so next when it starts,
# and binds one anew that was removed.
_LISTEN_SECONDS = 3.0
_STATUS_SECONDS = 3.0
_POLL_SECONDS = 0.2
_EXIT_SECONDS = 5.0  # from giving its lock back to the end of the process

Show = Callable[[str], None]


class ControlError(OperatorError):
    """The master was not reached, or the command failed."""


class NotRunningError(ControlError):
    """No daemon runs there."""

    exit_status = 3


class NoAnswerError(ControlError):
    """A daemon runs there, and its master does not answer."""


class TooOldError(ControlError):
    """The running daemon is of a version that does not know the command."""


class EndedError(ControlError):
    """The master has ended, and the command's outcome is unknown."""


class Target(NamedTuple):
    """Where a daemon is to be found."""

    path: str  # a socket path that it serves
    owner: int | None = None  # the user whom it may belong to, besides root and this process's user

    @property
    def control(self) -> str:
        """The path of the control socket."""
        return self.path + listener.CONTROL

    def trusts(self, uid: int) -> bool:
        """Whether it may be this user's daemon."""
        return uid in (0, os.getuid(), self.owner)


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


def is_running(target: Target) -> bool:
    """Whether a daemon holds the path's lock. Raises ListenError, InstanceError.

    Only in a folder where no other user could have put the lock or the control socket.
    """
    if not os.path.isdir(os.path.dirname(os.path.abspath(target.path))):
        return False
    listener.prepare_folder(target.path, create=False, owner=target.owner)
    return is_locked(target.path, target.owner)


def _connect(target: Target, patience: float) -> socket.socket:
    """A connection to the master. Raises NotRunningError, NoAnswerError, ControlError."""
    until = time.monotonic() + patience
    while True:
        if not is_running(target):
            raise NotRunningError(f"not running at {target.path}")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # With a full listen queue connect(2) waits for SO_SNDTIMEO. With Python's own timeout, for
        # which the descriptor is non-blocking, it would fail at once (EAGAIN).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        try:
            connection.connect(target.control)
            connection.settimeout(_CONNECT_SECONDS)
            uid = peer_of(connection).uid
        except OSError as error:
            connection.close()
            gone = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            if not gone or time.monotonic() > until:
                problem = f"{target.control}: {explain(error)}"
                raise NoAnswerError(f"{problem}; {_what_to_do(target, None)}") from None
            time.sleep(_POLL_SECONDS / 10)
            continue
        if target.trusts(uid):
            return connection
        connection.close()
        raise ControlError(f"{target.control}: not trusted, because user {uid} listens there")


def _what_to_do(target: Target, peer: Peer | None) -> str:
    """What an operator can do about a master that does not answer."""
    pid = peer.pid if peer is not None else named_pid(target.path, target.owner)
    if not pid:
        return f"{target.path}.lock is held: fuser {target.path}.lock tells by which process"
    said = "the kernel names" if peer is not None else f"{target.path}.pid names"
    return (
        f"{said} pid {pid}: if `ps -p {pid}` shows its master, kill -CONT {pid} lets it go on when "
        f"it was stopped, and kill -QUIT {pid} ends it at once, with the calls that run"
    )


def _send(connection: socket.socket, target: Target, request: Request) -> None:
    try:
        connection.sendall(msgspec.json.encode(request) + b"\n")
    except OSError as error:
        raise ControlError(f"{target.control}: {explain(error)}") from None


def _next_reply(lines: io.RawIOBase | io.BufferedIOBase) -> Reply | None:
    """Wait for a reply; None at the end. Raises TimeoutError."""
    try:
        line = lines.readline()
    except ConnectionError:
        return None
    return msgspec.json.decode(line, type=Reply) if line.endswith(b"\n") else None


def ask(
    target: Target,
    request: str | Request,
    timeout: float | None,
    show: Show = lambda _: None,
    patience: float = _LISTEN_SECONDS,
) -> Any:
    """The result of a command. `timeout` is in seconds between two replies; None: no limit.

    Raises NotRunningError, NoAnswerError, ListenError, InstanceError; ControlError, with the reason
    when the master refuses or fails; EndedError when it ends.
    """
    with _connect(target, patience) as connection:
        asked = Request(request) if isinstance(request, str) else request
        return _ask(connection, target, asked, timeout, show)


def _ask(
    connection: socket.socket, target: Target, request: Request, timeout: float | None, show: Show
) -> Any:
    _send(connection, target, request)
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        try:
            while reply := _next_reply(lines):
                if reply.error is not None:
                    raise _error(request, reply.error)
                if reply.progress is None:
                    return reply.result
                show(reply.progress)
        except TimeoutError:
            raise NoAnswerError(
                f"the master does not answer within {timeout:g} s; "
                f"{_what_to_do(target, peer_of(connection))}"
            ) from None
    raise EndedError("the master hung up before it answered; its log may say why")


def _error(request: Request, reason: str) -> ControlError:
    if not reason.startswith("there is no command"):
        return ControlError(reason)
    return TooOldError(
        f"the running daemon is of another version, which has no {request.command}; "
        "stop it and start it"
    )


def wait_until_running(target: Target) -> dict[str, Any]:
    """Wait until a new master has replaced the last one's workers; returns its status.

    Raises NoAnswerError, ControlError, NotRunningError when it has ended.
    """
    while (state := describe(target))["state"] in ("upgrading", "restarting"):
        time.sleep(_POLL_SECONDS / 10)
    if "problem" in state:
        raise NoAnswerError(state["problem"])
    return state


def watch(
    target: Target, show: Show, over: Callable[[float], bool], seconds: float = math.inf
) -> bool:
    """Show the master's progress until something is over; False: not in time.

    `over` tells whether it is; it may wait for that as many seconds as it is called with.
    """
    until = time.monotonic() + seconds
    replies: io.RawIOBase | None = None
    with contextlib.ExitStack() as stack:
        while (left := until - time.monotonic()) > 0:
            if over(min(_POLL_SECONDS, left)):
                return True
            if replies is None:
                # A master that does not listen yet, or no longer, has nothing to show.
                with contextlib.suppress(OperatorError):
                    connection = stack.enter_context(_connect(target, 0.0))
                    _send(connection, target, Request(WATCH))
                    # Without a buffer: what has arrived and is not read keeps it readable.
                    replies = stack.enter_context(connection.makefile("rb", buffering=0))
            elif readable([replies.fileno()], 0):
                reply = _next_reply(replies)
                if reply is None:
                    replies = None
                else:
                    show(reply.progress or "")
    return False


def stop(target: Target, show: Show) -> str:
    """Stop the daemon and wait until it has ended; returns which process it was, in words.

    Raises NotRunningError, NoAnswerError, ControlError, ListenError, InstanceError.
    """
    began = time.monotonic()
    with _connect(target, _LISTEN_SECONDS) as connection:
        peer, handle = peer_of(connection), open_pidfd(connection)
        status = _ask(connection, target, Request("status"), _STATUS_SECONDS, show)
    name = peer.describe(status["pid"])

    def over(_: float) -> bool:
        time.sleep(_POLL_SECONDS / 10)
        if not is_running(target):
            return True
        ended = handle is None or bool(readable([handle], 0))
        return ended and _is_younger(target, began)

    try:
        _tell_to_stop(target, status["pid"] == peer.pid, handle)
        graceful = status.get("graceful_timeout", Limits().graceful_timeout)
        seconds = graceful + KILL_MARGIN + _STOP_MARGIN
        if not watch(target, show, over, seconds):
            advice = f"; kill -QUIT {peer.pid} ends it at once" if peer.pid else ""
            raise ControlError(f"{name} is still stopping after {seconds:g} s{advice}")
        if handle is not None:  # it has given its lock back, and exits
            readable([handle], _EXIT_SECONDS)
    finally:
        if handle is not None:
            os.close(handle)
    return name


def _tell_to_stop(target: Target, same_pid: bool, handle: int | None) -> None:
    """`handle` is a pidfd of who listens, opened before the master has told its pid.

    A master older than the request is sent a signal, provided that it is the process which the
    kernel names: `same_pid`.
    """
    try:
        ask(target, STOP, _STATUS_SECONDS)
    except (EndedError, NotRunningError):
        return  # meanwhile
    except TooOldError:
        if not same_pid or handle is None:
            raise ControlError(
                "the running daemon is too old for this command, and the kernel does not name its "
                "process; kill -TERM its master, `cpanbridged status` shows which"
            ) from None
        signal.pidfd_send_signal(handle, signal.SIGTERM)


def _is_younger(target: Target, began: float) -> bool:
    """Whether the daemon that runs has started since `began`, in CLOCK_MONOTONIC seconds.

    A service manager may start the next one before it was seen that the last one had ended.
    """
    try:
        status = ask(target, "status", _STATUS_SECONDS, patience=0.0)
    except ControlError:
        return False
    return bool(status["uptime_seconds"] < time.monotonic() - began)


def numbers(target: Target) -> dict[str, Any]:
    """The master's numbers (see `reports.answers`), whatever the workers do.

    Raises NotRunningError, NoAnswerError, ControlError, ListenError, InstanceError.
    """
    result: dict[str, Any] = ask(target, "metrics", _STATUS_SECONDS)
    return result


def describe(target: Target) -> dict[str, Any]:
    """The master's status. If it does not answer: the state `unresponsive`, and the `problem`.

    `pid` is the master's in this PID namespace, None when it has none there; `own_pid` is the one
    that it has in its own. Raises NotRunningError, ControlError, ListenError, InstanceError.
    """
    about: dict[str, Any] = {"running": True, "pid": None, "sockets": [target.path]}
    try:
        with _connect(target, _LISTEN_SECONDS) as connection:
            about["pid"] = peer_of(connection).pid or None
            status = _ask(connection, target, Request("status"), _STATUS_SECONDS, lambda _: None)
    except NoAnswerError as error:
        return {**about, "state": "unresponsive", "problem": str(error), "workers": []}
    return {**about, **status, "own_pid": status["pid"], "pid": about["pid"]}
