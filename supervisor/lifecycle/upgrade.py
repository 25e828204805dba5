"""From one master to the next, of the code that is on disk now, without a gap.

The old master starts the new one as a child of its own, with the same command line. The new one
inherits every descriptor that makes up the daemon: the listening and control sockets, the locks,
the shared memory, the wake-ups, and the lifeline of the workers. Then:

1. The new master reads the configuration and boots a generation, as in a reload, in slots that the
   old one does not use, and sends `ready`.
2. The old master stands still from then on, and sends `yours`.
3. The new master checks that it holds the locks, writes its pid, takes the old workers over, and
   sends `mine`.
4. The old master exits, and the new one completes the reload.

Until step 3 the old master serves, and whatever goes wrong with the new one changes nothing. When
the old master dies, the new one, which has all that is needed, is the master at once, and completes
the reload when its generation has booted.

Here is what the two send each other: lines of JSON, over a pair of sockets. What each does with the
parts of its daemon is in `handover.py`, for the old master, and in `takeover.py`, for the new one.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.gate import Wakeups
from cpanbridge.supervisor.listening.sockets import HeldSockets
from cpanbridge.supervisor.memory.layout import LayoutError, Shared
from cpanbridge.supervisor.processes.pool import HeldPool
from cpanbridge.supervisor.system.event_loop import Loop

LOGGER = logging.getLogger("cpanbridge.master")

VARIABLE = "CPANBRIDGED_HANDOVER"  # in a new master's environment: its end of the pair
READY_SECONDS = 150.0  # more than a generation may take to boot: its template, then its workers
_END_SECONDS = 5.0  # for a new master to end after its `error`
_ESTATE_SECONDS = 30.0  # for the first message


class UpgradeError(Exception):
    """This process cannot take a daemon over; one line that says why."""


class Estate(msgspec.Struct):
    """What makes up a daemon: numbers of descriptors, and what is needed to use them."""

    pool: HeldPool
    sockets: HeldSockets
    generation: int  # the one in service

    def descriptors(self) -> list[int]:
        """The descriptors that the new master must inherit."""
        return self.pool.descriptors() + self.sockets.descriptors()


class Message(msgspec.Struct, omit_defaults=True):
    """What one sends to the other; one field is set."""

    estate: Estate | None = None  # old to new, first
    ready: bool = False  # new to old: the new generation has booted
    yours: bool = False  # old to new: the old master does nothing any more
    mine: int = 0  # new to old: the new master's pid is in the pid files, exit
    error: str | None = None  # new to old: there will be no new master


class Line:
    """One end of the pair, in a master's loop.

    `on_message` is called with each message of the other master, and with None when that has ended.
    """

    def __init__(
        self, loop: Loop, end: socket.socket, on_message: Callable[[Message | None], None]
    ) -> None:
        self._loop = loop
        self._end = end
        self._on_message = on_message
        self._received = bytearray()
        end.setblocking(False)
        loop.watch(end.fileno(), self._receive)

    def send(self, message: Message) -> None:
        """Send a message. The socket's buffer has room for all that are ever sent.

        When the other master has ended, `on_message` says so.
        """
        try:
            self._end.sendall(msgspec.json.encode(message) + b"\n")
        except OSError as error:
            LOGGER.error("The other master cannot be told: %s", error.strerror)

    def close(self) -> None:
        """Receive no more."""
        if self._end.fileno() >= 0:
            self._loop.forget(self._end.fileno())
            self._end.close()

    def _receive(self) -> None:
        try:
            data = self._end.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_message(None)
            return
        *lines, rest = bytes(self._received + data).split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            self._on_message(msgspec.json.decode(line, type=Message))


class Successor:
    """The new master, as the old one sees it. Called in the old master.

    `on_ready` is called when it could take over: the old master must stand still before it calls
    `hand_over`. `on_taken` is called with its pid when it has taken over, and the old master must
    exit. `on_failed` is called with the reason when there is no new master any more, and the old
    one goes on. That is when its process has ended: before, it might still write to the slots of
    its workers.
    """

    def __init__(
        self,
        loop: Loop,
        estate: Estate,
        on_ready: Callable[[], None],
        on_taken: Callable[[int], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Start it. Raises OSError."""
        ours, theirs = socket.socketpair()
        self._on_ready = on_ready
        self._on_taken = on_taken
        self._on_failed = on_failed
        try:
            self._process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                pass_fds=[theirs.fileno(), *estate.descriptors()],
                env={**os.environ, VARIABLE: str(theirs.fileno())},
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._line = Line(loop, ours, self._receive)
        self._loop = loop
        self._over = False
        self._reason: str | None = None  # why it cannot take over, as far as that is known
        late = f"the new master is not ready after {READY_SECONDS:g} s"
        self._limit = loop.after(READY_SECONDS, lambda: self._end(late))
        self._line.send(Message(estate=estate))

    def hand_over(self) -> None:
        """OnDone it that the old master stands still."""
        self._line.send(Message(yours=True))

    def give_up(self, reason: str) -> None:
        """Kill it, and do not wait for its end: the daemon stops."""
        if not self._over:
            self._end(reason)
            self._fail(reason)

    def ended(self, how: str) -> None:
        """Its process has ended, and the caller has waited for it."""
        self._process.returncode = 0
        self._fail(self._reason or f"the new master ended: {how}")

    def _receive(self, message: Message | None) -> None:
        if message is None or self._over:
            return  # it has ended, as SIGCHLD tells
        if message.ready:
            self._on_ready()
        elif message.mine:
            self._over = True
            self._limit.cancel()
            self._on_taken(message.mine)
            self._line.close()  # last: by that the new master knows that the old one is done
        elif message.error is not None:
            error = self._reason = message.error
            self._limit.cancel()
            self._limit = self._loop.after(_END_SECONDS, lambda: self._end(error))

    def _end(self, reason: str) -> None:
        """Kill it. It was not waited for yet, so the pid is still its own."""
        self._reason = reason
        os.kill(self.pid, signal.SIGKILL)

    def _fail(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._limit.cancel()
            self._line.close()
            self._on_failed(reason)


class Inherited(NamedTuple):
    """What a new master has inherited, opened."""

    estate: Estate
    shared: Shared
    wakeups: list[Wakeups]
    end: socket.socket  # of the pair


class Predecessor:
    """The old master, as the new one sees it. Called in the new master.

    `on_yours` is called once: when the old master stands still, which follows `ready`, or has
    ended, which may happen at any time. `on_gone` is called once, when it has ended: it sends
    nothing more, to the service manager neither.
    """

    def __init__(
        self,
        loop: Loop,
        end: socket.socket,
        on_yours: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._on_yours: Callable[[], None] | None = on_yours
        self._on_gone = on_gone
        self._gone = False
        self._line = Line(loop, end, self._receive)

    def ready(self) -> None:
        """The new generation has booted: ask for the daemon."""
        self._line.send(Message(ready=True))

    def refuse(self, reason: str) -> None:
        """OnDone it that there will be no new master, whatever happens to it from now on."""
        if not self._gone:
            self._line.send(Message(error=reason))
        self._line.close()

    def taken(self) -> None:
        """This master has taken over: let the old one exit."""
        if not self._gone:
            self._line.send(Message(mine=os.getpid()))

    def _receive(self, message: Message | None) -> None:
        gone = message is None
        self._gone = self._gone or gone
        if (message is None or message.yours) and self._on_yours is not None:
            on_yours, self._on_yours = self._on_yours, None
            if gone:
                LOGGER.error("The old master is gone: this one is the master now")
            on_yours()
        if gone:
            self._on_gone()


def inherit(descriptor: int) -> Inherited:
    """Receive the estate. Called once, before there is a loop. Raises UpgradeError."""
    os.set_inheritable(descriptor, False)
    end = socket.socket(fileno=descriptor)
    end.settimeout(_ESTATE_SECONDS)
    data = bytearray()
    try:
        while not data.endswith(b"\n"):
            piece = end.recv(65536)
            if not piece:
                raise UpgradeError("the old master is gone")
            data += piece
        estate = msgspec.json.decode(data, type=Message).estate
    except (OSError, msgspec.MsgspecError) as error:
        raise UpgradeError(f"the old master does not say what it has: {error}") from None
    if estate is None:
        raise UpgradeError("the old master does not say what it has")
    try:
        for each in estate.descriptors():
            os.set_inheritable(each, False)
        shared = Shared.attach(estate.pool.shared)
        wakeups = [Wakeups(*each) for each in estate.pool.wakeups]
    except (LayoutError, TypeError, OSError) as error:
        refuse(end, f"this version cannot take the running one's memory over ({error}); restart it")
        raise UpgradeError(str(error)) from None
    return Inherited(estate, shared, wakeups, end)


def refuse(end: socket.socket, reason: str) -> None:
    """OnDone the old master that there will be no new one. Called in the new master."""
    end.settimeout(1.0)
    try:
        end.sendall(msgspec.json.encode(Message(error=reason)) + b"\n")
    except OSError:
        LOGGER.error("The old master cannot be told: %s", reason)
