"""Started as root, the daemon becomes the user that is set before it runs anything.

What needs root is done first: the folder of its own that the socket stands in, and the log files,
become that user's. From then on nothing of the daemon is root's, the master included, so a reload
and an upgrade can do no more than the user may. Called in the master.
"""

import grp
import os
import pwd
from typing import NamedTuple

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.system import logs


class PrivilegeError(Exception):
    """The daemon cannot be the user that is set; one line that says why."""


class Identity(NamedTuple):
    """Whom the daemon is to be."""

    name: str
    uid: int
    gid: int
    home: str


def identity(settings: Settings) -> Identity | None:
    """Whom the settings name; None when nobody. Raises PrivilegeError if there is no such user."""
    if settings.user is None:
        return None
    try:
        entry = pwd.getpwnam(settings.user)
    except KeyError:
        raise PrivilegeError(f"user = {settings.user!r}: there is no such user") from None
    gid = entry.pw_gid
    if settings.group is not None:
        try:
            gid = grp.getgrnam(settings.group).gr_gid
        except KeyError:
            raise PrivilegeError(f"group = {settings.group!r}: there is no such group") from None
    return Identity(entry.pw_name, entry.pw_uid, gid, entry.pw_dir)


def drop(settings: Settings, whom: Identity) -> None:
    """Become that user. The logs are open by then. Raises PrivilegeError, ListenError."""
    if os.geteuid() != 0:
        if os.geteuid() != whom.uid:
            raise PrivilegeError(f"user = {whom.name!r}: only root can become another user")
        return
    if settings.listen is None:
        listener.prepare_folder(settings.sockets[0], create=True, owner=whom.uid)
        os.chown(os.path.dirname(settings.sockets[0]), whom.uid, whom.gid)
    for descriptor in logs.descriptors():
        os.fchown(descriptor, whom.uid, whom.gid)
    os.initgroups(whom.name, whom.gid)
    os.setgid(whom.gid)
    os.setuid(whom.uid)
    os.environ.update(HOME=whom.home, USER=whom.name, LOGNAME=whom.name)
