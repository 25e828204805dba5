"""The socket paths that the daemon serves: each is locked, listened on, and given back at the end.

A reload may change them. What can fail is done before any worker is forked, and undone when the
reload fails. A path that is given up loses its file when the new workers accept; clients that had
connected to it before are still in its queue, so the new workers are handed its socket as well.
Called in the master.
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Sequence

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import Instance, write_pid
from cpanbridge.supervisor.listening.listener import Listener, ListenError

LOGGER = logging.getLogger("cpanbridge.master")

# The loop must not stand still: a path that another daemon holds is not waited for in a reload.
_NO_PATIENCE = 0.02


class HeldListener(msgspec.Struct):
    """A listener in another process, which has inherited its descriptor."""

    path: str
    descriptor: int
    inode: tuple[int, int]
    lent: bool

    def take(self) -> Listener:
        """It in this process."""
        listening = socket.socket(fileno=self.descriptor)
        listening.setblocking(False)
        return Listener(self.path, listening, self.inode, self.lent)


class HeldSockets(msgspec.Struct):
    """All that `Sockets` holds, as numbers that another process can use."""

    listeners: list[HeldListener]
    control: HeldListener | None
    locks: dict[str, int]

    def descriptors(self) -> list[int]:
        """Those that the other process must inherit."""
        control = [self.control] if self.control is not None else []
        return [each.descriptor for each in self.listeners + control] + list(self.locks.values())


class Sockets:
    """All that is held for the paths. Files and locks are gone after `close` and `release`.

    Of those that are borrowed, because another master has them as well, only our copies go.
    """

    def __init__(self, held: HeldSockets | None = None) -> None:
        self._instance = Instance(held.locks if held is not None else None)
        self._borrowed: set[str] = set()
        self.listeners: list[Listener] = []
        self.control: Listener | None = None
        if held is not None:
            self.listeners = [each.take() for each in held.listeners]
            self.control = held.control.take() if held.control is not None else None
            self.give_away()
        # Called when a reload has moved the control socket, while the one before is still open.
        self.control_moved: Callable[[Listener], None] = lambda _: None

    def held(self) -> HeldSockets:
        """What a master that takes over needs."""
        return HeldSockets(
            [_held(each) for each in self.listeners],
            _held(self.control) if self.control is not None else None,
            self._instance.descriptors,
        )

    def take_over(self) -> None:
        """From now on they are ours: say so in the pid files. Raises InstanceError."""
        self._borrowed.clear()
        for path in self._instance.descriptors:
            write_pid(path)

    def give_away(self) -> None:
        """They are another master's now, as well or only."""
        self._borrowed = set(self._instance.descriptors)
        if self.control is not None:
            self._borrowed.add(self.control.path)

    def open(self, settings: Settings, lent: Sequence[Listener] = ()) -> None:
        """Have all paths, or none; those in `lent` are there. Raises ListenError, InstanceError."""
        for each in lent:
            if each.path not in settings.sockets:
                raise ListenError(
                    f"LISTEN_FDS: {each.path} is not in listen, which has "
                    f"{', '.join(settings.sockets)}; make both the same"
                )
        there = {each.path for each in lent}
        _prepare_folders(settings.sockets, create=settings.listen is None)
        self._instance.acquire(settings.sockets)
        try:
            missing = [path for path in settings.sockets if path not in there]
            self.listeners = [*lent, *self._listen(settings, missing)]
            self.control = self._listen_for_control(settings)
        except ListenError:
            self.close()
            self.release()
            raise

    def close_control(self) -> None:
        """Take the control socket away: the daemon has ended."""
        if self.control is not None:
            self.close([self.control])

    def change(self, settings: Settings) -> "Change":
        """Get what a changed configuration needs besides. Raises ListenError, InstanceError."""
        have = {each.path: each for each in self.listeners}
        missing = [path for path in settings.sockets if path not in have]
        kept = [have[path] for path in settings.sockets if path in have]
        removed = [each for each in self.listeners if each.path not in settings.sockets]
        _prepare_folders(missing, create=settings.listen is None)
        self._instance.acquire(missing, _NO_PATIENCE)
        added: list[Listener] = []
        control = self.control
        access: list[tuple[Listener, int, int]] = []
        try:
            added = self._listen(settings, missing)
            if control is None or settings.sockets[0] + listener.CONTROL != control.path:
                control = self._listen_for_control(settings)
            gid = listener.group_id(settings.socket_group)
            for each in (each for each in kept if not each.lent):
                access.append((each, *each.set_access(int(settings.socket_mode, 8), gid)))
        except ListenError:
            Change(self, kept, added, removed, access, missing, control).undo()
            raise
        return Change(self, kept, added, removed, access, missing, control)

    def _listen(self, settings: Settings, paths: Sequence[str]) -> list[Listener]:
        mode, group = int(settings.socket_mode, 8), settings.socket_group
        made: list[Listener] = []
        try:
            for path in dict.fromkeys(paths):
                made.append(listener.listen(path, mode, group, self._instance.unclean))
        except ListenError:
            self.close(made)
            raise
        return made

    def _listen_for_control(self, settings: Settings) -> Listener:
        """The control socket beside the first path, whose lock is held: nobody else may use it.

        Where the path's last owner died, so did this one's. Workers of it may still have copies,
        and would seem to answer.
        """
        first = settings.sockets[0]
        path = first + listener.CONTROL
        stale = {path} if first in self._instance.unclean else ()
        return listener.listen(path, 0o600, None, stale)

    def close(self, listeners: Sequence[Listener] | None = None) -> None:
        """Take the files away and listen no more. Workers have their own copies of the sockets."""
        for each in self.listeners if listeners is None else listeners:
            try:
                if each.path not in self._borrowed:
                    each.unlink()
            except OSError as error:
                LOGGER.warning("%s: cannot be removed: %s", each.path, error.strerror)
            each.socket.close()

    def release(self, paths: Collection[str] | None = None) -> None:
        """Free the locks: another daemon may have the paths."""
        paths = self._instance.descriptors if paths is None else paths
        self._instance.release([path for path in paths if path not in self._borrowed])


class Change:
    """What a reload does to the sockets: made, and then completed or undone."""

    def __init__(
        self,
        sockets: Sockets,
        kept: list[Listener],
        added: list[Listener],
        removed: list[Listener],
        access: list[tuple[Listener, int, int]],
        locked: list[str],
        control: Listener | None,
    ) -> None:
        self._sockets = sockets
        self.listeners = kept + added
        self.removed = removed
        self._added = added
        self._access = access
        self._locked = locked
        self._control = control

    def undo(self) -> None:
        """The reload has failed: all is as it was."""
        for each, mode, gid in self._access:
            with contextlib.suppress(ListenError):  # somebody has taken the file away
                each.set_access(mode, gid)
        self._sockets.close(self._added)
        if self._control is not None and self._control is not self._sockets.control:
            self._sockets.close([self._control])
        self._sockets.release(self._locked)

    def complete(self) -> None:
        """The new workers accept: give up what is not served any more."""
        self._sockets.close(self.removed)
        self._sockets.release([each.path for each in self.removed])
        self._sockets.listeners = self.listeners
        if self._control is not None and self._control is not self._sockets.control:
            self._sockets.control_moved(self._control)
            self._sockets.close_control()
            self._sockets.control = self._control


def _prepare_folders(paths: Sequence[str], *, create: bool) -> None:
    for path in paths:
        listener.prepare_folder(path, create=create)


def _held(each: Listener) -> HeldListener:
    return HeldListener(each.path, each.socket.fileno(), each.inode, each.lent)
