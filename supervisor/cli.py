"""The `cpanbridged` command: the one place where all parts are put together.

Exit status: 0 done, 1 failed (one line on standard error says what and what to do), 2 wrong usage,
3 not running.
"""

import argparse
import codecs
import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from cpanbridge.supervisor import config
from cpanbridge.supervisor.control import client, one_call
from cpanbridge.supervisor.daemon import serve, take_over
from cpanbridge.supervisor.lifecycle.upgrade import VARIABLE, UpgradeError
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.listening.instance import InstanceError
from cpanbridge.supervisor.listening.listener import ListenError
from cpanbridge.supervisor.memory.layout import Shared
from cpanbridge.supervisor.processes.context import Mains
from cpanbridge.supervisor.reports.status import load_lines, when
from cpanbridge.supervisor.system import daemonize
from cpanbridge.supervisor.system.log_text import format_duration
from cpanbridge.supervisor.system.logs import LogError
from cpanbridge.supervisor.system.privileges import PrivilegeError, identity
from cpanbridge.supervisor.version import __version__
from cpanbridge.workers import template, worker
from cpanbridge.workers.modules import builtin
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.registry import Registry

MAINS = Mains(worker.run, template.run)

DONE, FAILED, WRONG_USAGE, NOT_RUNNING = 0, 1, 2, 3


