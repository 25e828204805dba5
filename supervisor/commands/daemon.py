"""The subcommands that start, stop or replace the daemon or its generation of workers."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from cpanbridge.supervisor.commands import common, locating
from cpanbridge.supervisor.commands.common import FAILED, INTERRUPTED, CommandError
from cpanbridge.supervisor.config import ConfigError, Load, Loaded, OperatorError
from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.control.server import Request
from cpanbridge.supervisor.system import daemonize
from cpanbridge.supervisor.system.waiting import readable
from cpanbridge.supervisor.wording import count_of, explain_with_path

if TYPE_CHECKING:
    from cpanbridge.supervisor.processes.context import Mains


def run(options: argparse.Namespace) -> int:
    reasons: list[str] = []
    terminal = os.dup(2)  # for the reason why it does not start: log_file replaces standard error

    def on_ready(reason: str | None) -> None:
        if reason:
            reasons.append(reason)

    try:
        status = _serve(partial(common.load, options), on_ready, "run")
    finally:
        os.dup2(terminal, 2)
    if status and reasons:
        raise CommandError(f"not started: {reasons[0]}")
    return status


def start(options: argparse.Namespace) -> None:
    loaded = _load_for_background(options)
    settings = loaded.settings
    load_again = partial(_load_for_background, options)
    target = client.Target(settings.sockets[0], locating.user_of(settings))
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
    return bool(readable([descriptor], seconds))


def take_over(options: argparse.Namespace) -> int:
    """`cpanbridged run` or `start`, executed by a running master that it is to replace."""
    from cpanbridge.supervisor import daemon  # as in `_mains`

    if options.command == "run":
        return daemon.take_over(partial(common.load, options), _mains("run"))
    return daemon.take_over(partial(_load_for_background, options), _mains("start"))


def _serve(load: Load, on_ready: Callable[[str | None], None], command: str) -> int:
    """Be the daemon that a subcommand, `run` or `start`, starts; the exit status."""
    from cpanbridge.supervisor import daemon  # as in `_mains`

    return daemon.serve(load, _mains(command), on_ready)


def _mains(command: str) -> "Mains":
    """Only here the two sides meet: the rest of the supervisor receives what the forked processes
    run, and imports nothing of `workers`.
    """
    # Not at the top: the other commands would take half as long again to start.
    from cpanbridge.supervisor.processes.context import Mains
    from cpanbridge.workers import template, worker

    return Mains(worker.run, template.run, command)


def stop(options: argparse.Namespace) -> None:
    target = locating.locate(options)
    with client.shown_progress() as show:
        stopped = client.stop(target, show)
    print(f"Stopped: {stopped}")


def restart(options: argparse.Namespace) -> None:
    """The master that runs starts the next one and passes its sockets on: they are never closed.

    Without --config that is started as the running one was, with what --set says besides.
    """
    folder, arguments = None, [f"--set={each}" for each in options.set]
    if options.config:
        folder = options.folder
        arguments.append(f"--config={locating.file_of(options)}")
        arguments += [f"--socket={options.socket}"] if options.socket else []
    try:
        target = locating.locate(options)
        request = Request("restart", arguments, folder)
        state = _replace_master(target, request, "not restarted")
    except client.NotRunningError:
        start(options)
        return
    except ConfigError as error:
        raise CommandError(f"not restarted, nothing has changed: {error}") from None
    print(
        f"Restarted: pid {state['pid'] or state['own_pid']}, "
        f"{count_of(state['workers_wanted'], 'worker')}, "
        f"listening on {', '.join(state['sockets'])}, log {state['log_file']}"
    )


def reload(options: argparse.Namespace) -> None:
    target = _target_of_own_file(options, "reload", "not reloaded")
    result = _request(target, Request("reload"), "not reloaded")
    workers = count_of(result["workers"], "worker")
    print(f"Reloaded: generation {result['generation']}, {workers}")


def reopen(options: argparse.Namespace) -> None:
    _request(locating.locate(options), Request("reopen"), "not reopened")
    print("Logs reopened")


def upgrade(options: argparse.Namespace) -> None:
    target = _target_of_own_file(options, "upgrade", "not upgraded")
    state = _replace_master(target, Request("upgrade"), "not upgraded")
    print(f"Upgraded: pid {state['pid'] or state['own_pid']}")


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
        return _serve(load_again, report, "start")
    except OperatorError as error:
        report(str(error))
        return FAILED
    except OSError as error:  # what is missing at the start; later the loop goes on
        report(explain_with_path(error))
        return FAILED


def _request(target: client.Target, request: Request, failure: str) -> dict[str, Any]:
    """The result of a command that the running daemon executes."""
    try:
        with client.shown_progress() as show:
            result: dict[str, Any] = client.ask(target, request, None, show)
        return result
    except client.NotRunningError:
        raise
    except client.EndedError as error:
        raise CommandError(f"{failure}, as far as is known: {error}") from None
    except client.ControlError as error:
        raise CommandError(f"{failure}, nothing has changed: {error}") from None


def _replace_master(target: client.Target, request: Request, failure: str) -> dict[str, Any]:
    """Have a new master take over; its status when its own workers serve."""
    sockets = _request(target, request, failure)["sockets"]
    return client.wait_until_running(target._replace(path=sockets[0]))


def _target_of_own_file(options: argparse.Namespace, command: str, failure: str) -> client.Target:
    """The daemon that is to read its own file again, with the flags of its start.

    Raises CommandError when the options name another file, or flags: they would have no effect.
    """
    try:
        target = locating.locate(options)
    except ConfigError as error:
        raise CommandError(f"{failure}, nothing has changed: {error}") from None
    reads = client.describe(target).get("configuration")
    if reads is None:
        return target  # it does not answer, as the command will find
    told = f"{failure}, nothing has changed: the daemon at {target.path} reads {reads}"
    if options.config and os.path.realpath(locating.file_of(options)) != os.path.realpath(reads):
        other = f"{told}, not {options.config}; restart -c {options.config} changes that"
        raise CommandError(other)
    if options.set:
        raise CommandError(
            f"{told}, and {command} takes no --set; put {options.set[0]} into the file, "
            "or restart with it"
        )
    return target
