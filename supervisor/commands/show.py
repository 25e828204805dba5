"""The subcommands that print: the daemon's state and numbers, its configuration, one call's result.

`reports.prometheus` and `control.top` are imported in the functions that need them: the daemon runs
in the process of `run` and `start`, and would pay for prometheus-client and rich with memory.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from cpanbridge.supervisor.commands.common import (
    DONE,
    NOT_RUNNING,
    WRONG_USAGE,
    load,
    load_modules,
    locate,
    report_not_running,
)
from cpanbridge.supervisor.control import client, one_call
from cpanbridge.supervisor.listening import listener
from cpanbridge.supervisor.reports.status import load_lines, when
from cpanbridge.supervisor.system.log_text import format_duration
from cpanbridge.supervisor.system.privileges import identity


def status(options: argparse.Namespace) -> int:
    """`cpanbridged status`."""
    settings = locate(options)
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


def metrics(options: argparse.Namespace) -> int:
    """`cpanbridged metrics`."""
    settings = locate(options)
    numbers = client.numbers(settings)
    if numbers is None:
        return report_not_running(settings)
    if options.json:
        print(json.dumps(numbers["metrics"]))
    else:
        from cpanbridge.supervisor.reports import prometheus

        sys.stdout.write(prometheus.text(numbers))
    return DONE


def top(options: argparse.Namespace) -> int:
    """`cpanbridged top`."""
    if not options.once and not sys.stdout.isatty():
        print("cpanbridged: top needs a terminal; --once prints one screen", file=sys.stderr)
        return WRONG_USAGE
    settings = locate(options)
    if client.master_pid(settings) is None:
        return report_not_running(settings)
    from cpanbridge.supervisor.control import top as live

    if options.once:
        found = live.print_once(settings, options.interval)
        return DONE if found else report_not_running(settings)
    live.run(settings, options.interval)
    return DONE


def check(options: argparse.Namespace) -> int:
    """`cpanbridged check`."""
    loaded = load(options)
    settings = loaded.settings
    daemon_identity = identity(settings)
    for path in settings.sockets:
        if settings.listen is not None:
            owner = daemon_identity.uid if daemon_identity is not None else None
            listener.prepare_folder(path, create=False, owner=owner)
    listener.group_id(settings.socket_group)
    with _output_to_standard_error():
        registry = load_modules(settings)
    print(f"configuration: {loaded.source}: fine")
    for warning in loaded.warnings:
        print(f"note: {warning}")
    print(f"sockets: {', '.join(settings.sockets)}")
    print(f"workers: {settings.worker_count}")
    for name in registry.names:
        functions = ", ".join(registry.functions_of(name)) or "no functions"
        print(f"module {name} (affinity {registry.affinity_of(name)}): {functions}")
    for name, reason in registry.left_out.items():
        print(f"module {name}: left out: {reason}")
    return DONE


@contextlib.contextmanager
def _output_to_standard_error() -> Iterator[None]:
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
        options.socket or os.environ.get("CPAN_BRIDGE_SOCKET") or load(options).settings.sockets[0]
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
    except UnicodeEncodeError:  # JSON's own escapes lose nothing
        text = json.dumps(result, indent=2)
    print(text)
    return DONE


def _strict_json(text: str) -> Any:
    """A JSON value; Python's extensions NaN and Infinity are refused. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if math.isinf(value := float(number)):
            raise ValueError(f"{number} is out of range")
        return value

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate: UnicodeEncodeError
    return value
