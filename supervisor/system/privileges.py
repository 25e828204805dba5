"""Dropping root: a daemon started as root becomes the configured user before it runs anything.

What needs root is done first: the socket's default folder, the locks that a daemon of another user
has left, and the log files become that user's. From then on no process of the daemon is root's, the
master included, so a reload and an upgrade can do no more than the user may. Root opens no file at
a path that this user could lead elsewhere: that waits until the process is the user's. `prepare`
and `drop` are called in the master, the others in the command too.
"""

import contextlib
import ctypes
import grp
import os
import pwd
import resource
import stat
from collections.abc import Collection
from typing import NamedTuple

from cpanbridge.supervisor.config import DEFAULT_SOCKET_VARIABLE, OperatorError, Settings
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import InstanceError, is_locked
from cpanbridge.supervisor.system import logs

_MOST_LINKS = 40  # as many as the kernel follows, path_resolution(7)
_PR_SET_DUMPABLE = 4  # see prctl(2)
_prctl = ctypes.CDLL(None).prctl


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


def prepare(settings: Settings, user: Identity) -> None:
    """Let that user have the socket paths. Raises PrivilegeError, ListenError."""
    if os.geteuid() != 0:
        if os.geteuid() != user.uid:
            raise PrivilegeError(f"user = {user.name!r}: only root can become another user")
        return
    if settings.listen is None:  # or this user's own default would be meant from now on
        os.environ[DEFAULT_SOCKET_VARIABLE] = settings.sockets[0]
    if any(map(_is_in_use, settings.sockets)):
        return  # as is reported when it cannot be locked
    if settings.listen is None:
        path = settings.sockets[0]
        listener.prepare_folder(path, create=True, owner=user.uid)
        _give_folder(os.path.dirname(path), user)
    for path in settings.sockets:
        _give_lock(f"{path}.lock", user)


def _is_in_use(path: str) -> bool:
    """Whether a daemon of any user holds the path's lock."""
    with contextlib.suppress(OSError, InstanceError):
        return is_locked(path, os.lstat(f"{path}.lock").st_uid)
    return False


def _give_folder(folder: str, user: Identity) -> None:
    """Make the default folder that user's, with what a daemon of root's has left there."""
    status = os.stat(folder)
    if status.st_uid == 0 and not status.st_mode & 0o022:  # only root has put anything there
        for entry in os.scandir(folder):
            if entry.name.startswith("cpanbridged."):
                os.chown(entry.path, user.uid, user.gid, follow_symlinks=False)
    os.chown(folder, user.uid, user.gid)


def _give_lock(path: str, user: Identity) -> None:
    """Make a lock file that user's, which a daemon of another user has left.

    The folder may be one in which others can put files under this name. A lock file is empty and
    has one name; any other file is left as it is.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and (found.st_nlink, found.st_size) == (1, 0):
                os.fchown(descriptor, user.uid, user.gid)
        finally:
            os.close(descriptor)


def drop(user: Identity) -> None:
    """Become that user, if this process is root's. The logs that root opens must be open."""
    if os.geteuid() != 0:
        return
    for descriptor in logs.descriptors():
        if not os.fstat(descriptor).st_mode & stat.S_IWOTH:  # such as /dev/null
            os.fchown(descriptor, user.uid, user.gid)
    become(user)


def reaches(user: Identity, path: str) -> bool:
    """Whether this user could choose which file is at a path, by a link or by moving a folder.

    Links are followed one by one. What is missing, nobody but those who may make it can choose.
    """
    groups = {user.gid, *os.getgrouplist(user.name, user.gid)}
    real, links = "/", 0
    parts = path.split("/")[::-1]
    while parts:
        name = parts.pop()
        if name == "..":
            real = os.path.dirname(real)
        if name in ("", ".", ".."):
            continue
        entry = os.path.join(real, name)
        try:
            if _may_replace(user, groups, real, entry, is_last=not parts):
                return True
            is_link = stat.S_ISLNK(os.lstat(entry).st_mode)
        except OSError:
            return False  # it cannot be opened by root either, or is made in a folder of root's
        links += is_link
        if links > _MOST_LINKS:
            return True
        if is_link:
            target = os.readlink(entry)
            real = "/" if target.startswith("/") else real
            parts += target.split("/")[::-1]
        else:
            real = entry
    return False


def _may_replace(
    user: Identity, groups: Collection[int], folder: str, entry: str, *, is_last: bool
) -> bool:
    """Whether a user may put something else at an entry of a folder. Raises OSError."""
    found = os.stat(folder)
    may_write = found.st_mode & stat.S_IWOTH or (
        found.st_mode & stat.S_IWGRP and found.st_gid in groups
    )
    if found.st_uid == user.uid or not may_write or not found.st_mode & stat.S_ISVTX:
        return found.st_uid == user.uid or bool(may_write)
    # Others' entries stay in such a folder. But a file there may be another name of any file.
    return is_last or os.lstat(entry).st_uid != 0


def become(user: Identity) -> None:
    """Be that user from now on. Called as root."""
    os.initgroups(user.name, user.gid)
    os.setgid(user.gid)
    os.setuid(user.uid)
    # The kernel hides the memory of a process that was root's, also from this user: the master
    # could not measure its workers (PSS, proc_pid_smaps(5)). Nothing of root's is in it: what was
    # read so far is the configuration. As before, no core is written.
    _prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name)
