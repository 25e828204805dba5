"""The control socket's server: what the `cpanbridged` command asks the master.

It is a part of the master's loop and replies from the shared memory and the master's own state. So
it works while the gate is closed, while every thread hangs, and while workers crash at their start.
A client sends one line of JSON. It receives lines of JSON: progress, while the master waits for
something, and at the end one result or error.

No client can hold the master up: nothing here waits for a client, and each has little room and
little time. No client can keep others out: of the connections that have sent no request, only
watch, or have their reply, the oldest of the process that has most is closed when there are too
many. A connection that waits for a command's outcome stays; where these are too many, a further
command is refused and not begun, and an inquiry is answered all the same. Each turn of the loop
accepts one client, so a flood of them leaves time for everything else.

A user who may not signal the master may not use this socket: only the master's own user and root
may, by the credentials that the kernel gives (SO_PEERCRED, unix(7)). Called in the master.
"""

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from cpanbridge.supervisor.control.peer import peer_of
from cpanbridge.supervisor.system.event_loop import WRITE, Loop
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

MOST_IDLE = 16  # connections that wait for no outcome
MOST_WAITING = 64  # connections that wait for the outcome of a command
WATCH = "watch"  # a request for the progress, until the master ends
STOP = "stop"  # answered at once; the daemon has ended when its lock is free
_LONGEST_REQUEST = 4096  # bytes
_MOST_UNREAD = 1 << 20  # bytes of replies that a client has not read
_REQUEST_SECONDS = 2.0  # for a client to send its request
_READ_SECONDS = 10.0  # for a client to read the last reply
_PROGRESS_SECONDS = 0.2
_EXHAUSTED_SECONDS = 1.0


class Request(msgspec.Struct, omit_defaults=True):
    """What a client sends."""

    command: str
    # For `restart`: flags for the new master, besides those of the running one; with a working
    # folder, in their place.
    arguments: list[str] = []
    folder: str | None = None


class Reply(msgspec.Struct, omit_defaults=True):
    """What it receives: `progress` any number of times, then one of the others."""

    progress: str | None = None
    result: Any = None
    error: str | None = None


Inquiry = Callable[[], Any]
Command = Callable[["ControlConnection"], None]


