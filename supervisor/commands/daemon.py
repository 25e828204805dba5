"""The subcommands that start, stop or replace the daemon or its generation of workers."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from cpanbridge.supervisor import daemon
from cpanbridge.supervisor.commands.common import (
    DONE,
    FAILED,
    NOT_RUNNING,
    CommandError,
    load,
    load_modules,
    locate,
    report_not_running,
)
from cpanbridge.supervisor.config import ConfigError, Load, Loaded
from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.listener import ListenError
from cpanbridge.supervisor.processes.context import Mains
from cpanbridge.supervisor.system import daemonize
from cpanbridge.supervisor.system.logs import LogError
from cpanbridge.supervisor.system.privileges import PrivilegeError
from cpanbridge.workers import template, worker

# The master forks processes that run these; it imports no worker code itself.
MAINS = Mains(worker.run, template.run)


def run(options: argparse.Namespace) -> int:
    """`cpanbridged run`."""
    reasons: list[str] = []
    terminal = os.dup(2)  # for the reason why it does not start: log_file replaces standard error
    try:
        status = daemon.serve(
            lambda: load(options),
            MAINS,
            lambda reason: reasons.append(reason) if reason else None,
        )
    finally:
        os.dup2(terminal, 2)
    if status and reasons:
        raise CommandError(f"not started: {reasons[0]}")
    return status


def start(options: argparse.Namespace) -> int:
    """`cpanbridged start`."""
    settings = _load_for_background(options).settings
    load_again = partial(_load_for_background, options)
    with client.shown_progress() as show:
        outcome = daemonize.start(
            lambda report: _serve_in_background(load_again, report),
            lambda pipe: client.watch_until(pipe, settings, show),
        )
    if outcome.error is not None:
        raise CommandError(f"not started: {outcome.error}")
    print(
        f"Started: pid {outcome.pid}, {settings.worker_count} workers, "
        f"listening on {', '.join(settings.sockets)}, log {settings.log_file}"
    )
    return DONE


def take_over(options: argparse.Namespace) -> int:
    """`cpanbridged run` or `start`, executed by a running master that it is to replace."""
    reader = load if options.command == "run" else _load_for_background
    return daemon.take_over(partial(reader, options), MAINS)


def stop(options: argparse.Namespace) -> int:
    """`cpanbridged stop`."""
    settings = locate(options)
    with client.shown_progress() as show:
        pid = client.stop(settings, show)
    if pid is None:
        return report_not_running(settings)
    print(f"Stopped: pid {pid}")
    return DONE


def restart(options: argparse.Namespace) -> int:
    """`cpanbridged restart`."""
    settings = load(options).settings
    # All that can be known to fail is tried before anything is stopped.
    listener.group_id(settings.socket_group)
    error = daemonize.try_in_child(lambda: load_modules(settings))
    if error is not None:
        raise CommandError(f"nothing stopped, because it would not start again: {error}")
    with client.shown_progress() as show:
        pid = client.stop(settings, show)
    if pid is not None:
        print(f"Stopped: pid {pid}")
    return start(options)


def reload(options: argparse.Namespace) -> int:
    """`cpanbridged reload`."""
    result = _request(options, "reload", "not reloaded")
    if result is None:
        return NOT_RUNNING
    print(f"Reloaded: generation {result['generation']}, {result['workers']} workers")
    return DONE


def upgrade(options: argparse.Namespace) -> int:
    """`cpanbridged upgrade`."""
    result = _request(options, "upgrade", "not upgraded")
    if result is None:
        return NOT_RUNNING
    with client.shown_progress() as show:
        client.wait_until_running(locate(options), show)
    print(f"Upgraded: pid {result['pid']}")
    return DONE


def _load_for_background(options: argparse.Namespace) -> Loaded:
    """The configuration of a daemon without a terminal: it needs a log file."""
    loaded = load(options)
    settings = loaded.settings
    if settings.log_file != "stderr":
        return loaded
    log_file = settings.sockets[0].removesuffix(".sock") + ".log"
    settings = msgspec.structs.replace(settings, log_file=log_file)
    return msgspec.structs.replace(loaded, settings=settings, follow_link=False)


def _serve_in_background(load_again: Load, report: Callable[[str | None], None]) -> int:
    """Called in the process that `daemonize` has forked; `report` sends the command an error."""
    try:
        return daemon.serve(load_again, MAINS, report)
    except (ConfigError, InstanceError, ListenError, LogError, PrivilegeError) as error:
        report(str(error))
        return FAILED


def _request(options: argparse.Namespace, command: str, failure: str) -> Any:
    """The result of a command that the running daemon executes; None when none runs."""
    try:
        settings = locate(options)
        if client.master_pid(settings) is None:
            report_not_running(settings)
            return None
        with client.shown_progress() as show:
            return client.ask(settings, command, None, show)
    except client.EndedError as error:
        raise CommandError(f"{failure}, as far as is known: {error}") from None
    except (ConfigError, client.ControlError, PrivilegeError) as error:
        raise CommandError(f"{failure}, nothing has changed: {error}") from None
