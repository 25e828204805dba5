"""The socket paths that the daemon serves: each is locked, listened on, and given back at the end.

A reload may change them. What can fail is done before any worker is forked, and undone when the
reload fails. A path that is given up loses its file when the new workers accept. Clients that had
connected to it before are still in its listen queue, so the new workers inherit that socket too. So
it is with a socket whose file was removed or replaced, and that is bound anew: the one before is
kept until nobody waits there. Called in the master.
"""

import contextlib
import logging
import os
import select
import socket
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
    controls: list[Listener]
    former: list[socket.socket]
    locks: dict[str, int]

    def descriptors(self) -> list[int]:
        """The descriptors that the other process must inherit."""
        sockets = [*(each.socket for each in self.listeners + self.controls), *self.former]
        return [*(each.fileno() for each in sockets), *self.locks.values()]


class Sockets:
    """All that is held for the paths. Files and locks are gone after `give_back`.

    Some may be borrowed: another master has them too and is responsible for them. Of these only
    this process's descriptors are closed.
    """

    def __init__(self, held: HeldSockets | None = None) -> None:
        self._instance = Instance(held.locks if held is not None else None)
        self._borrowed: set[str] = set()
        self.listeners: list[Listener] = []
        self.controls: list[Listener] = []
        # Sockets that no path leads to any more, but in whose queues there may be clients.
        self.former: list[socket.socket] = []
        self._former_controls: list[socket.socket] = []
        self._idle: list[socket.socket] = []  # those of them that had none a moment ago
        if held is not None:
            self.listeners, self.controls = held.listeners, held.controls
            self.former = held.former
            self.give_away()
        self._masters_alone: list[socket.socket] = [each.socket for each in self.controls]
        os.register_at_fork(after_in_child=self._leave_to_master)
        # Called when there are other control sockets, while those before are still open.
        self._answer: Callable[[Sequence[socket.socket]], None] = lambda _: None

    def answer(self, listen: Callable[[Sequence[socket.socket]], None]) -> None:
        """Have the control sockets answered from now on, also when they change."""
        self._answer = listen
        self._answer_controls()

    def _answer_controls(self) -> None:
        self._answer([*(each.socket for each in self.controls), *self._former_controls])

    def held(self) -> HeldSockets:
        """What a master that takes over needs."""
        return HeldSockets(self.listeners, self.controls, self.former, self._instance.descriptors)

    @property
    def instance(self) -> Instance:
        """The locks and pid files of the paths."""
        return self._instance

    @property
    def accepting(self) -> list[socket.socket]:
        """All sockets that workers are to accept clients from."""
        return [*(each.socket for each in self.listeners), *self.former]

    def take_over(self) -> None:
        """Become responsible for them, and write this process's pid files. Raises InstanceError."""
        self._borrowed.clear()
        self._instance.take_over()
        for each in self.controls:
            each.name_this_process()

    def give_away(self) -> None:
        """Another master is responsible for them."""
        self._borrowed = set(self._instance.descriptors)
        self._borrowed.update(each.path for each in self.controls)

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
        have = {each.path: each for each in self.listeners + self.controls}
        paths = list(dict.fromkeys(settings.sockets))
        unlocked = [path for path in paths if path not in self._instance.descriptors]
        for path in unlocked:
            listener.prepare_folder(path, create=settings.listen is None)
        with contextlib.ExitStack() as undo:
            self._instance.acquire(unlocked, patience)
            undo.callback(self.release, unlocked)
            added: list[Listener] = []
            undo.callback(self.close, added)
            mode, group = int(settings.socket_mode, 8), settings.socket_group
            for path in (path for path in paths if path not in have):
                added.append(listener.listen(path, mode, group, self._instance.unclean))
            # Beside each path, whose lock excludes other daemons from it.
            controls = []
            for path in (path + listener.CONTROL for path in paths):
                controls.append(have.get(path) or self._listen_for_control(path))
                if path not in have:
                    undo.callback(self.close, controls[-1:])
            gid = listener.group_id(group)
            kept = [have[path] for path in paths if path in have]
            for each in (each for each in kept if not each.lent):
                before = each.set_access(mode, gid)
                undo.callback(_restore_access, each, *before)
            removed = [each for each in self.listeners if each.path not in paths]
            return Change(self, kept + added, removed, controls, undo.pop_all())

    def _listen_for_control(self, path: str) -> Listener:
        control = listener.listen(path, 0o600, None, ())
        self._masters_alone.append(control.socket)
        return control

    def _leave_to_master(self) -> None:
        """Called in a forked child, which keeps the listeners alone.

        So who connects to a control socket has found a living master; and a worker is told of the
        former sockets, and told when to close them. The numbers stay taken, because the objects
        that own them still exist. The child's own children inherit none.
        """
        left, self._masters_alone, self.former = self._masters_alone + self.former, [], []
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for each in left:
            if (descriptor := each.fileno()) >= 0:
                os.dup2(null, descriptor, inheritable=False)
        os.close(null)

    def close(self, listeners: Sequence[Listener] | None = None) -> None:
        """Remove the files and listen no more. Workers have their own copies of the sockets."""
        for each in self.listeners if listeners is None else listeners:
            self._unlink(each)
            each.socket.close()
        for former in self.former if listeners is None else ():
            former.close()
        self._masters_alone = [each for each in self._masters_alone if each.fileno() >= 0]

    def _unlink(self, each: Listener) -> None:
        try:
            if each.path not in self._borrowed:
                each.unlink()
        except OSError as error:
            LOGGER.warning("%s: cannot be removed: %s", each.path, explain(error))

    def bind_anew(self, each: Listener) -> None:
        """Listen once more at the path of a listener or control. Raises ListenError.

        The socket before is kept until nobody waits at it.
        """
        before = each.socket
        each.bind_anew()
        if each in self.controls:
            self._masters_alone.append(each.socket)
            self._former_controls.append(before)
            self._answer_controls()
        else:
            self.former.append(before)

    def give_up(self, listeners: Sequence[Listener], controls: Sequence[Listener]) -> None:
        """Serve these no more, but for the clients that wait there."""
        for each in (*listeners, *controls):
            self._unlink(each)
        for each in listeners:
            if each.lent:
                each.socket.close()  # clients that wait there are the service manager's
            else:
                self.former.append(each.socket)
        self._former_controls += [each.socket for each in controls]
        self._answer_controls()
        self.release([each.path for each in listeners])

    def close_idle(self) -> bool:
        """Close the former sockets that nobody waits at; whether workers should as well.

        A client that has found the path while it was there may still be about to connect: so a
        socket is closed that nobody waits at now, nor at the last call.
        """
        idle = [each for each in self.former + self._former_controls if not _is_readable(each)]
        over = [each for each in idle if each in self._idle]
        self._idle = [each for each in idle if each not in over]
        changed = any(each in self.former for each in over)
        self.former = [each for each in self.former if each not in over]
        if any(each in self._former_controls for each in over):
            self._former_controls = [each for each in self._former_controls if each not in over]
            self._answer_controls()
        for each in over:
            each.close()
        return changed

    def release(self, paths: Collection[str] | None = None) -> None:
        """Free the locks: another daemon may have the paths."""
        paths = self._instance.descriptors if paths is None else paths
        self._instance.release([path for path in paths if path not in self._borrowed])

    def give_back(self) -> None:
        """The daemon has ended: no file, no socket and no lock of it is left."""
        self.close(self.listeners + self.controls)
        for each in self.former + self._former_controls:
            each.close()
        self.release()


@dataclass
class Change:
    """What a reload does to the sockets: made by `Sockets.change`, then completed or undone."""

    _sockets: Sockets
    listeners: list[Listener]  # those of the changed configuration
    removed: list[Listener]  # those that it does not have any more
    _controls: list[Listener]
    _undo: contextlib.ExitStack

    def undo(self) -> None:
        """The reload has failed: all is as it was."""
        self._undo.close()

    def complete(self) -> None:
        """The new workers accept: give up what is not served any more."""
        self._undo.pop_all()
        sockets = self._sockets
        before, sockets.controls = sockets.controls, self._controls
        sockets.listeners = self.listeners
        sockets.give_up(self.removed, [each for each in before if each not in self._controls])


def _restore_access(each: Listener, mode: int, gid: int | None) -> None:
    with contextlib.suppress(ListenError):
        each.set_access(mode, gid)


def _is_readable(listening: socket.socket) -> bool:
    poll = select.poll()
    poll.register(listening, select.POLLIN)
    return bool(poll.poll(0))