class CommandError(Exception):
    """The command failed: one line that says what, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    _open_standard_descriptors()
    options = _parser().parse_args(arguments)
    try:
        if VARIABLE in os.environ:
            load = _load if options.command == "run" else _load_for_background
            return take_over(partial(load, options), MAINS)
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except (
        CommandError,
        client.ControlError,
        config.ConfigError,
        InstanceError,
        ListenError,
        LogError,
        ModuleLoadError,
        one_call.CallError,
        UpgradeError,
        PrivilegeError,
    ) as error:
        print(f"cpanbridged: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever reads the output has left; what was asked for is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _open_standard_descriptors() -> None:
    """Whoever starts the command may have closed 0 to 2; nothing else must get these numbers."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    # Python has none for a descriptor that it found closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # What its encoding lacks is shown escaped, as on standard error; a path stays as it is.
    codecs.register_error("escape", _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="escape")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-c", "--config", metavar="FILE", help="instead of " + config.DEFAULT_FILE)
    common.add_argument("-s", "--socket", metavar="PATH", help="the socket path, as listen sets it")
    common.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the file, such as limits.max_connections=50; repeatable",
    )
    parser = argparse.ArgumentParser(
        prog="cpanbridged",
        description="The resident daemon that lets Perl scripts call Python over a Unix socket.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 not running.",
    )
    parser.add_argument("--version", action="version", version=f"cpanbridged {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text, description=text)

    add("run", "Run in the foreground, until stopped (for systemd, containers).")
    add("start", "Start in the background; returns when all workers are ready.")
    add("stop", "Stop: running requests finish, up to limits.graceful_timeout.")
    add(
        "reload", "Change over to the configuration and modules as they are now, or change nothing."
    )
    add("upgrade", "Hand over to a new master, of the code that is on disk now, without a break.")
    add("restart", "Stop, if it runs, and start again; a bad configuration changes nothing.")
    status = add("status", "Say whether it runs, and with which workers.")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    metrics = add("metrics", "The numbers, once, as Prometheus reads them.")
    metrics.add_argument("--json", action="store_true", help="as system.metrics tells them")
    top = add("top", "The numbers, live: q ends, t and c order the functions by time and calls.")
    top.add_argument("--interval", type=_interval, default=1.0, help="seconds between looks (1)")
    top.add_argument("--once", action="store_true", help="print one screen; needs no terminal")
    add("check", "Check the configuration and the imports, without starting.")
    call = add("call", "Make one call and print its result as JSON.")
    call.add_argument("module", metavar="MODULE")
    call.add_argument("function", metavar="FUNCTION")
    call.add_argument("params", metavar="JSON", nargs="?", default="null")
    call.add_argument("--timeout", type=_seconds, default=60.0, help="seconds to wait (60)")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= config.LONGEST_SECONDS:
        raise ValueError
    return seconds


def _interval(text: str) -> float:
    return max(0.1, _seconds(text))  # the master has other things to do as well


def _strict_json(text: str) -> Any:
    """JSON with nothing that JSON does not have. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if math.isinf(value := float(number)):
            raise ValueError(f"{number} is out of range")
        return value

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates: UnicodeEncodeError
    return value


def _load(options: argparse.Namespace) -> config.Loaded:
    flags = list(options.set)
    if options.socket:
        flags.append(f"listen={options.socket}")
    return config.load(options.config, flags)


def _locate(options: argparse.Namespace) -> config.Settings:
    """The settings that a running daemon is found by.

    With --socket also when the file has a mistake by now: the daemon runs all the same.
    """
    try:
        return _load(options).settings
    except config.ConfigError:
        if not options.socket:
            raise
        return config.Settings(listen=options.socket.split(","))


# -- run, start --


def run(options: argparse.Namespace) -> int:
    """`cpanbridged run`."""
    reasons: list[str] = []
    terminal = os.dup(2)  # to say why it does not start: log_file takes standard error's place
    try:
        status = serve(
            lambda: _load(options),
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
    load = partial(_load_for_background, options)
    with client.shown_progress() as show:
        outcome = daemonize.start(
            lambda tell: _serve_and_tell(load, tell),
            lambda pipe: client.watch_until(pipe, settings, show),
        )
    if outcome.error is not None:
        raise CommandError(f"not started: {outcome.error}")
    print(
        f"Started: pid {outcome.pid}, {settings.worker_count} workers, "
        f"listening on {', '.join(settings.sockets)}, log {settings.log_file}"
    )
    return DONE


def _load_for_background(options: argparse.Namespace) -> config.Loaded:
    """A daemon in the background has no standard error to speak of, so it needs a log file."""
    loaded = _load(options)
    settings = loaded.settings
    if settings.log_file != "stderr":
        return loaded
    log_file = settings.sockets[0].removesuffix(".sock") + ".log"
    settings = msgspec.structs.replace(settings, log_file=log_file)
    return msgspec.structs.replace(loaded, settings=settings, follow_link=False)


def _serve_and_tell(load: config.Load, tell: Callable[[str | None], None]) -> int:
    try:
        return serve(load, MAINS, tell)
    except (config.ConfigError, InstanceError, ListenError, LogError, PrivilegeError) as error:
        tell(str(error))
        return FAILED


# -- stop, restart, status, metrics, top --


def stop(options: argparse.Namespace) -> int:
    """`cpanbridged stop`."""
    settings = _locate(options)
    with client.shown_progress() as show:
        pid = client.stop(settings, show)
    if pid is None:
        return _not_running(settings)
    print(f"Stopped: pid {pid}")
    return DONE


def restart(options: argparse.Namespace) -> int:
    """`cpanbridged restart`."""
    settings = _load(options).settings
    # All that can be known to fail is tried before anything is stopped.
    listener.group_id(settings.socket_group)
    error = daemonize.try_in_child(lambda: _load_modules(settings))
    if error is not None:
        raise CommandError(f"nothing stopped, because it would not start again: {error}")
    with client.shown_progress() as show:
        pid = client.stop(settings, show)
    if pid is not None:
        print(f"Stopped: pid {pid}")
    return start(options)


def reload(options: argparse.Namespace) -> int:
    """`cpanbridged reload`."""
    done = _have_done(options, "reload", "not reloaded")
    if done is None:
        return NOT_RUNNING
    print(f"Reloaded: generation {done['generation']}, {done['workers']} workers")
    return DONE


def upgrade(options: argparse.Namespace) -> int:
    """`cpanbridged upgrade`."""
    done = _have_done(options, "upgrade", "not upgraded")
    if done is None:
        return NOT_RUNNING
    with client.shown_progress() as show:
        client.wait_until_running(_locate(options), show)
    print(f"Upgraded: pid {done['pid']}")
    return DONE


def _have_done(options: argparse.Namespace, command: str, failure: str) -> Any:
    """The result of what the running daemon is asked to do; None when none runs."""
    try:
        settings = _locate(options)
        if client.master_pid(settings) is None:
            print(f"cpanbridged: not running at {settings.sockets[0]}", file=sys.stderr)
            return None
        with client.shown_progress() as show:
            return client.ask(settings, command, None, show)
    except client.EndedError as error:
        raise CommandError(f"{failure}, as far as is known: {error}") from None
    except (config.ConfigError, client.ControlError, PrivilegeError) as error:
        raise CommandError(f"{failure}, nothing has changed: {error}") from None


def metrics(options: argparse.Namespace) -> int:
    """`cpanbridged metrics`."""
    settings = _locate(options)
    numbers = client.numbers(settings)
    if numbers is None:
        return _not_running(settings)
    if options.json:
        print(json.dumps(numbers["metrics"]))
    else:
        # Not at the top: the daemon would pay for the library with memory.
        from cpanbridge.supervisor.reports import prometheus

        sys.stdout.write(prometheus.text(numbers))
    return DONE


def top(options: argparse.Namespace) -> int:
    """`cpanbridged top`."""
    if not options.once and not sys.stdout.isatty():
        print("cpanbridged: top needs a terminal; --once prints one screen", file=sys.stderr)
        return WRONG_USAGE
    settings = _locate(options)
    if client.master_pid(settings) is None:
        return _not_running(settings)
    from cpanbridge.supervisor.control import top as live

    if options.once:
        return DONE if live.print_once(settings, options.interval) else _not_running(settings)
    live.run(settings, options.interval)
    return DONE


def _not_running(settings: config.Settings) -> int:
    print(f"cpanbridged: not running at {settings.sockets[0]}", file=sys.stderr)
    return NOT_RUNNING


def status(options: argparse.Namespace) -> int:
    """`cpanbridged status`."""
    settings = _locate(options)
    pid = client.master_pid(settings)
    state = client.describe(pid, settings) if pid is not None else None
    if options.json:
        print(json.dumps(state or {"running": False, "sockets": settings.sockets}))
    elif state is None:
        print(f"not running at {settings.sockets[0]}")
    else:
        _print_status(state)
    return DONE if state else NOT_RUNNING


def _print_status(state: dict[str, Any]) -> None:
    up = format_duration(state["uptime_seconds"])
    print(
        f"{state['state']}: pid {state['pid']}, up {up}, listening on {', '.join(state['sockets'])}"
    )
    if "gate" in state:
        for line in load_lines(state["gate"], state["resource_status"]):
            print(f"  {line}")
    for each in state.get("templates", ()):
        print(f"  pid {each['pid']}: template gen {each['generation']} {each['state']}")
    for each in state["workers"]:
        print(f"  pid {each['pid']}: {each['title']}")
    if "problem" in state:
        print(f"  the master does not answer: {state['problem']}")
    last = state.get("last_reload")
    if last is not None:
        how = f"failed: {last['error']}" if last["error"] else f"generation {last['generation']}"
        print(f"  last reload, {when(last['at'])}: {how}")


# -- check, call --


def check(options: argparse.Namespace) -> int:
    """`cpanbridged check`."""
    loaded = _load(options)
    settings = loaded.settings
    whom = identity(settings)
    for path in settings.sockets:
        if settings.listen is not None:
            owner = whom.uid if whom is not None else None
            listener.prepare_folder(path, create=False, owner=owner)
    listener.group_id(settings.socket_group)
    with _output_to_standard_error():
        registry = _load_modules(settings)
    print(f"configuration: {loaded.source}: fine")
    for event in loaded.events:
        print(f"note: {event}")
    print(f"sockets: {', '.join(settings.sockets)}")
    print(f"workers: {settings.worker_count}")
    for name in registry.names:
        functions = ", ".join(registry.functions_of(name)) or "no functions"
        print(f"module {name} (affinity {registry.affinity_of(name)}): {functions}")
    for name, reason in registry.left_out.items():
        print(f"module {name}: left out: {reason}")
    return DONE


def _load_modules(settings: config.Settings) -> Registry:
    """Import all that is exposed, as a worker would. Raises ModuleLoadError."""
    return Loader(settings, builtin.NAMES).load(
        builtin.built_in(Shared.create(1, settings.limits), settings, list)
    )


@contextlib.contextmanager
def _output_to_standard_error() -> Any:
    """What modules print while they are imported is not the command's answer."""
    kept = os.dup(1)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def call(options: argparse.Namespace) -> int:
    """`cpanbridged call`."""
    path = (
        options.socket or os.environ.get("CPAN_BRIDGE_SOCKET") or _load(options).settings.sockets[0]
    )
    try:
        params = _strict_json(options.params)
    except ValueError as error:
        print(f"cpanbridged: JSON: {error}", file=sys.stderr)
        return WRONG_USAGE
    try:
        result = one_call.call(path, options.module, options.function, params, options.timeout)
    except one_call.NotRunningError as error:
        print(f"cpanbridged: not running: {error}; try cpanbridged start", file=sys.stderr)
        return NOT_RUNNING
    text = json.dumps(result, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # escaped as JSON has it: nothing is altered
        text = json.dumps(result, indent=2)
    print(text)
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "start": start,
    "stop": stop,
    "reload": reload,
    "upgrade": upgrade,
    "restart": restart,
    "status": status,
    "metrics": metrics,
    "top": top,
    "check": check,
    "call": call,
}

if __name__ == "__main__":
    sys.exit(main())
