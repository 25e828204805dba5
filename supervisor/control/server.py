"""The control socket's server: what the `cpanbridged` command asks the master.

It is a part of the master's loop, answered out of the shared memory and what the master knows, so
it works while the gate is shut, while every thread hangs, and while workers crash at their start. A
visitor sends one line of JSON and gets lines of JSON: what is waited for, as long as something is,
and at the end one result or error.

Nobody can hold the master up: nothing here waits for a visitor, and each has little room and little
time. Nor can anybody keep others out: of those that ask nothing, only watch, or have their answer,
the oldest makes room for who comes. Those that wait for a command's outcome stay; where they are
too many, a further command is refused and not begun, and an inquiry is answered all the same. In
each turn of the loop one visitor is let in, so a flood of them leaves time for everything else.

Who may not signal the master may not talk to it: only its own user and root are heard, by the
kernel's word for who they are. Called in the master.
"""

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from cpanbridge.supervisor.listening.listener import Listener
from cpanbridge.supervisor.system.event_loop import WRITE, Loop, Timer

LOGGER = logging.getLogger("cpanbridge.master")

MOST_IDLE = 16  # visitors that make room
MOST_WAITING = 64  # for the outcome of a command
WATCH = "watch"  # to be told the progress, until the master ends
_LONGEST_QUESTION = 4096  # bytes
_MOST_UNREAD = 1 << 20  # bytes of answers that a visitor has not taken
_ASK_SECONDS = 2.0
_TAKE_SECONDS = 10.0  # for an answer, once nothing more will follow
_PROGRESS_SECONDS = 0.2
_EXHAUSTED_SECONDS = 1.0
_UCRED = struct.Struct("3i")


class Question(msgspec.Struct):
    """What a visitor sends."""

    command: str


class Answer(msgspec.Struct, omit_defaults=True):
    """What it gets: `progress` any number of times, then one of the others."""

    progress: str | None = None
    result: Any = None
    error: str | None = None


Inquiry = Callable[[], Any]
Command = Callable[["ControlConnection"], None]


