"""The sockets that a worker accepts clients from: those that it inherited, until there are others.

The master binds a socket anew when its file was removed or replaced; then all workers accept from
the new one as well, and from the old one until nobody waits there.
"""

import os
import socket
from collections.abc import Sequence

from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.memory.listener_box import ListenerBox


class Listeners:
    """One worker's. Called in the main thread, but for what says otherwise."""

    def __init__(
        self, inherited: Sequence[socket.socket], box: ListenerBox, shared: Shared
    ) -> None:
        self._box = box
        self._header = shared.header
        self._changes = 0  # that this worker has followed
        # May be read in any thread: replaced as a whole.
        self.sockets: tuple[socket.socket, ...] = tuple(inherited)

    def follow(self) -> bool:
        """Take what the master has put into the box; whether there are others now.

        Those that are not there any more are left to the leading thread to close.
        """
        changes = self._header.listener_changes
        if changes == self._changes:
            return False
        try:
            found = self._box.sockets()
        except OSError:
            found = None
        if found is None:
            return False  # tried again at the next call
        self._changes = changes
        have = {_inode(each): each for each in self.sockets}
        sockets = tuple(have.get(_inode(each), each) for each in found)
        for each in found:
            if each not in sockets:
                each.close()
        self.sockets = sockets
        return True


def _inode(each: socket.socket) -> int:
    return os.fstat(each.fileno()).st_ino
