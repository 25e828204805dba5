"""Looking at a configuration as the daemon will meet it: its paths, its user, its modules.

All of it is done in a child process, as the user that the daemon will be, and leaves no file.
"""

import contextlib
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from functools import partial

import psutil

from cpanbridge.supervisor.commands import common, trial
from cpanbridge.supervisor.config import Loaded, OperatorError, Settings
from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.listener import ListenError
from cpanbridge.supervisor.system import privileges
from cpanbridge.supervisor.wording import explain


class CheckError(OperatorError):
    """The daemon would not start with this configuration; one line for each problem."""


def examine(loaded: Loaded) -> list[str]:
    """What the daemon would be warned of and would serve, a line each. Raises CheckError."""
    settings = loaded.settings
    problems: list[str] = []
    lines = [f"note: {warning}" for warning in loaded.warnings]
    with client.shown_progress() as show:
        with _collected(problems):
            lines += trial.try_in_child(lambda _: _look_at_paths(settings), show)
        lines += [f"sockets: {', '.join(settings.sockets)}", f"workers: {settings.worker_count}"]
        with _collected(problems):
            lines += trial.try_in_child(partial(_look_at_modules, settings), show)
    if problems:
        raise CheckError(*dict.fromkeys(problems))
    return lines


def _look_at_paths(settings: Settings) -> list[str]:
    """Called in a child."""
    problems: list[str] = []
    notes: list[str] = []
    with _collected(problems):
        listener.group_id(settings.socket_group)
    files = list(_log_files(settings))
    theirs: list[tuple[str, str]] = []
    with _collected(problems):
        user = privileges.identity(settings)
        theirs = [each for each in files if user and privileges.reaches(user, each[1])]
    # The start opens the others before it becomes another user.
    problems += _problems_of(each for each in files if each not in theirs)
    with _collected(problems):
        notes = _become_the_daemons_user(settings)
    problems += _problems_of(theirs)
    problems += _problems_of_sockets(settings)
    notes += _notes_about_log_files(settings)
    if problems:
        raise CheckError(*problems)
    return notes


def _look_at_modules(settings: Settings, tell: trial.Tell) -> list[str]:
    """Called in a child."""
    _become_the_daemons_user(settings)
    registry = common.load_modules(settings, tell)
    lines = [f"module {name}: left out: {reason}" for name, reason in registry.left_out.items()]
    for name, module in sorted(registry.exposed.items(), reverse=True):
        functions = ", ".join(sorted(module.functions)) or "no functions"
        results = ", lenient results" if module.lenient else ""
        lines.insert(0, f"module {name} (affinity {module.affinity}{results}): {functions}")
    memory = _own_memory() >> 20
    if settings.limits.max_memory_mb < memory:
        lines.append(
            f"note: limits.max_memory_mb = {settings.limits.max_memory_mb} is less than a single "
            f"process with these modules takes while idle ({memory} MB): no request will ever run"
        )
    return lines


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Go on after an error, and keep it."""
    try:
        yield
    except OperatorError as error:
        problems.extend(error.problems)


def _become_the_daemons_user(settings: Settings) -> list[str]:
    """Returns what is to be noted: where that cannot be done."""
    user = privileges.identity(settings)
    if user is None or os.geteuid() == user.uid:
        return []
    if os.geteuid() != 0:
        return [f"note: user = {user.name!r}: only root can check what this user may do"]
    privileges.become(user)
    return []


def _own_memory() -> int:
    """Bytes that this process has to itself or shares with its parent, without files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _problems_of(log_files: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Called as the user that opens them first."""
    for key, path in log_files:
        if problem := _cannot_write(path):
            yield f"{key} = {path!r}: {problem}"


def _log_files(settings: Settings) -> Iterator[tuple[str, str]]:
    if settings.log_file != "stderr":
        yield "log_file", settings.log_file
    if settings.security_log != "-":
        yield "security_log", settings.security_log


def _notes_about_log_files(settings: Settings) -> Iterator[str]:
    """Called as the user that the daemon will be, who opens them anew after a rotation."""
    for key, path in _log_files(settings):
        folder = os.path.dirname(path)
        if not os.access(folder, os.W_OK | os.X_OK):
            yield (
                f"note: {key} = {path!r}: {_who()} may not make a file in {folder}: "
                "after a rotation by rename, create one before cpanbridged reopen"
            )


def _problems_of_sockets(settings: Settings) -> Iterator[str]:
    """Called as the user that the daemon will be. The default path's folder is made by `start`."""
    for path in settings.listen or ():
        try:
            listener.prepare_folder(path, create=False)
        except ListenError as error:
            yield str(error)
            continue
        for each in (path, f"{path}.lock"):
            if problem := _cannot_write(each):
                yield f"{each}: {problem}"
                break
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            yield f"{path}: exists and is not a socket; remove it or choose another path"


def _cannot_write(path: str) -> str:
    """Why a file can neither be written nor be made there; empty if it can."""
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        return "is a folder"
    try:
        os.stat(f"{folder}/")
    except OSError as error:
        return f"the folder {folder}: {explain(error)}"
    if os.path.exists(path):
        return "" if os.access(path, os.W_OK) else f"{_who()} may not write to it"
    may = os.access(folder, os.W_OK | os.X_OK)
    return "" if may else f"{_who()} may not write in the folder {folder}"


def _who() -> str:
    uid = os.geteuid()
    with contextlib.suppress(KeyError):  # a container's user may have no name
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"
