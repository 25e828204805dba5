"""Calls that may take only so long: their clients are told, and the log says where they hang.

A thread cannot be ended from outside. So when a call's time is over, the main thread answers its
client, writes to the log what the thread is at, and asks the master to retire the worker: other
calls finish, a replacement takes over, and what hangs ends with the process. If the call returns
after all, its result is dropped, for its client has had an answer.

An answered call takes no room from others: its request's and its connection's are given back at
once, not when its thread returns or its worker ends, which may take `graceful_timeout` and more.

A call without a limit costs nothing here. While there are some with one, the main thread looks
every `LOOK_SECONDS`; there is no alarm for each. A call that never gives up the interpreter lock,
in a C library, keeps the main thread from looking as well. So the worker's slot says which call's
time is over first, and the master looks whether it was looked after (supervisor/hangs.py).
"""

import logging
import os
import sys
import threading
import time
import traceback
from types import FrameType

from cpanbridge.supervisor.gate import Gate
from cpanbridge.supervisor.memory.layout import Slot
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules import registry
from cpanbridge.workers.protocol import messages
from cpanbridge.workers.protocol.messages import NO_MORE_REQUESTS, Request

LOGGER = logging.getLogger("cpanbridge.worker")

LOOK_SECONDS = 0.05


class AnsweredError(OSError):
    """The client has been told that its call takes too long: there is nothing more to say to it."""


class Running:
    """A call under way. Times are CLOCK_MONOTONIC nanoseconds, 0: none."""

    __slots__ = (
        *("answered", "deadline", "function", "limit", "client"),
        *("request", "slow_at", "started", "thread"),
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
        self.function = function  # its number in the table of names
        self.client = client
        self.limit = limit  # as it was set, of which some may have passed before the start
        self.started = time.monotonic_ns()
        self.deadline = self.started + int(seconds * 1e9) if seconds else 0
        self.slow_at = self.started + int(slow * 1e9) if slow else 0
        self.thread = threading.get_ident()
        self.answered = False  # by the watch; written under its lock

    def describe(self) -> str:
        """Which call it is, for the log."""
        request = self.request
        return (
            f"{request.module}.{request.function} "
            f"(request {request.request_id or 'without id'} "
            f"of {request.perl_caller or 'an unknown caller'})"
        )


class CallTimeouts:
    """One worker's watch. `wake` is an eventfd that makes the main thread call `look` soon."""

    def __init__(self, worker: int, slot: Slot, slow: float, wake: int, gate: Gate) -> None:
        self._worker = worker
        self._slot = slot
        self._slow = slow
        self._wake = wake
        self._gate = gate
        self._lock = threading.Lock()
        self._running: set[Running] = set()
        self._first: Running | None = None  # of those with a deadline; the slot says so too
        self._looking = False
        self.hangs = False  # a call has not ended in its time: the worker is to be retired

    def begin(
        self, request: Request, function: int, client: ClientSocket, limit: float, seconds: float
    ) -> Running | None:
        """A call starts that may take so many seconds, 0.0: any time. Called in its thread.

        `limit` is the time as its client is told it.
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
                self._slot.call_function = function  # before the time, which makes it valid
                self._slot.call_deadline = deadline
            looking, self._looking = self._looking, True
        if not looking:
            os.eventfd_write(self._wake, 1)
        return running

    def end(self, running: Running) -> bool:
        """It has returned; False when its client was answered meanwhile. Called in its thread."""
        with self._lock:
            self._running.discard(running)
            if running is self._first:
                self._find_first()
            return not running.answered

    def _find_first(self) -> None:
        """Say which call's time is over first, now that another one's is not. Under the lock."""
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

    def look(self) -> float | None:
        """Answer for calls whose time is over; returns in how many seconds to look again.

        None when there is nothing to look at. Called in the worker's main thread.
        """
        now = time.monotonic_ns()
        with self._lock:
            if not self._running:
                self._looking = False
                return None
            overdue = [each for each in self._running if each.deadline and each.deadline <= now]
            # Under the lock to the end: a thread whose call returns now closes the connection.
            for each in overdue:
                self._give_up(each)
            if overdue:
                self._find_first()
            slow = [each for each in self._running if each.slow_at and each.slow_at <= now]
            for each in slow:
                each.slow_at = 0
        frames = sys._current_frames() if overdue or slow else {}
        for each in overdue:
            self._tell(logging.ERROR, each, now, "and is given up", frames.get(each.thread))
            self.hangs = True
        for each in slow:
            self._tell(logging.WARNING, each, now, "and goes on", frames.get(each.thread))
        return LOOK_SECONDS

    def _give_up(self, running: Running) -> None:
        """Answer a call, and give its room back, once: its thread sees that in `end`."""
        running.answered = running.client.given_up = True
        running.deadline = running.slow_at = 0
        try:
            self._answer(running)
        finally:
            self._gate.finished(succeeded=False)
            self._gate.closed()

    def _answer(self, running: Running) -> None:
        """In the place of the thread that hangs, and without waiting for the client."""
        request = running.request
        what = f"{request.module}.{request.function} did not return within {running.limit:g} s"
        message = f"{what}; it may still run"
        reply = messages.encode_failure(message, "RequestTimeout", request.request_id)
        if running.client.framed:
            reply = messages.to_frame(reply) + NO_MORE_REQUESTS
        else:
            reply = messages.to_ascii(reply)
        running.client.say_last(reply)

    def _tell(
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
    """What a thread is at, from the module's function on."""
    if frame is None:
        return ""
    lines = traceback.extract_stack(frame)
    ours = [number for number, each in enumerate(lines) if each.filename == registry.__file__]
    theirs = lines[ours[-1] + 1 :] if ours else lines
    return "".join(traceback.format_list(theirs)).rstrip()