@dataclass
class ControlServer:
    """Listens beside each of the daemon's paths, and owns the connections.

    `inquiries` are answered at once, with what they return. `commands` are begun; they call the
    connection's `finish` or `fail` when they have an outcome. `progress` returns what the master
    waits for, None when it waits for nothing.
    """

    loop: Loop
    inquiries: Mapping[str, Inquiry]
    commands: Mapping[str, Command]
    progress: Callable[[], str | None]
    # The oldest first.
    connections: "list[ControlConnection]" = field(default_factory=list, init=False)
    _listening: list[socket.socket] = field(default_factory=list, init=False)

    def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept clients on these sockets from now on, and on no others."""
        self.stop_listening()
        self._listening = list(sockets)
        for each in self._listening:
            self._watch(each)

    def stop_listening(self) -> None:
        """Accept no more clients. To be called before the sockets are closed."""
        for each in self._listening:
            self.loop.forget(each.fileno())
        self._listening = []

    @property
    def is_full(self) -> bool:
        """Whether too many would wait for an outcome, counting the one whose request is handled."""
        return sum(connection.waits for connection in self.connections) > MOST_WAITING

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._listening:
            self.loop.watch(listening.fileno(), partial(self._accept_next, listening))

    def _accept_next(self, listening: socket.socket) -> None:
        try:
            client, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: clients wait in the listen queue
            LOGGER.error("The control socket cannot accept: %s", explain(error))
            self.loop.forget(listening.fileno())
            self.loop.after(_EXHAUSTED_SECONDS, partial(self._watch, listening))
            return
        client.setblocking(False)
        connection = ControlConnection(self, client)
        self.connections.append(connection)
        connection.receive()  # mostly its request is there, and no other has to be closed
        self._make_room()

    def _make_room(self) -> None:
        """Close the oldest idle connection of the process that has most, until there is room.

        A client may take its time from connecting to sending its request, on a busy machine many
        times as long as a flood of other connections takes to fill all places.
        """
        idle = [connection for connection in self.connections if not connection.waits]
        while len(idle) > MOST_IDLE:
            owners = Counter(connection.peer.pid for connection in idle)
            most = max(owners.values())
            oldest = next(each for each in idle if owners[each.peer.pid] == most)
            idle.remove(oldest)
            oldest.close()


class ControlConnection:
    """One connection to the control socket."""

    def __init__(self, server: ControlServer, client: socket.socket) -> None:
        self._server = server
        self._loop = server.loop
        self._socket = client
        self.peer = peer_of(client)
        self._received = bytearray()
        self._command: str | None = None
        self.request = Request("")
        self._unsent = bytearray()
        self._progress = ""
        self._last = False  # nothing follows what is unsent
        self._timer = self._loop.after(_REQUEST_SECONDS, self.close)
        self._loop.watch(client.fileno(), self.receive)

    @property
    def waits(self) -> bool:
        """Whether it waits for the outcome of a command that was begun for it."""
        return self._command not in (None, WATCH) and not self._last

    def finish(self, result: Any) -> None:
        """Send the result of its command."""
        self._end(Reply(result=result))

    def fail(self, reason: str) -> None:
        """Send the reason why its command failed: one line."""
        self._end(Reply(error=reason))

    def close(self) -> None:
        """Close the connection, whatever is unsent."""
        if self._socket.fileno() >= 0:
            self._timer.cancel()
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._server.connections.remove(self)

    def receive(self) -> None:
        """Read what it has sent, if anything."""
        try:
            data = self._socket.recv(_LONGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._command is not None:
            self.close()  # its end of the stream, or more than one request
            return
        self._received += data
        line, end, _ = self._received.partition(b"\n")
        if end:
            self._handle(bytes(line))
        elif len(self._received) >= _LONGEST_REQUEST:
            self.fail("the request is too long")

    def _handle(self, line: bytes) -> None:
        self._timer.cancel()
        self._command = ""
        try:
            self.request = msgspec.json.decode(line, type=Request)
        except msgspec.MsgspecError as error:
            self.fail(f"not a request: {error}")
            return
        if self.peer.uid not in (0, os.geteuid()):
            self.fail(f"user {self.peer.uid} may not control this daemon")
            return
        try:
            self._execute(self.request.command)
        except Exception:
            self.fail("a fault of the daemon's own; its log has more")
            raise
        if not self._last:
            self._send_progress()

    def _execute(self, command: str) -> None:
        self._command = command
        inquiries, commands = self._server.inquiries, self._server.commands
        if command in inquiries:
            self.finish(inquiries[command]())
        elif command in commands and self._server.is_full:
            self.fail(f"{MOST_WAITING} commands wait for their outcome already")
        elif command in commands:
            commands[command](self)
        elif command != WATCH:
            allowed = ", ".join(sorted({*inquiries, *commands, WATCH}))
            self.fail(f"there is no command {command!r}; there are {allowed}")

    def _send_progress(self) -> None:
        progress = self._server.progress()
        if progress is not None and progress != self._progress:
            self._progress = progress
            self._send(Reply(progress=progress))
        if self._socket.fileno() >= 0:
            self._timer = self._loop.after(_PROGRESS_SECONDS, self._send_progress)

    def _end(self, reply: Reply) -> None:
        if self._socket.fileno() < 0 or self._last:
            return
        self._last = True
        self._timer.cancel()
        self._timer = self._loop.after(_READ_SECONDS, self.close)
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self._unsent += msgspec.json.encode(reply) + b"\n"
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
            # Closed with bytes unread, the client would get ECONNRESET instead of the reply.
            with contextlib.suppress(OSError):
                self._socket.recv(_MOST_UNREAD)
            self.close()
        elif self._unsent:
            self._loop.watch(self._socket.fileno(), self._write, WRITE)
        else:
            self._loop.watch(self._socket.fileno(), self.receive)
