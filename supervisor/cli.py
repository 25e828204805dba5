"""The `cpanbridged` command: its options, and one line on standard error for each failure.

Exit status: 0 done, 1 failed (the line says what failed and what to do), 2 wrong usage,
3 not running.
"""

import argparse
import codecs
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cpanbridge.supervisor import config
from cpanbridge.supervisor.commands import daemon, show
from cpanbridge.supervisor.commands.common import INTERRUPTED
from cpanbridge.supervisor.system.log_text import escaped
from cpanbridge.supervisor.version import __version__
from cpanbridge.supervisor.wording import explain_with_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    _open_standard_descriptors()
    options = _parse(arguments)
    try:
        if config.UPGRADE_VARIABLE in os.environ:
            return daemon.take_over(options)
        status: int | None = options.run(options)
        sys.stdout.flush()
        return status or 0
    except config.OperatorError as error:
        for problem in error.problems:
            print(f"cpanbridged: {escaped(problem)}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader of the output has closed it. The command itself is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"cpanbridged: {explain_with_path(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _open_standard_descriptors() -> None:
    """Occupy 0 to 2 where they were closed: no other file may get these numbers."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    # Python sets these to None for a descriptor that it found closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # A character that its encoding lacks is escaped, as on standard error; a path stays as it is.
    codecs.register_error("escape", _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="escape")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    # Flags before the subcommand, which would not be told from its own.
    options.config = options.config or options.config_before
    options.socket = options.socket or options.socket_before
    options.set = options.set_before + options.set
    options.folder = _working_folder()
    return options


def _working_folder() -> str | None:
    """Relative paths start there, also those of a later reload; None when it is gone."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _add_common(parser: argparse.ArgumentParser, suffix: str = "") -> None:
    """The flags of every subcommand; their values' names end with `suffix`."""

    def add(*flags: str, **rest: Any) -> None:
        parser.add_argument(*flags, dest=flags[-1].removeprefix("--") + suffix, **rest)

    add("-c", "--config", type=_path, metavar="FILE", help="instead of " + config.DEFAULT_FILE)
    add("-s", "--socket", type=_path, metavar="PATH", help="the socket path, as listen sets it")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the file, such as limits.max_connections=50; repeatable",
    )


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    _add_common(common)
    parser = argparse.ArgumentParser(
        prog="cpanbridged",
        description="The resident daemon that lets Perl scripts call Python over a Unix socket.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 not running.",
    )
    parser.add_argument("--version", action="version", version=f"cpanbridged {__version__}")
    _add_common(parser, "_before")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        """The subcommand of the function's name."""
        command = commands.add_parser(run.__name__, parents=[common], help=text, description=text)
        command.set_defaults(run=run)
        return command

    add(daemon.run, "Run in the foreground, until stopped (for systemd, containers).")
    add(daemon.start, "Start in the background; returns when all workers are ready.")
    add(daemon.stop, "Stop: running requests finish, up to limits.graceful_timeout.")
    add(
        daemon.reload, "Switch to the configuration and modules as they are now, or change nothing."
    )
    add(daemon.reopen, "Continue in new log files of the same names: the old ones were renamed.")
    add(
        daemon.upgrade,
        "Replace the master, without a break, by one of the code that is on disk now.",
    )
    add(
        daemon.restart,
        "Begin anew with the same sockets, or start if none runs; a bad configuration changes "
        "nothing. Without -c: with the file and flags of the running one.",
    )
    status = add(show.status, "Show whether it runs, its load and its workers.")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    metrics = add(show.metrics, "Print the numbers once, in Prometheus' text format.")
    metrics.add_argument("--json", action="store_true", help="in the form of system.metrics")
    top = add(
        show.top, "Show the numbers live; q ends, t and c sort the functions by time and calls."
    )
    top.add_argument("--interval", type=_interval, default=1.0, help="seconds between updates (1)")
    top.add_argument("--once", action="store_true", help="print one screen; needs no terminal")
    add(show.check, "Check the configuration, its paths and the imports, without starting.")
    call = add(show.call, "Make one call and print its result as JSON.")
    call.add_argument("module", metavar="MODULE")
    call.add_argument("function", metavar="FUNCTION")
    call.add_argument("params", metavar="JSON", nargs="?", default="null")
    call.add_argument("--timeout", type=_seconds, default=60.0, help="seconds to wait (60)")
    return parser


def _path(text: str) -> str:
    if not text:  # as of an unset variable of a script
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= config.LONGEST_SECONDS:
        raise ValueError
    return seconds


def _interval(text: str) -> float:
    return max(0.1, _seconds(text))  # each screen costs the master some milliseconds


if __name__ == "__main__":
    sys.exit(main())
