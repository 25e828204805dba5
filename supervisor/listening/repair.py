"""What stands at a daemon's paths is compared with what the daemon has, and made anew.

Anybody who may write in a folder can remove a socket, a lock, a pid file or the folder, or put
something else there. Then clients and the command no longer find a daemon that is well. The lock
proves whose a path is, so it comes first; whatever else is missing or foreign is made anew. Called
in the master.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial

import msgspec

from cpanbridge.supervisor.config import OperatorError
from cpanbridge.supervisor.listening.listener import CONTROL, Listener
from cpanbridge.supervisor.listening.sockets import Sockets
from cpanbridge.supervisor.wording import explain

LOGGER = logging.getLogger("cpanbridge.master")

SECONDS = 1.0  # between two checks
_SUFFIXES = ("", ".lock", ".pid", CONTROL)


class Loss(msgspec.Struct):
    """A file of the daemon's that was found to be missing, or another's."""

    path: str
    found: str  # "removed" or "replaced"
    at: float  # Unix seconds, the last time
    times: int = 1
    problem: str | None = None  # why it is not made anew yet


class Repair:
    """Checks all paths of a daemon. `losses` has which of their files were ever lost, by path."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self.losses: dict[str, Loss] = {}

    def check(self) -> bool:
        """Compare all, and make anew what is not the daemon's; whether its sockets have changed."""
        sockets = self._sockets
        before = sockets.accepting
        sockets.close_idle()
        made = [file for each in sockets.listeners for file in self._check(each)]
        if made:
            LOGGER.warning("Made anew: %s", ", ".join(made))
        served = {each.path + suffix for each in sockets.listeners for suffix in _SUFFIXES}
        self.losses = {file: self.losses[file] for file in self.losses if file in served}
        return sockets.accepting != before

    def unreachable(self) -> list[str]:
        """The paths of `listen` at which clients do not find the daemon now."""
        return [each.path for each in self._sockets.listeners if not each.is_in_place()]

    def _check(self, listener: Listener) -> list[str]:
        """Check one path; what was made anew, each with the reason in words."""
        instance, path = self._sockets.instance, listener.path
        made: list[str] = []

        def restore(file: str, in_place: bool, make: Callable[[], None]) -> bool:
            if in_place:
                self._is_well(file)
                return True
            found = "replaced" if os.path.lexists(file) else "removed"
            try:
                listener.make_sure_of_folder()
                make()
            except (OperatorError, OSError) as error:
                problem = explain(error) if isinstance(error, OSError) else str(error)
                self._is_lost(file, found, problem)
                return False
            self._is_lost(file, found, None)
            made.append(f"{file} (was {found})")
            return True

        locked = instance.has_lock_file(path)
        if restore(f"{path}.lock", locked, partial(instance.lock_anew, path)):
            named = instance.has_pid_file(path)
            restore(f"{path}.pid", named, partial(instance.write_pid_file, path))
            controls = [each for each in self._sockets.controls if each.path == path + CONTROL]
            for each in (listener, *controls):
                bind = partial(self._sockets.bind_anew, each)
                restore(each.path, each.is_in_place(), bind)
        return made

    def _is_well(self, file: str) -> None:
        loss = self.losses.get(file)
        if loss is not None and loss.problem is not None:
            loss.problem = None
            LOGGER.warning("%s: is in place again", file)

    def _is_lost(self, file: str, found: str, problem: str | None) -> None:
        last = self.losses.get(file)
        times = last.times if last is not None else 0
        told = last.problem if last is not None else None
        if told is None:  # else it is the same loss, which could not be mended before
            times += 1
        self.losses[file] = Loss(file, found, time.time(), times, problem)
        if problem is not None and problem != told:
            text = "%s: was %s, and cannot be made anew, which is tried every second: %s"
            LOGGER.error(text, file, found, problem)
