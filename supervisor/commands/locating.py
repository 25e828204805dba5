"""Where the daemon is that a subcommand is for, whatever has become of its configuration since.

A daemon runs on with the configuration that it has read, while the file gets a mistake, is removed,
or cannot be read. So a file with a mistake is believed in what says where the daemon is; and where
it cannot say even that, the daemons that run are asked which file they read.
"""

import argparse
import contextlib
import os
import pwd
import tomllib
from pathlib import Path
from typing import Any

from cpanbridge.supervisor import config, config_sources
from cpanbridge.supervisor.commands import common
from cpanbridge.supervisor.config import ConfigError, OperatorError, Settings
from cpanbridge.supervisor.control import client, search
from cpanbridge.supervisor.control.client import Target
from cpanbridge.supervisor.system import privileges
from cpanbridge.supervisor.system.privileges import PrivilegeError


def locate(options: argparse.Namespace) -> Target:
    """The place of the daemon that these options are for, running or not.

    Raises ConfigError when they do not tell it, not even with the help of the daemons that run.
    """
    try:
        settings = common.load(options).settings
    except ConfigError as error:
        path = _named_path(options) or _path_in_file(options)
        return Target(path, _owner_of(path, options)) if path else _ask_daemons(options, error)
    paths = settings.listen or config.default_sockets()
    target = _first_running([Target(path, user_of(settings)) for path in paths])
    defaults = options.config is None and settings.listen is None
    if defaults and not Path(config.DEFAULT_FILE).exists() and not client.is_running(target):
        missing = ConfigError(f"{config.DEFAULT_FILE}: does not exist")
        with contextlib.suppress(ConfigError):
            return _ask_daemons(options, missing)
    return target


def _first_running(targets: list[Target]) -> Target:
    """The first at which a daemon runs, or else the first."""
    for target in targets:
        with contextlib.suppress(OperatorError):  # not to be trusted there
            if client.is_running(target):
                return target
    return targets[0]


def file_of(options: argparse.Namespace) -> str:
    """The absolute path of the configuration file that these options select."""
    return config_sources.absolute(options.config or config.DEFAULT_FILE, options.folder)


def user_of(settings: Settings) -> int | None:
    """The user whom a daemon with these settings belongs to; None: not set, or there is none."""
    try:
        user = privileges.identity(settings)
    except PrivilegeError:
        return None  # there is no such user any more
    return user.uid if user is not None else None


def _named_path(options: argparse.Namespace) -> str | None:
    """The socket path that an option or the environment names."""
    flags = [each.partition("=") for each in options.set]
    listens = [text for key, _, text in flags if key.strip() == "listen"]
    named = options.socket or (listens[-1] if listens else os.environ.get("CPAN_BRIDGE_SOCKET"))
    return next(iter(config_sources.paths_in(named or "")), None)


def _table(options: argparse.Namespace) -> dict[str, Any]:
    """The file as far as it is TOML."""
    try:
        return tomllib.loads(Path(file_of(options)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _path_in_file(options: argparse.Namespace) -> str | None:
    listen = _table(options).get("listen")
    first = listen[0] if isinstance(listen, list) and listen else None
    return first if isinstance(first, str) and first else None


def _owner_of(path: str, options: argparse.Namespace) -> int | None:
    """The user whose daemon may be at a path, as far as a file with a mistake tells.

    Whose socket root names, root trusts.
    """
    user = _table(options).get("user")
    with contextlib.suppress(KeyError, OSError):
        if isinstance(user, str):
            return pwd.getpwnam(user).pw_uid
        if os.getuid() == 0 and options.socket:
            return os.stat(os.path.dirname(os.path.abspath(path))).st_uid
    return None


def _ask_daemons(options: argparse.Namespace, error: ConfigError) -> Target:
    """The one daemon that reads the file. Raises the error, with advice, when that is not clear."""
    found = search.daemons_of(file_of(options))
    if len(found) == 1:
        return found[0]
    advice = "--socket PATH names the daemon"
    if found:
        advice += f"; these read this file: {', '.join(each.path for each in found)}"
    raise ConfigError(*error.problems, advice)
