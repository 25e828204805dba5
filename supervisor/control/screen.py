"""The screen of `cpanbridged top`: one sample of the numbers, in any number of rows.

The load stands on top, with the limits beside it. The rows that are left are shared by the workers,
the functions that take the most time or calls, and the last errors. Rates are of the time between
two samples, by the daemon's own clock. Called in the command; the daemon never imports this.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpanbridge.supervisor.memory.overload_state import WARNING_SHARE
from cpanbridge.supervisor.system.log_text import escaped, format_duration

Numbers = dict[str, Any]

BY_TIME, BY_CALLS = "time", "calls"
_BAR = 10  # columns
_LOAD_ROWS = 3
_EDGES = 2  # a table's header, and the line above it
_FEWEST_ROWS = 2  # of each table, however small the screen is


class Sample(NamedTuple):
    """The numbers, and those of the sample before if it was of the same daemon, else the same."""

    now: Numbers
    before: Numbers

    @classmethod
    def of(cls, now: Numbers, before: Numbers | None) -> "Sample":
        """Numbers of another daemon are discarded: rates between the two mean nothing."""
        same = before is not None and before["start_time"] == now["start_time"]
        return cls(now, before if before is not None and same else now)

    def rate(self, increase: float) -> str:
        """An increase between the two, per second; "-" at the first sample."""
        now, before = self.now["status"], self.before["status"]
        seconds = now["uptime_seconds"] - before["uptime_seconds"]
        return f"{increase / seconds:.1f}" if seconds > 0 else "-"


def screen(sample: Sample, height: int | None, order: str) -> RenderableType:
    """The whole screen. `height` is the number of rows, None: as many as are needed.

    `order` is BY_TIME or BY_CALLS: how the functions are sorted.
    """
    now = sample.now
    head: list[RenderableType] = [_title(now), *_gate(now), _load(now), _throughput(sample)]
    errors = [_error(each) for each in now["recent_errors"]]
    tables = [
        (_WORKERS, _workers(sample)),
        (_FUNCTIONS, _functions(sample, order)),
        (_ERRORS, errors),
    ]
    rooms = [len(rows) for _, rows in tables]
    if height is not None:
        rooms = shared_out(height - (len(head) - 1 + _LOAD_ROWS) - _EDGES * len(tables), rooms)
    shown = zip(tables, rooms, strict=True)
    return Group(*head, *(_table(columns, rows, room) for (columns, rows), room in shown))


def absent(reason: str) -> RenderableType:
    """The screen while no daemon answers."""
    return Group(
        Text.assemble(("cpanbridged", "bold"), "  ", time.strftime("%H:%M:%S")),
        Text(reason, style="bold red"),
        Text("Waiting for it; q ends."),
    )


def shared_out(room: int, wanted: Sequence[int]) -> list[int]:
    """The rows for each table: as even as the wanted numbers allow, and at least a few."""
    given = [min(_FEWEST_ROWS, each) for each in wanted]
    while sum(given) < room and given != list(wanted):
        short = [at for at, each in enumerate(wanted) if given[at] < each]
        given[min(short, key=lambda at: given[at])] += 1
    return given


# -- the load --


def _title(now: Numbers) -> Text:
    status = now["status"]
    return Text.assemble(
        (f"cpanbridged {status['version']}", "bold"),
        f"  {status['state']}  pid {status['pid']}  generation {status['generation']}"
        f"  up {format_duration(status['uptime_seconds'])}  {time.strftime('%H:%M:%S')}",
        no_wrap=True,
    )


def _gate(now: Numbers) -> list[Text]:
    gate, load = now["metrics"]["gate"], now["metrics"]["resource_status"]
    is_open = gate["verdict"] == "open"
    text = f"gate {'open' if is_open else 'CLOSED'} for {format_duration(gate['verdict_seconds'])}"
    return [
        Text(text, style="green" if is_open else "bold red"),
        *(Text(each, style="red", no_wrap=True, overflow="crop") for each in load["violations"]),
        *(Text(each, style="yellow", no_wrap=True) for each in load["warnings"]),
    ]


def _load(now: Numbers) -> Table:
    load, limits = now["metrics"]["resource_status"], now["limits"]
    gate = now["metrics"]["gate"]
    waiting = gate["waiting_clients"] + gate["waiting_requests"]
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(6):
        table.add_column(no_wrap=True, overflow="crop")
    table.add_row(
        *_meter("memory", load["memory_mb"], limits["memory"], ".1f", "MB"),
        *_meter("requests/min", gate["admitted_last_minute"], limits["requests"]),
    )
    table.add_row(
        *_meter("CPU", load["cpu_percent"], limits["cpu"], ".1f", "%"),
        *_meter("running", gate["running"], gate["max_concurrent_requests"]),
    )
    table.add_row(
        *("waiting", "", Text(str(waiting), "bold red" if waiting else "")),
        *_meter("connections", gate["connections"], gate["max_connections"]),
    )
    return table


def _meter(
    label: str, value: float, limit: float, form: str = "g", unit: str = ""
) -> tuple[str, Text, Text]:
    """A label, a bar, and both numbers."""
    share = value / limit if limit else 0.0
    style = "red" if share >= 1 else "yellow" if share > WARNING_SHARE else "green"
    full = min(_BAR, round(share * _BAR))
    bar = Text.assemble("[", ("|" * full, style), " " * (_BAR - full), "]")
    of = f" of {limit:g}{unit}" if limit else f"{unit}, no limit"
    return label, bar, Text(f"{value:{form}}{of}", no_wrap=True)


def _throughput(sample: Sample) -> Text:
    counts = sample.now["metrics"]["performance_metrics"]
    before = sample.before["metrics"]["performance_metrics"]
    calls, failed = (
        sample.rate(counts[name] - before[name]) for name in ("total_requests", "failed_requests")
    )
    known = counts["requests_last_5_minutes"]
    quantiles = "  ".join(
        f"p{percent} {_milliseconds(counts[f'p{percent}_response_time']) if known else '-'}"
        for percent in (50, 95, 99)
    )
    return Text(
        f"{calls} calls/s, {failed} failed/s  {quantiles}  total {counts['total_requests']}",
        style="bold",
        no_wrap=True,
        overflow="crop",
    )


# -- the tables --

_WORKERS = (
    *("worker", "pid", "gen", "memory", "running", "sessions"),
    *("conns", "calls", "/s", "state"),
)
_FUNCTIONS = ("function", "calls", "/s", "mean ms", "busy s", "failed")
_ERRORS = ("error", "in", "was")
_LEFT = ("function", "state", *_ERRORS)  # columns that are aligned to the left
_WIDEST = ("function", "state", "was")  # columns that take the remaining width


def _table(columns: Sequence[str], rows: Sequence[Iterable[str]], room: int) -> RenderableType:
    """The first rows of a table. Its header says how many exist when not all are shown."""
    if not rows:
        return Text(f"\nno {columns[0]} yet", style="dim")
    some = f" ({room} of {len(rows)})" if room < len(rows) else ""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1), header_style="reverse")
    for column in columns:
        table.add_column(
            column if column != columns[0] else column + some,
            justify="left" if column in _LEFT else "right",
            no_wrap=True,
            overflow="crop",
            ratio=1 if column in _WIDEST else None,
        )
    for row in rows[:room]:
        table.add_row(*map(Text, row))
    return Group(Text(), table)


def _workers(sample: Sample) -> list[tuple[str, ...]]:
    known = {each["worker"]: each for each in sample.now["metrics"]["workers"]}
    before = {each["worker"]: each["requests"] for each in sample.before["metrics"]["workers"]}
    rows = []
    for worker in sample.now["status"]["workers"]:
        number = worker["worker"]
        each = known[number]
        why = f": {escaped(worker['why'])}" if worker["why"] else ""
        row = (
            *(number, worker["pid"] or "-", worker["generation"], f"{each['memory_mb']:.1f}MB"),
            *(each["running"], each["sessions"], each["connections"], each["requests"]),
            *(sample.rate(each["requests"] - before.get(number, 0)), worker["state"] + why),
        )
        rows.append(tuple(map(str, row)))
    return rows


def _functions(sample: Sample, order: str) -> list[tuple[str, ...]]:
    """Sorted by what they have taken since the last sample, then by what they have taken at all."""
    before = {each["name"]: each for each in sample.before["functions"]}
    field = "busy_seconds" if order == BY_TIME else "calls"

    def since(each: Numbers, name: str) -> float:
        earlier = before.get(each["name"])
        return float(each[name] - (earlier[name] if earlier is not None else 0))

    functions = sorted(
        sample.now["functions"], key=lambda each: (-since(each, field), -each[field], each["name"])
    )
    return [
        (
            each["name"],
            str(each["calls"]),
            sample.rate(since(each, "calls")),
            f"{each['busy_seconds'] / each['calls'] * 1000:.2f}",
            f"{each['busy_seconds']:.1f}",
            str(each["failed"]),
        )
        for each in functions
    ]


def _error(each: Numbers) -> tuple[str, ...]:
    at = time.strftime("%H:%M:%S", time.localtime(each["timestamp"]))
    return at, each["module_function"], escaped(each["error"])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
