"""The socket paths that the daemon serves: each is locked, listened on, and given back at the end.

A reload may change them. What can fail is done before any worker is forked, and undone when the
reload fails. A path that is given up loses its file when the new workers accept. Clients that had
connected to it before are still in its listen queue, so the new workers inherit that socket too.
Called in the master.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import PASSING_HOLDER_SECONDS, Instance
from cpanbridge.supervisor.listening.listener import Listener, ListenError
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

# A reload runs in the loop, which must not stand still: it hardly waits for another daemon's lock.
_RELOAD_PATIENCE = 0.02


class HeldSockets(msgspec.Struct):
    """All that `Sockets` holds, for another process that inherits the descriptors."""

    listeners: list[Listener]
    control: Listener | None
    locks: dict[str, int]

    def descriptors(self) -> list[int]:
        """The descriptors that the other process must inherit."""
        control = [self.control] if self.control is not None else []
        return [*(each.socket.fileno() for each in self.listeners + control), *self.locks.values()]


class Sockets:
    """All that is held for the paths. Files and locks are gone after `give_back`.

    Some may be borrowed: another master has them too and is responsible for them. Of these only
    this process's descriptors are closed.
    """

    def __init__(self, held: HeldSockets | None = None) -> None:
        self._instance = Instance(held.locks if held is not None else None)
        self._borrowed: set[str] = set()
        self.listeners: list[Listener] = []
        self.control: Listener | None = None
        if held is not None:
            self.listeners, self.control = held.listeners, held.control
            self.give_away()
        # Called when a reload has moved the control socket, while the one before is still open.
        self.control_moved: Callable[[Listener], None] = lambda _: None

    def answer(self, listen: Callable[[Listener], None]) -> None:
        """Have the control socket answered from now on, wherever a reload moves it."""
        assert self.control is not None
        listen(self.control)
        self.control_moved = listen

    def held(self) -> HeldSockets:
        """What a master that takes over needs."""
        return HeldSockets(self.listeners, self.control, self._instance.descriptors)

    def take_over(self) -> None:
        """Become responsible for them, and write this process's pid files. Raises InstanceError."""
        self._borrowed.clear()
        self._instance.take_over()

    def give_away(self) -> None:
        """Another master is responsible for them."""
        self._borrowed = set(self._instance.descriptors)
        if self.control is not None:
            self._borrowed.add(self.control.path)

    def open(self, settings: Settings, lent: Sequence[Listener] = ()) -> None:
        """Open all paths or none; `lent` are open. Raises ListenError, InstanceError, OSError."""
        for each in lent:
            if each.path not in settings.sockets:
                raise ListenError(
                    f"LISTEN_FDS: {each.path} is not in listen, which has "
                    f"{', '.join(settings.sockets)}; make both the same"
                )
        self.listeners = list(lent)
        self.change(settings, PASSING_HOLDER_SECONDS).complete()

    def change(self, settings: Settings, patience: float = _RELOAD_PATIENCE) -> "Change":
        """Open what a changed configuration needs besides.

        Raises ListenError, InstanceError, OSError; all is as it was then.
        """
        have = {each.path: each for each in self.listeners}
        unlocked = [path for path in settings.sockets if path not in self._instance.descriptors]
        for path in unlocked:
            listener.prepare_folder(path, create=settings.listen is None)
        with contextlib.ExitStack() as undo:
            self._instance.acquire(unlocked, patience)
            undo.callback(self.release, unlocked)
            added: list[Listener] = []
            undo.callback(self.close, added)
            mode, group = int(settings.socket_mode, 8), settings.socket_group
            for path in (path for path in dict.fromkeys(settings.sockets) if path not in have):
                added.append(listener.listen(path, mode, group, self._instance.unclean))
            control = self.control
            if control is None or settings.sockets[0] + listener.CONTROL != control.path:
                control = self._listen_for_control(settings)
                undo.callback(self.close, [control])
            gid = listener.group_id(group)
            kept = [have[path] for path in settings.sockets if path in have]
            for each in (each for each in kept if not each.lent):
                before = each.set_access(mode, gid)
                undo.callback(_restore_access, each, *before)
            removed = [each for each in self.listeners if each.path not in settings.sockets]
            return Change(self, kept + added, removed, control, undo.pop_all())

    def _listen_for_control(self, settings: Settings) -> Listener:
        """The control socket beside the first path, whose lock excludes other daemons from it.

        Where the path's last owner died, its control socket is stale too. Workers of that daemon
        may still have copies of it, so that connecting to it would seem to succeed.
        """
        first = settings.sockets[0]
        path = first + listener.CONTROL
        stale = {path} if first in self._instance.unclean else ()
        return listener.listen(path, 0o600, None, stale)

    def close(self, listeners: Sequence[Listener] | None = None) -> None:
        """Remove the files and listen no more. Workers have their own copies of the sockets."""
        for each in self.listeners if listeners is None else listeners:
            try:
                if each.path not in self._borrowed:
                    each.unlink()
            except OSError as error:
                LOGGER.warning("%s: cannot be removed: %s", each.path, explain(error))
            each.socket.close()

    def release(self, paths: Collection[str] | None = None) -> None:
        """Free the locks: another daemon may have the paths."""
        paths = self._instance.descriptors if paths is None else paths
        self._instance.release([path for path in paths if path not in self._borrowed])

    def give_back(self) -> None:
        """The daemon has ended: no file, no socket and no lock of it is left."""
        self.close(self.listeners + ([self.control] if self.control is not None else []))
        self.release()


@dataclass
class Change:
    """What a reload does to the sockets: made by `Sockets.change`, then completed or undone."""

    _sockets: Sockets
    listeners: list[Listener]  # those of the changed configuration
    removed: list[Listener]  # those that it does not have any more
    _control: Listener
    _undo: contextlib.ExitStack

    def undo(self) -> None:
        """The reload has failed: all is as it was."""
        self._undo.close()

    def complete(self) -> None:
        """The new workers accept: give up what is not served any more."""
        self._undo.pop_all()
        sockets, before = self._sockets, self._sockets.control
        sockets.close(self.removed)
        sockets.release([each.path for each in self.removed])
        sockets.listeners = self.listeners
        if before is not None and before is not self._control:
            sockets.control_moved(self._control)
            sockets.close([before])
        sockets.control = self._control


def _restore_access(each: Listener, mode: int, gid: int) -> None:
    with contextlib.suppress(ListenError):  # the file may have been removed meanwhile
        each.set_access(mode, gid)
