"""The `cpanbridged` command: the one place where all parts are put together.

Exit status: 0 done, 1 failed (one line on standard error says what and what to do), 2 wrong usage,
3 not running.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import psutil
from cpanbridge.supervisor import background, client, config, listener, logs
from cpanbridge.supervisor.instance import Instance, InstanceError, running_pid
from cpanbridge.supervisor.listener import Listener, ListenError
from cpanbridge.supervisor.logs import LogError
from cpanbridge.supervisor.master import KILL_MARGIN, Master
from cpanbridge.supervisor.reports import format_duration
from cpanbridge.supervisor.version import __version__
from cpanbridge.workers import modules, worker
from cpanbridge.workers.modules import ModuleLoadError

DONE, FAILED, WRONG_USAGE, NOT_RUNNING = 0, 1, 2, 3
_STOP_MARGIN = 10.0
_SPARE_DESCRIPTORS = 128


class CommandError(Exception):
    """The command failed: one line that says what, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    _open_standard_descriptors()
    options = _parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except (
        CommandError,
        config.ConfigError,
        InstanceError,
        ListenError,
        LogError,
        ModuleLoadError,
        client.CallError,
    ) as error:
        print(f"cpanbridged: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _open_standard_descriptors() -> None:
    """Whoever starts the command may have closed 0 to 2; nothing else must get these numbers."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)


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
    add("restart", "Stop, if it runs, and start again; a bad configuration changes nothing.")
    status = add("status", "Say whether it runs, and with which workers.")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    add("check", "Check the configuration and the imports, without starting.")
    call = add("call", "Make one call and print its result as JSON.")
    call.add_argument("module", metavar="MODULE")
    call.add_argument("function", metavar="FUNCTION")
    call.add_argument("params", metavar="JSON", nargs="?", default="null")
    call.add_argument("--timeout", type=float, default=60.0, help="seconds to wait (60)")
    return parser


def _load(options: argparse.Namespace) -> config.Loaded:
    flags = list(options.set)
    if options.socket:
        flags.append(f"listen={options.socket}")
    return config.load(options.config, flags)


# -- run, start --


def run(options: argparse.Namespace) -> int:
    """`cpanbridged run`."""
    loaded = _load(options)
    reasons: list[str] = []
    status = _serve(loaded, lambda reason: reasons.append(reason) if reason else None)
    if status and reasons:
        raise CommandError(f"not started: {reasons[0]}")
    return status


def start(options: argparse.Namespace) -> int:
    """`cpanbridged start`."""
    return _start(_load(options))


def _start(loaded: config.Loaded) -> int:
    settings = loaded.settings
    if settings.log_file == "stderr":
        # A daemon in the background has no standard error to speak of.
        log_file = settings.sockets[0].removesuffix(".sock") + ".log"
        settings = msgspec.structs.replace(settings, log_file=log_file)
    loaded = msgspec.structs.replace(loaded, settings=settings)
    outcome = background.start(lambda tell: _serve_and_tell(loaded, tell))
    if outcome.error is not None:
        raise CommandError(f"not started: {outcome.error}")
    print(
        f"Started: pid {outcome.pid}, {settings.worker_count} workers, "
        f"listening on {', '.join(settings.sockets)}, log {settings.log_file}"
    )
    return DONE


def _serve_and_tell(loaded: config.Loaded, tell: Callable[[str | None], None]) -> int:
    try:
        return _serve(loaded, tell)
    except (InstanceError, ListenError, LogError) as error:
        tell(str(error))
        return FAILED


def _serve(loaded: config.Loaded, on_ready: Callable[[str | None], None]) -> int:
    """Be the master, from locking the socket paths to giving them back."""
    settings = loaded.settings
    for path in settings.sockets:
        listener.prepare_folder(path, create=settings.listen is None)
    instance = Instance(settings.sockets)
    instance.acquire()
    listeners: list[Listener] = []
    try:
        logs.configure(
            settings.log_file, settings.security_log, settings.log_format, settings.debug
        )
        for note in loaded.notes:
            logs.LOGGER.warning("%s", note)
        _raise_descriptor_limit(settings)
        mode = int(settings.socket_mode, 8)
        for path in settings.sockets:
            listeners.append(listener.listen(path, mode, settings.socket_group, instance.unclean))
        return Master(settings, loaded.source, listeners, worker.run, on_ready).run()
    finally:
        for each in listeners:
            each.unlink()
        instance.release()


def _raise_descriptor_limit(settings: config.Settings) -> None:
    needed = settings.limits.max_connections + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    if hard < needed:
        logs.LOGGER.warning(
            "limits.max_connections = %d needs %d file descriptors, but only %d are allowed: "
            "raise the limit (ulimit -n, LimitNOFILE=)",
            settings.limits.max_connections,
            needed,
            hard,
        )


# -- stop, restart, status --


def stop(options: argparse.Namespace) -> int:
    """`cpanbridged stop`."""
    settings = _load(options).settings
    pid = _stop(settings)
    if pid is None:
        print(f"cpanbridged: not running at {settings.sockets[0]}", file=sys.stderr)
        return NOT_RUNNING
    print(f"Stopped: pid {pid}")
    return DONE


def restart(options: argparse.Namespace) -> int:
    """`cpanbridged restart`."""
    loaded = _load(options)  # raises before anything is stopped
    pid = _stop(loaded.settings)
    if pid is not None:
        print(f"Stopped: pid {pid}")
    return _start(loaded)


def _stop(settings: config.Settings) -> int | None:
    """Stop the daemon and wait until it has ended; returns its pid, None if none runs."""
    path = settings.sockets[0]
    pid = running_pid(path)
    if pid is None:
        return None
    seconds = settings.limits.graceful_timeout + KILL_MARGIN + _STOP_MARGIN
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid  # it has ended this moment
    try:
        if running_pid(path) != pid:  # the handle may be another process's, which reused the pid
            raise CommandError(f"the daemon at {path} changed while it was looked at; try again")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise CommandError(
                f"pid {pid} is still stopping after {seconds:g} s; kill -QUIT {pid} ends it at once"
            )
    except PermissionError:
        raise CommandError(f"not allowed to stop pid {pid}: it is another user's") from None
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return pid


def status(options: argparse.Namespace) -> int:
    """`cpanbridged status`."""
    settings = _load(options).settings
    pid = running_pid(settings.sockets[0])
    state = _describe(pid, settings) if pid is not None else None
    if options.json:
        print(json.dumps(state or {"running": False, "sockets": settings.sockets}))
    elif state is None:
        print(f"not running at {settings.sockets[0]}")
    else:
        up = format_duration(state["uptime_seconds"])
        print(f"running: pid {pid}, up {up}, listening on {', '.join(state['sockets'])}")
        for each in state["workers"]:
            print(f"  pid {each['pid']}: {each['title']}")
    return DONE if state else NOT_RUNNING


def _describe(pid: int, settings: config.Settings) -> dict[str, Any] | None:
    """What the kernel knows of the daemon's processes, whatever state they are in."""
    workers = []
    try:
        master = psutil.Process(pid)
        for child in master.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline()).strip()
                workers.append({"pid": child.pid, "title": title.removeprefix("cpanbridged: ")})
        uptime = max(0.0, time.time() - master.create_time())
    except psutil.NoSuchProcess:
        return None
    return {
        "running": True,
        "pid": pid,
        "uptime_seconds": uptime,
        "sockets": settings.sockets,
        "workers": sorted(workers, key=lambda each: each["title"]),
    }


# -- check, call --


def check(options: argparse.Namespace) -> int:
    """`cpanbridged check`."""
    loaded = _load(options)
    settings = loaded.settings
    for path in settings.sockets:
        if settings.listen is not None:
            listener.prepare_folder(path, create=False)
    with _output_to_standard_error():
        registry = modules.load(settings, {})
    print(f"configuration: {loaded.source}: fine")
    for note in loaded.notes:
        print(f"note: {note}")
    print(f"sockets: {', '.join(settings.sockets)}")
    print(f"workers: {settings.worker_count}")
    for name in registry.names:
        print(f"module {name}: {', '.join(registry.functions_of(name)) or 'no functions'}")
    return DONE


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
        params = json.loads(options.params)
    except ValueError as error:
        print(f"cpanbridged: JSON: {error}", file=sys.stderr)
        return WRONG_USAGE
    try:
        result = client.call(path, options.module, options.function, params, options.timeout)
    except client.NotRunningError as error:
        print(f"cpanbridged: not running: {error}; try cpanbridged start", file=sys.stderr)
        return NOT_RUNNING
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "start": start,
    "stop": stop,
    "restart": restart,
    "status": status,
    "check": check,
    "call": call,
}

if __name__ == "__main__":
    sys.exit(main())
