"""The subcommands that start, stop or replace the daemon or its generation of workers."""

import argparse
import contextlib
import os
import select
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from cpanbridge.supervisor.commands import common, locating
from cpanbridge.supervisor.commands.common import FAILED, INTERRUPTED, CommandError
from cpanbridge.supervisor.config import ConfigError, Load, Loaded, OperatorError
from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.system import daemonize
from cpanbridge.supervisor.wording import count_of, explain_with_path


def run(options: argparse.Namespace) -> int:
    reasons: list[str] = []
    terminal = os.dup(2)  # for the reason why it does not start: log_file replaces standard error

    def on_ready(reason: str | None) -> None:
        if reason:
            reasons.append(reason)

    try:
        status = _serve(partial(common.load, options), on_ready)
    finally:
        os.dup2(terminal, 2)
    if status and reasons:
        raise CommandError(f"not started: {reasons[0]}")
    return status


def start(options: argparse.Namespace) -> None:
    loaded = _load_for_background(options)
    settings = loaded.settings
    load_again = partial(_load_for_background, options)
    target = client.Target(settings.sockets[0])
    try:
        with client.shown_progress() as show:
            outcome = daemonize.start(
                lambda report: _serve_in_background(load_again, report),
                lambda pipe: client.watch(target, show, partial(_is_readable, pipe)),
            )
    except KeyboardInterrupt:
        raise CommandError("not started: interrupted", exit_status=INTERRUPTED) from None
    if outcome.error is not None:
        raise CommandError(f"not started: {outcome.error}")
    print(
        f"Started: pid {outcome.pid}, {count_of(settings.worker_count, 'worker')}, "
        f"listening on {', '.join(settings.sockets)}, log {settings.log_file}"
    )
    for warning in loaded.warnings:
        print(f"cpanbridged: warning: {warning}", file=sys.stderr)


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Whether a descriptor is readable within so many seconds."""
    return bool(select.select([descriptor], [], [], seconds)[0])


def take_over(options: argparse.Namespace) -> int:
    """`cpanbridged run` or `start`, executed by a running master that it is to replace."""
    from cpanbridge.supervisor import daemon  # as in `_serve`
    from cpanbridge.supervisor.processes.context import Mains
    from cpanbridge.workers import template, worker

    reader = common.load if options.command == "run" else _load_for_background
    return daemon.take_over(partial(reader, options), Mains(worker.run, template.run))


def _serve(load: Load, on_ready: Callable[[str | None], None]) -> int:
    """Be the daemon; the exit status. Only here the two sides meet: the rest of the supervisor
    receives what the forked processes run, and imports nothing of `workers`.
    """
    # Not at the top: the other commands would take half as long again to start.
    from cpanbridge.supervisor import daemon
    from cpanbridge.supervisor.processes.context import Mains
    from cpanbridge.workers import template, worker

    return daemon.serve(load, Mains(worker.run, template.run), on_ready)


def stop(options: argparse.Namespace) -> None:
    target = locating.locate(options)
    with client.shown_progress() as show:
        stopped = client.stop(target, show)
    print(f"Stopped: {stopped}")


def restart(options: argparse.Namespace) -> None:
    from cpanbridge.supervisor.commands import check  # as in `_serve`

    loaded = _load_for_background(options)
    try:
        check.examine(loaded)  # all that can be known to fail is tried before anything is stopped
    except check.CheckError as error:
        problem = f"nothing stopped, because it would not start again: {error}"
        raise CommandError(problem) from None
    with contextlib.suppress(client.NotRunningError):
        stop(options)
    start(options)


def reload(options: argparse.Namespace) -> None:
    result = _request(options, "reload", "not reloaded")
    workers = count_of(result["workers"], "worker")
    print(f"Reloaded: generation {result['generation']}, {workers}")


def reopen(options: argparse.Namespace) -> None:
    _request(options, "reopen", "not reopened")
    print("Logs reopened")


def upgrade(options: argparse.Namespace) -> None:
    result = _request(options, "upgrade", "not upgraded")
    with client.shown_progress() as show:
        client.wait_until_running(locating.locate(options), show)
    print(f"Upgraded: pid {result['pid']}")


def _load_for_background(options: argparse.Namespace) -> Loaded:
    """The configuration of a daemon without a terminal: it needs a log file."""
    loaded = common.load(options)
    settings = loaded.settings
    if settings.log_file != "stderr":
        return loaded
    log_file = settings.sockets[0].removesuffix(".sock") + ".log"
    settings = msgspec.structs.replace(settings, log_file=log_file)
    return msgspec.structs.replace(loaded, settings=settings, follow_link=False)


def _serve_in_background(load_again: Load, report: Callable[[str | None], None]) -> int:
    """Called in the process that `daemonize` has forked; `report` sends the command an error."""
    try:
        return _serve(load_again, report)
    except OperatorError as error:
        report(str(error))
        return FAILED
    except OSError as error:  # what is missing at the start; later the loop goes on
        report(explain_with_path(error))
        return FAILED


def _request(options: argparse.Namespace, command: str, failure: str) -> Any:
    """The result of a command that the running daemon executes."""
    try:
        target = locating.locate(options)
        _refuse_what_has_no_effect(options, target, command)
        with client.shown_progress() as show:
            return client.ask(target, command, None, show)
    except client.NotRunningError:
        raise
    except client.EndedError as error:
        raise CommandError(f"{failure}, as far as is known: {error}") from None
    except (ConfigError, client.ControlError) as error:
        raise CommandError(f"{failure}, nothing has changed: {error}") from None


def _refuse_what_has_no_effect(
    options: argparse.Namespace, target: client.Target, command: str
) -> None:
    """The daemon reads its own file again, with the flags of its start. Raises ConfigError."""
    reads = client.describe(target).get("configuration")
    if reads is None:
        return  # it does not answer, as the command will find
    told = f"the daemon at {target.path} reads {reads}"
    if options.config and os.path.realpath(locating.file_of(options)) != os.path.realpath(reads):
        raise ConfigError(f"{told}, not {options.config}; restart -c {options.config} changes that")
    if options.set:
        raise ConfigError(
            f"{told}, and {command} takes no --set; put {options.set[0]} into the file, "
            f"or restart with it"
        )
