"""Calls with a time limit: their clients are answered in time, and the log says where they hang.

A thread cannot be stopped from outside. So when a call's time is over, the main thread answers its
client, logs the thread's stack, and asks the master to retire the worker: other calls finish, a
replacement starts, and the call ends with the process. If it returns before that, its result is
dropped. Its request's and its connection's room are given back at once: until its worker exits may
take `graceful_timeout` and more.

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
from dataclasses import dataclass, field
from types import FrameType

import msgspec

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.fields import Slot
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules import registry
from cpanbridge.workers.protocol import framing, replies
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request

LOGGER = logging.getLogger("cpanbridge.worker")

_CHECK_SECONDS = 0.05


class Running(msgspec.Struct, eq=False):
    """A call that runs. Times are CLOCK_MONOTONIC nanoseconds, 0: none."""

    request: Request
    function: int  # its index in the table of names
    client: ClientSocket
    limit: float  # seconds, as configured or requested; some may have passed already
    started: int
    deadline: int
    slow_at: int
    thread: int = msgspec.field(default_factory=threading.get_ident)
    answered: bool = False  # by CallTimeouts; written under its lock


@dataclass(eq=False)
class CallTimeouts:
    """One worker's running calls. Writing the eventfd `wake` makes the main thread call `check`.

    Calls are logged once when they take longer than `slow` seconds; 0.0: never.
    """

    worker: int
    slot: Slot
    slow: float
    wake: int
    gate: Gate
    hangs: bool = False  # a call has not ended in its time: the worker must be retired
    _running: set[Running] = field(default_factory=set)
    _first: Running | None = None  # the one with the earliest deadline, as in the slot
    _is_scheduled: bool = False  # the main thread calls `check` again by itself
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(
        self, request: Request, function: int, client: ClientSocket, limit: float, seconds: float
    ) -> Running | None:
        """A call starts that may take `seconds`, 0.0: any time; None when it needs no watching.

        `limit`: see `Running.limit`. Called in the call's thread.
        """
        if not seconds and not self.slow:
            return None
        now = time.monotonic_ns()
        deadline = now + int(seconds * 1e9) if seconds else 0
        slow_at = now + int(self.slow * 1e9) if self.slow else 0
        running = Running(request, function, client, limit, now, deadline, slow_at)
        with self._lock:
            self._running.add(running)
            if deadline and (self._first is None or deadline < self._first.deadline):
                self._put_first(running)
            scheduled, self._is_scheduled = self._is_scheduled, True
        if not scheduled:
            os.eventfd_write(self.wake, 1)
        return running

    def end(self, running: Running) -> bool:
        """The call has returned; False when its client was answered. Called in its thread."""
        with self._lock:
            self._running.discard(running)
            if running is self._first:
                self._find_first()
            if running.answered:
                self.gate.given_up -= 1
            return not running.answered

    def _find_first(self) -> None:
        limited = (each for each in self._running if each.deadline)
        self._put_first(min(limited, key=lambda each: each.deadline, default=None))

    def _put_first(self, first: Running | None) -> None:
        """Put the earliest deadline into the slot. Called under the lock."""
        self._first = first
        if first is not None:
            self.slot.call_function = first.function  # before the deadline, which makes it valid
        self.slot.call_deadline = 0 if first is None else first.deadline

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
            self._log(logging.ERROR, each, "and is given up", frames.get(each.thread))
            self.hangs = True
        for each in slow:
            self._log(logging.WARNING, each, "and goes on", frames.get(each.thread))
        return _CHECK_SECONDS

    def _give_up(self, running: Running) -> None:
        """Answer a call's client and give its room back, once: its thread learns that in `end`.

        Answers in place of the thread that hangs, without waiting for the client.
        """
        client, request = running.client, running.request
        running.answered = client.released = True
        running.deadline = running.slow_at = 0
        what = f"{request.module}.{request.function} did not return within {running.limit:g} s"
        message = f"{what}; it may still run"
        try:
            reply = replies.encode_failure(Refusal("RequestTimeout", message, request.request_id))
            if client.framed:
                client.send_last(framing.to_frame(reply) + framing.NO_MORE_REQUESTS)
            else:
                client.send_last(replies.to_ascii(reply))
        finally:
            self.gate.given_up += 1  # first: its thread is not free
            self.gate.release_request(succeeded=False)
            self.gate.release_connection()

    def _log(self, level: int, running: Running, what: str, frame: FrameType | None) -> None:
        request = running.request
        LOGGER.log(
            level,
            "Worker %d: %s.%s (request %s of %s) has been running for %.1f s %s%s",
            self.worker,
            request.module,
            request.function,
            request.request_id or "without id",
            request.perl_caller or "an unknown caller",
            (time.monotonic_ns() - running.started) / 1e9,
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
