"""The subcommands that print: the daemon's state and numbers, its configuration, one call's result.

`reports.prometheus` and `control.top` are imported in the functions that need them: the daemon runs
in the process of `run` and `start`, and would pay for prometheus-client and rich with memory.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cpanbridge.supervisor.commands import common, locating
from cpanbridge.supervisor.commands.common import FAILED, NOT_RUNNING, WRONG_USAGE, CommandError
from cpanbridge.supervisor.config import default_sockets
from cpanbridge.supervisor.config_sources import paths_in
from cpanbridge.supervisor.control import client, one_call
from cpanbridge.supervisor.control.client import NotRunningError
from cpanbridge.supervisor.reports import surroundings
from cpanbridge.supervisor.system.log_text import TIME, format_duration
from cpanbridge.supervisor.wording import count_of

# The states in which `status` fails: what is there does not serve, as far as is known.
_NOT_SERVING = ("not serving", "unresponsive")


def status(options: argparse.Namespace) -> int:
    target = locating.locate(options)
    try:
        state = client.describe(target)
    except NotRunningError as error:
        not_running = {"running": False, "sockets": [target.path]}
        print(json.dumps(not_running) if options.json else str(error))
        return NOT_RUNNING
    print(json.dumps(state) if options.json else "\n  ".join(_status_lines(state)))
    return FAILED if state["state"] in _NOT_SERVING else 0


def _status_lines(state: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(_first_line(state))
    if "problem" in state:
        yield state["problem"]
    if "gate" in state:
        yield from _load_lines(state["gate"], state["resource_status"])
    if "cgroup_memory" in state:  # it is not told by a daemon of an earlier version
        limit = state["resource_status"]["memory_limit"]
        yield from _surroundings_lines(limit, state)
    for each in state.get("templates", ()):
        yield f"pid {each['pid']}: template gen {each['generation']} {each['state']}"
    for each in state["workers"]:
        yield f"pid {each['pid']}: {each['title']}" if each["pid"] else each["title"]
    for each in state.get("lost", ()):
        yield _loss_line(each)
    last = state.get("last_reload")
    if last is not None:
        when = time.strftime(TIME, time.localtime(last["at"]))
        how = f"failed: {last['error']}" if last["error"] else f"generation {last['generation']}"
        yield f"last reload, {when}: {how}"


def _first_line(state: dict[str, Any]) -> Iterator[str]:
    pid, own = state["pid"], state.get("own_pid")
    if pid is None and own is None:
        yield state["state"]
    elif pid is None:
        yield f"{state['state']}: pid {own} of another PID namespace"
    else:
        yield f"{state['state']}: pid {pid}" + (
            f" ({own} in its own)" if own not in (None, pid) else ""
        )
    if "uptime_seconds" in state:
        yield f"up {format_duration(state['uptime_seconds'])}"
    lost = state.get("unreachable", ())
    sockets = ", ".join(path for path in state["sockets"] if path not in lost) or "no path"
    yield f"listening on {sockets}"


def _loss_line(loss: dict[str, Any]) -> str:
    when = time.strftime(TIME, time.localtime(loss["at"]))
    if loss["problem"] is not None:
        return f"{loss['path']} was {loss['found']}, and cannot be made anew: {loss['problem']}"
    again = f" ({loss['times']} times so far)" if loss["times"] > 1 else ""
    return f"{loss['path']} was {loss['found']}, and made anew, {when}{again}"


def _surroundings_lines(memory_limit: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield f"memory limit: {surroundings.memory_in_words(memory_limit, found)}"
    yield f"cores: {surroundings.processors_in_words(found)}"


def _load_lines(gate: dict[str, Any], load: dict[str, Any]) -> Iterator[str]:
    minute = gate["max_requests_per_minute"]
    yield (
        f"gate {gate['verdict']} for {gate['verdict_seconds']:.0f} s: "
        f"{gate['connections']} of {count_of(gate['max_connections'], 'connection')}, "
        f"{gate['running']} of {count_of(gate['max_concurrent_requests'], 'request')} running, "
        f"{gate['admitted_last_minute']}{f' of {minute}' if minute else ''} in the last minute"
    )
    yield (
        f"memory {load['memory_mb']:.1f}MB, CPU {load['cpu_percent']:.1f}% "
        f"(peaks {load['peak_memory']:.1f}MB, {load['peak_cpu']:.1f}%)"
    )
    for waiting, noun, what in (
        (gate["waiting_requests"], "request", "to run"),
        (gate["waiting_clients"], "client", "to be accepted"),
    ):
        if waiting:
            yield f"{count_of(waiting, noun)} {'waits' if waiting == 1 else 'wait'} {what}"
    yield from (*load["violations"], *load["warnings"])
    limit = load.get("memory_limit", {}).get("mb", math.inf)  # not of an earlier version
    if load["memory_mb"] > limit and not gate["running"]:
        yield (
            "note: memory is over its limit while no request runs, and none begins; raise "
            "limits.max_memory_mb, or have fewer workers or modules"
        )


def metrics(options: argparse.Namespace) -> None:
    numbers = client.numbers(locating.locate(options))
    if options.json:
        print(json.dumps(numbers["metrics"]))
    else:
        from cpanbridge.supervisor.reports import prometheus

        sys.stdout.write(prometheus.text(numbers))


def top(options: argparse.Namespace) -> None:
    if not options.once and not sys.stdout.isatty():
        raise CommandError(
            "top needs a terminal; --once prints one screen", exit_status=WRONG_USAGE
        )
    target = locating.locate(options)
    if not client.is_running(target):
        raise NotRunningError(f"not running at {target.path}")
    from cpanbridge.supervisor.control import top as live

    if options.once:
        live.print_once(target, options.interval)
    else:
        live.run(target, options.interval)


def check(options: argparse.Namespace) -> None:
    from cpanbridge.supervisor.commands.check import examine

    loaded = common.load(options)
    lines = examine(loaded)
    found = surroundings.found()
    share_mb = (found["cgroup_memory"] or {}).get("share_mb", 0)
    limit = surroundings.memory_limit(loaded.settings.limits.max_memory_mb, share_mb)
    print(f"configuration: {loaded.source}: fine")
    print("\n".join([*lines, *_surroundings_lines(limit, found)]))


def call(options: argparse.Namespace) -> None:
    given = options.socket or os.environ.get("CPAN_BRIDGE_SOCKET")
    paths = paths_in(given) if given else common.load(options).settings.listen
    path = _first_that_exists(paths or default_sockets())
    try:
        params = _strict_json(options.params)
    except ValueError as error:
        raise CommandError(f"JSON: {error}", exit_status=WRONG_USAGE) from None
    result = one_call.call(path, options.module, options.function, params, options.timeout)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # JSON's own escapes lose nothing
        text = json.dumps(result, indent=2)
    print(text)


def _first_that_exists(paths: Sequence[str]) -> str:
    return next((path for path in paths if os.path.exists(path)), paths[0])


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