class ControlServer:
    """Listens, and keeps the visitors.

    `inquiries` are answered at once, by what they return; `commands` are begun, and tell the
    visitor when they have an outcome. `progress` says what the master is waiting for, if it is.
    """

    def __init__(
        self,
        loop: Loop,
        inquiries: Mapping[str, Inquiry],
        commands: Mapping[str, Command],
        progress: Callable[[], str | None],
    ) -> None:
        self.loop = loop
        self.inquiries = inquiries
        self.commands = commands
        self.progress = progress
        self._listener: socket.socket | None = None
        self._connections: dict[ControlConnection, None] = {}  # in the order in which they came
        self._pause: Timer | None = None

    def listen(self, listener: Listener) -> None:
        """Let visitors in here from now on, and nowhere else."""
        self.stop_listening()
        self._listener = listener.socket
        self._watch()

    def stop_listening(self) -> None:
        """Let nobody else in. To be called before the socket is closed."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        elif self._listener is not None:
            self.loop.forget(self._listener.fileno())
        self._listener = None

    @property
    def is_full(self) -> bool:
        """Whether too many would wait for an outcome with the one that asks now."""
        return sum(connection.waits for connection in self._connections) > MOST_WAITING

    def has_left(self, connection: "ControlConnection") -> None:
        """Called by a visitor that is closed."""
        del self._connections[connection]

    def _watch(self) -> None:
        self._pause = None
        assert self._listener is not None
        self.loop.watch(self._listener.fileno(), self._accept_next)

    def _accept_next(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: who waits goes on waiting
            LOGGER.error("The control socket cannot accept: %s", error.strerror)
            self.loop.forget(self._listener.fileno())
            self._pause = self.loop.after(_EXHAUSTED_SECONDS, self._watch)
            return
        client.setblocking(False)
        connection = ControlConnection(self, client)
        self._connections[connection] = None
        connection.receive()  # mostly it has asked by now, and nobody has to make room
        self._make_room()

    def _make_room(self) -> None:
        idle = [connection for connection in self._connections if not connection.waits]
        for connection in idle[: max(0, len(idle) - MOST_IDLE)]:
            connection.close()


class ControlConnection:
    """One connection to the control socket."""

    def __init__(self, server: ControlServer, client: socket.socket) -> None:
        self._server = server
        self._loop = server.loop
        self._socket = client
        self._asked = bytearray()
        self._question: str | None = None
        self._unsent = bytearray()
        self._told = ""
        self._last = False  # nothing follows what is unsent
        self._timer = self._loop.after(_ASK_SECONDS, self.close)
        self._loop.watch(client.fileno(), self.receive)

    @property
    def waits(self) -> bool:
        """Whether it is to be told the outcome of a command that was begun for it."""
        return self._question not in (None, WATCH) and not self._last

    def tell(self, progress: str) -> None:
        """What is being waited for; told once as long as it is the same."""
        if progress != self._told:
            self._told = progress
            self._send(Answer(progress=progress))

    def finish(self, result: Any) -> None:
        """It is done."""
        self._end(Answer(result=result))

    def fail(self, reason: str) -> None:
        """It is not done; one line that says why."""
        self._end(Answer(error=reason))

    def close(self) -> None:
        """Let go of the connection, whatever is unsent."""
        if self._socket.fileno() >= 0:
            self._timer.cancel()
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._server.has_left(self)

    def receive(self) -> None:
        """Hear what it has sent, if anything."""
        try:
            data = self._socket.recv(_LONGEST_QUESTION)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._question is not None:
            self.close()  # it has left, or sends more than its question
            return
        self._asked += data
        line, end, _ = self._asked.partition(b"\n")
        if end:
            self._ask(bytes(line))
        elif len(self._asked) >= _LONGEST_QUESTION:
            self.fail("the question is too long")

    def _ask(self, line: bytes) -> None:
        self._timer.cancel()
        try:
            self._question = msgspec.json.decode(line, type=Question).command
        except msgspec.MsgspecError as error:
            self._question = ""
            self.fail(f"not a question: {error}")
            return
        if not self._may_ask():
            return
        try:
            self._answer(self._question)
        except Exception:
            self.fail("a fault of the daemon's own; its log has more")
            raise
        if not self._last:
            self._tell_progress()

    def _answer(self, question: str) -> None:
        inquiries, commands = self._server.inquiries, self._server.commands
        if question in inquiries:
            self.finish(inquiries[question]())
        elif question in commands and self._server.is_full:
            self.fail(f"{MOST_WAITING} commands wait for their outcome already")
        elif question in commands:
            commands[question](self)
        elif question != WATCH:
            allowed = ", ".join(sorted({*inquiries, *commands, WATCH}))
            self.fail(f"there is no command {question!r}; there are {allowed}")

    def _may_ask(self) -> bool:
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            self.fail(f"user {uid} may not control this daemon")
            return False
        return True

    def _tell_progress(self) -> None:
        progress = self._server.progress()
        if progress is not None:
            self.tell(progress)
        if self._socket.fileno() >= 0:
            self._timer = self._loop.after(_PROGRESS_SECONDS, self._tell_progress)

    def _end(self, answer: Answer) -> None:
        if self._socket.fileno() < 0 or self._last:
            return
        self._last = True
        self._timer.cancel()
        self._timer = self._loop.after(_TAKE_SECONDS, self.close)
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        self._unsent += msgspec.json.encode(answer) + b"\n"
        self._write()

    def _write(self) -> None:
        if self._socket.fileno() < 0:
            return
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if len(self._unsent) > _MOST_UNREAD:
            self.close()
        elif self._last and not self._unsent:
            # Closed with bytes unread, it would get an error instead of the answer.
            with contextlib.suppress(OSError):
                self._socket.recv(_MOST_UNREAD)
            self.close()
        elif self._unsent:
            self._loop.watch(self._socket.fileno(), self._write, WRITE)
        else:
            self._loop.watch(self._socket.fileno(), self.receive)
