"""What the subcommands share: exit statuses, the settings that their options select, one error."""

import argparse
import sys

from cpanbridge.supervisor import config
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.loader import Loader
from cpanbridge.workers.modules.registry import Registry

DONE, FAILED, WRONG_USAGE, NOT_RUNNING = 0, 1, 2, 3


class CommandError(Exception):
    """The command failed: one line that says what, and what to do."""


def load(options: argparse.Namespace) -> config.Loaded:
    """The configuration with the flags of the command line. Raises ConfigError."""
    flags = list(options.set)
    if options.socket:
        flags.append(f"listen={options.socket}")
    return config.load(options.config, flags)


def locate(options: argparse.Namespace) -> config.Settings:
    """The settings that a running daemon is found by. Raises ConfigError.

    With --socket also when the file has a mistake by now: the daemon runs all the same.
    """
    try:
        return load(options).settings
    except config.ConfigError:
        if not options.socket:
            raise
        return config.Settings(listen=options.socket.split(","))


def load_modules(settings: config.Settings) -> Registry:
    """Import all that is exposed, as a worker would. Raises ModuleLoadError."""
    return Loader(settings, builtin.NAMES).load(
        builtin.built_in(Shared.create(1, settings.limits), settings, list)
    )


def report_not_running(settings: config.Settings) -> int:
    """Say on standard error that no daemon runs; returns the exit status."""
    print(f"cpanbridged: not running at {settings.sockets[0]}", file=sys.stderr)
    return NOT_RUNNING
