"""What exactly one master at a time does for its daemon, besides looking after the workers.

The pid files name it, it answers on the control socket, and it speaks to the service manager. In an
upgrade all of that passes from the old master to the new one. Called in the master.
"""

import logging

from cpanbridge.supervisor.control.server import ControlServer
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.sockets import HeldSockets, Sockets
from cpanbridge.supervisor.system.sd_notify import ServiceManager

LOGGER = logging.getLogger("cpanbridge.master")


class Mastership:
    """Makes this process the daemon's master to all others, or no longer."""

    def __init__(
        self, sockets: Sockets, control: ControlServer, service_manager: ServiceManager
    ) -> None:
        self._sockets = sockets
        self._control = control
        self._service_manager = service_manager

    def begin(self) -> None:
        """The daemon starts with this master, which has its locks and pid files already."""
        self._answer()

    def held(self) -> HeldSockets:
        """The sockets and locks that the next master needs."""
        return self._sockets.held()

    def suspend(self) -> None:
        """Another master is about to take over: accept no control connection any more."""
        self._control.stop_listening()

    def resume(self) -> None:
        """No other master has taken over after all, though it may have written its pid."""
        self._answer()
        try:
            self._sockets.take_over()
        except InstanceError as error:
            LOGGER.error("%s", error)

    def give_to(self, pid: int) -> None:
        """Another process is the master now."""
        self._service_manager.handed_over(pid)
        self._sockets.give_away()

    def take(self) -> None:
        """Become the master in place of another one.

        Raises InstanceError; then this process is not the master, and removes none of the files.
        """
        try:
            self._sockets.take_over()
        except InstanceError:
            self._sockets.give_away()
            raise
        self._answer()

    def speak(self) -> None:
        """Speak to the service manager from now on: the master before this one has ended."""
        self._service_manager.speak()

    def _answer(self) -> None:
        """Answer on the control socket from now on, wherever a reload moves it."""
        if self._sockets.control is not None:
            self._control.listen(self._sockets.control)
        self._sockets.control_moved = self._control.listen
