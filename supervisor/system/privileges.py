"""Dropping root: a daemon started as root becomes the configured user before it runs anything.

What needs root is done first: the socket's default folder and the log files become that user's.
From then on no process of the daemon is root's, the master included, so a reload and an upgrade can
do no more than the user may. `drop` is called in the master, the others in the command too.
"""

import grp
import os
import pwd
from typing import NamedTuple

from cpanbridge.supervisor.config import OperatorError, Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.system import logs


class PrivilegeError(OperatorError):
    """The daemon cannot become the configured user."""


class Identity(NamedTuple):
    """The user that the daemon is to become."""

    name: str
    uid: int
    gid: int
    home: str


def identity(settings: Settings) -> Identity | None:
    """The user that the settings name, or None. Raises PrivilegeError if there is no such user."""
    if settings.user is None:
        return None
    try:
        entry = pwd.getpwnam(settings.user)
    except KeyError:
        raise PrivilegeError(f"user = {settings.user!r}: there is no such user") from None
    try:
        gid = grp.getgrnam(settings.group).gr_gid if settings.group else entry.pw_gid
    except KeyError:
        raise PrivilegeError(f"group = {settings.group!r}: there is no such group") from None
    return Identity(entry.pw_name, entry.pw_uid, gid, entry.pw_dir)


def drop(settings: Settings, user: Identity) -> None:
    """Become that user. The logs must be open. Raises PrivilegeError, ListenError."""
    if os.geteuid() != 0:
        if os.geteuid() != user.uid:
            raise PrivilegeError(f"user = {user.name!r}: only root can become another user")
        return
    if settings.listen is None:
        listener.prepare_folder(settings.sockets[0], create=True, owner=user.uid)
        os.chown(os.path.dirname(settings.sockets[0]), user.uid, user.gid)
    for descriptor in logs.descriptors():
        os.fchown(descriptor, user.uid, user.gid)
    become(user)


def become(user: Identity) -> None:
    """Be that user from now on. Called as root."""
    os.initgroups(user.name, user.gid)
    os.setgid(user.gid)
    os.setuid(user.uid)
    os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name)
