"""Calls with a time limit: their clients are answered in time, and the log says where they hang.

A thread cannot be stopped from outside. So when a call's time is over, the main thread answers its
client, writes the thread's stack to the log, and asks the master to retire the worker: other calls
finish, a replacement starts, and the call ends with the process. If it returns before that, its
result is dropped, because its client has an answer already.

An answered call takes no room from others. Its request's and its connection's room are given back
at once, not when its thread returns or its worker exits, which may take `graceful_timeout` and
more.

A call without a limit costs nothing here. While there are some with one, the main thread checks
every `_CHECK_SECONDS`; there is no timer for each. A call that never releases the interpreter lock,
in a C library, keeps the main thread from checking as well. So the worker's slot has the earliest
deadline of its calls, and the master acts when it has passed (processes/watchdog.py).
"""

import logging
import os
import sys
import threading
import time
import traceback
from types import FrameType

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import Slot
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules import registry
from cpanbridge.workers.protocol import framing, replies
from cpanbridge.workers.protocol.requests import Request

LOGGER = logging.getLogger("cpanbridge.worker")

_CHECK_SECONDS = 0.05


class AnsweredError(OSError):
    """The client was answered that its call takes too long, and must receive nothing more."""


class Running:
    """A call that runs. Times are CLOCK_MONOTONIC nanoseconds, 0: none."""

    __slots__ = (
        "answered",
        "client",
        "deadline",
        "function",
        "limit",
        "request",
        "slow_at",
        "started",
        "thread",
    )

    def __init__(
        self,
        request: Request,
        function: int,
        client: ClientSocket,
        limit: float,
        seconds: float,
        slow: float,
    ) -> None:
        self.request = request
        self.function = function  # its index in the table of names
        self.client = client
        self.limit = limit  # seconds, as configured or requested; some may have passed already
        self.started = time.monotonic_ns()
        self.deadline = self.started + int(seconds * 1e9) if seconds else 0
        self.slow_at = self.started + int(slow * 1e9) if slow else 0
        self.thread = threading.get_ident()
        self.answered = False  # by CallTimeouts; written under its lock

    def describe(self) -> str:
        """The call's names and request, for the log."""
        request = self.request
        return (
            f"{request.module}.{request.function} "
            f"(request {request.request_id or 'without id'} "
            f"of {request.perl_caller or 'an unknown caller'})"
        )


class CallTimeouts:
    """One worker's running calls. Writing the eventfd `wake` makes the main thread call `check`.

    Calls are logged once when they take longer than `slow` seconds; 0.0: never.
    """

    def __init__(self, worker: int, slot: Slot, slow: float, wake: int, gate: Gate) -> None:
        self._worker = worker
        self._slot = slot
        self._slow = slow
        self._wake = wake
        self._gate = gate
        self._lock = threading.Lock()
        self._running: set[Running] = set()
        self._first: Running | None = None  # the one with the earliest deadline, as in the slot
        self._is_scheduled = False  # the main thread calls `check` again by itself
        self.hangs = False  # a call has not ended in its time: the worker must be retired

    def begin(
        self, request: Request, function: int, client: ClientSocket, limit: float, seconds: float
    ) -> Running | None:
        """A call starts that may take `seconds`, 0.0: any time; None when it needs no watching.

        `limit` is the time for the client's answer, see `Running.limit`. Called in the call's
        thread.
        """
        if not seconds and not self._slow:
            return None
        running = Running(request, function, client, limit, seconds, self._slow)
        deadline = running.deadline
        with self._lock:
            self._running.add(running)
            first = self._first
            if deadline and (first is None or deadline < first.deadline):
                self._first = running
                self._slot.call_function = function  # before the deadline, which makes it valid
                self._slot.call_deadline = deadline
            scheduled, self._is_scheduled = self._is_scheduled, True
        if not scheduled:
            os.eventfd_write(self._wake, 1)
        return running

    def end(self, running: Running) -> bool:
        """The call has returned; False when its client was answered. Called in its thread."""
        with self._lock:
            self._running.discard(running)
            if running is self._first:
                self._find_first()
            return not running.answered

    def _find_first(self) -> None:
        """Find the earliest deadline, and put it into the slot. Called under the lock."""
        first = None
        for each in self._running:
            if each.deadline and (first is None or each.deadline < first.deadline):
                first = each
        self._first = first
        if first is None:
            self._slot.call_deadline = 0
        else:
            self._slot.call_function = first.function
            self._slot.call_deadline = first.deadline

    def check(self) -> float | None:
        """Answer calls whose time is over, and log them and slow ones.

        Returns in how many seconds to call it again; None when no call is watched. Called in the
        worker's main thread.
        """
        now = time.monotonic_ns()
        with self._lock:
            if not self._running:
                self._is_scheduled = False
                return None
            overdue = [each for each in self._running if each.deadline and each.deadline <= now]
            # Under the lock until all are answered: a thread whose call returns now waits in `end`,
            # and closes the connection after that.
            for each in overdue:
                self._give_up(each)
            if overdue:
                self._find_first()
            slow = [each for each in self._running if each.slow_at and each.slow_at <= now]
            for each in slow:
                each.slow_at = 0
        frames = sys._current_frames() if overdue or slow else {}
        for each in overdue:
            self._log(logging.ERROR, each, now, "and is given up", frames.get(each.thread))
            self.hangs = True
        for each in slow:
            self._log(logging.WARNING, each, now, "and goes on", frames.get(each.thread))
        return _CHECK_SECONDS

    def _give_up(self, running: Running) -> None:
        """Answer a call's client and give its room back, once: its thread learns that in `end`."""
        running.answered = running.client.released = True
        running.deadline = running.slow_at = 0
        try:
            self._answer(running)
        finally:
            self._gate.finished(succeeded=False)
            self._gate.closed()

    def _answer(self, running: Running) -> None:
        """Answer in place of the thread that hangs, without waiting for the client."""
        request = running.request
        what = f"{request.module}.{request.function} did not return within {running.limit:g} s"
        message = f"{what}; it may still run"
        reply = replies.encode_failure(message, "RequestTimeout", request.request_id)
        if running.client.framed:
            reply = framing.to_frame(reply) + framing.NO_MORE_REQUESTS
        else:
            reply = replies.to_ascii(reply)
        running.client.send_last(reply)

    def _log(
        self, level: int, running: Running, now: int, what: str, frame: FrameType | None
    ) -> None:
        LOGGER.log(
            level,
            "Worker %d: %s has been running for %.1f s %s%s",
            self._worker,
            running.describe(),
            (now - running.started) / 1e9,
            what,
            "; it is at" if frame is not None else "",
            extra={"trace": _stack(frame)},
        )


def _stack(frame: FrameType | None) -> str:
    """A thread's stack, from the module's function on."""
    if frame is None:
        return ""
    lines = traceback.extract_stack(frame)
    ours = [number for number, each in enumerate(lines) if each.filename == registry.__file__]
    theirs = lines[ours[-1] + 1 :] if ours else lines
    return "".join(traceback.format_list(theirs)).rstrip()
