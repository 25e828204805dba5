"""From one master to the next, of the code that is on disk now, without a gap.

The old master starts the new one as a child of its own, with the same command line. The new one
inherits every descriptor that makes up the daemon: the listening and control sockets, the locks,
the shared memory, the wake-ups, and the lifeline of the workers. Then:

1. The new master reads the configuration and boots a generation, as in a reload, in slots that the
   old one does not use, and sends `ready`.
2. The old master stands still from then on, and sends `yours`.
3. The new master checks that it holds the locks, writes its pid, sends `mine`, and inherits the
   old workers.
4. The old master exits, and the new one completes the reload.

A restart goes the same way, but the new master gets the sockets and the locks alone, and has shared
memory and workers of its own. So before step 2 the old master lets its workers finish what they
run; clients that come meanwhile wait in the listen queues, for the new ones.

Until step 3 the old master serves, and whatever goes wrong with the new one changes nothing. When
the old master dies, the new one, which has all that is needed, is the master at once, and completes
the reload when its generation has booted.

Here is what the two send each other, lines of JSON over a pair of sockets, and the new master's
side. The old master's is in `handover.py`.
"""

import logging
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.lifecycle.reload import Reloader
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.sockets import HeldSockets, Sockets
from cpanbridge.supervisor.memory.layout import LayoutError, Shared
from cpanbridge.supervisor.processes.pool import WorkerPool
from cpanbridge.supervisor.processes.spawner import HeldPool
from cpanbridge.supervisor.system.event_loop import Loop
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

_ESTATE_SECONDS = 30.0  # for the first message


class UpgradeError(OperatorError):
    """This process cannot take a daemon over; one line that says why."""


class Estate(msgspec.Struct):
    """What makes up a daemon: numbers of descriptors, and what is needed to use them."""

    pool: HeldPool | None  # None: for a restart, the new master makes its own
    sockets: HeldSockets
    generation: int  # the one in service; 0: none of the new master's
    user: str | None  # as whom the daemon runs, as its configuration names it
    group: str | None
    error: int = -1  # standard error, where the log is that: see logs.inherit

    def descriptors(self) -> list[int]:
        """The descriptors that the new master must inherit."""
        pool = self.pool.descriptors() if self.pool is not None else []
        error = [self.error] if self.error >= 0 else []
        return pool + self.sockets.descriptors() + error


class First(msgspec.Struct):
    """The first message, from the old master to the new one."""

    estate: Estate


class Message(msgspec.Struct, omit_defaults=True):
    """What one sends to the other after that; one field is set."""

    ready: bool = False  # new to old: the new generation has booted
    yours: bool = False  # old to new: the old master does nothing any more
    mine: int = 0  # new to old: the new master's pid is in the pid files, exit
    sockets: list[str] = []  # with `mine`: the paths where it serves
    error: str | None = None  # new to old: there will be no new master


def _encoded(message: First | Message) -> bytes:
    """A line; a socket in it is a number there."""
    return msgspec.json.encode(message, enc_hook=socket.socket.fileno) + b"\n"


def _opened(_: type, descriptor: int) -> socket.socket:
    opened = socket.socket(fileno=descriptor)
    opened.setblocking(False)
    return opened


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
        self._received = b""
        end.setblocking(False)
        loop.watch(end.fileno(), self._receive)

    def send(self, message: First | Message) -> None:
        """Send a message. The socket's buffer has room for all that are ever sent.

        When the other master has ended, `on_message` says so.
        """
        try:
            self._end.sendall(_encoded(message))
        except OSError as error:
            LOGGER.error("The other master cannot be told: %s", explain(error))

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
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._on_message(msgspec.json.decode(line, type=Message))


class Inherited(NamedTuple):
    """What a new master has inherited, opened."""

    estate: Estate
    shared: Shared | None  # None: for a restart
    end: socket.socket  # of the pair


class Predecessor:
    """The old master, as the new one sees it, and taking its daemon over.

    The new master serves nothing until the old one stands still. When the old one dies, the new one
    is the master at once, with the old workers, whether or not its own have booted.

    `on_taken` is called when the daemon is this master's. The reload by which its own workers
    replace the old ones may still be under way then. `on_gone` is called when the old master has
    ended: it sends nothing more, to the service manager neither.
    """

    def __init__(
        self,
        inherited: Inherited,
        pool: WorkerPool,
        reloader: Reloader,
        sockets: Sockets,
        on_taken: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._reloader = reloader
        self._sockets = sockets
        self._on_taken = on_taken
        self._on_gone = on_gone
        self._booted = False
        self._gone = False
        self.pending = True  # the old master still has the daemon
        if inherited.estate.pool is not None:
            pool.will_inherit(reloader.generation, inherited.estate.pool)
        self._line = Line(pool.spawner.loop, inherited.end, self._receive)

    def ready(self) -> None:
        """The new generation has booted: ask for the daemon."""
        self._booted = True
        self._line.send(Message(ready=True))

    def refuse(self, reason: str) -> None:
        """There will be no new master, whatever happens to the old one from now on."""
        if not self._gone:
            self._line.send(Message(error=reason))
        self._line.close()

    def _receive(self, message: Message | None) -> None:
        if message is None:
            self._gone = True
            if self.pending:
                LOGGER.error("The old master is gone: this one is the master now")
        if message is None or message.yours:
            self._take_over()
        if message is None:
            self._on_gone()

    def _take_over(self) -> None:
        """The old master does nothing any more: the daemon is this one's, and its workers.

        An old worker that dies before the new generation serves is not replaced: that one boots
        already.
        """
        coming = self._reloader.coming
        if not self.pending or coming is None:
            return  # it is this one's already, or this one has refused meanwhile
        try:
            self._sockets.take_over()
        except InstanceError as error:  # no disk space for its pid, by which others find it
            self._sockets.give_away()
            self._reloader.give_up(str(error))
            return
        self.pending = False
        self._pool.spawner.shared.header.sockets_are_passed_on = 0
        if not self._gone:
            self._line.send(Message(mine=os.getpid(), sockets=coming.settings.sockets))
        self._pool.inherit(self._reloader.generation)
        LOGGER.info("cpanbridged %s takes over: pid %d", __version__, os.getpid())
        self._on_taken()
        if self._booted:
            self._reloader.ready(coming)


def inherit(descriptor: int) -> Inherited:
    """Receive the estate. Called once, before there is a loop. Raises UpgradeError.

    What another version has sent may be of no use to this one; then the old master is told so.
    """
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
    except OSError as error:
        raise UpgradeError(f"the old master does not say what it has: {explain(error)}") from None
    try:
        estate = msgspec.json.decode(data, type=First, dec_hook=_opened).estate
    except (msgspec.MsgspecError, OSError) as error:
        problem = "this version cannot read what the running one hands over"
        reason = f"{problem} ({explain(error)}); stop it and start it"
        refuse(end, reason)
        raise UpgradeError(reason) from None
    try:
        for each in estate.descriptors():
            os.set_inheritable(each, False)
        shared = Shared.attach(estate.pool.shared) if estate.pool is not None else None
    except (LayoutError, OSError) as error:
        reason = (
            f"this version cannot take the running one's memory over ({explain(error)}); restart it"
        )
        refuse(end, reason)
        raise UpgradeError(reason) from None
    return Inherited(estate, shared, end)


def refuse(end: socket.socket, reason: str) -> None:
    """Tell the old master that there will be no new one. Called in the new master."""
    end.settimeout(1.0)
    try:
        end.sendall(_encoded(Message(error=reason)))
    except OSError:
        LOGGER.error("The old master cannot be told: %s", reason)
