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
_TABLES = 3
_EDGES = 2 * _TABLES  # a table's header, and the line above it
_FEWEST_ROWS = 2  # of each table, however small the screen is


class Sample(NamedTuple):
    """The numbers, and those of the sample before, if it was of the same daemon."""

    now: Numbers
    before: Numbers | None

    @classmethod
    def of(cls, now: Numbers, before: Numbers | None) -> "Sample":
        """Numbers of another daemon are discarded: rates between the two mean nothing."""
        same = before is not None and before["start_time"] == now["start_time"]
        return cls(now, before if same else None)

    @property
    def seconds(self) -> float:
        """The time between the two; 0.0 at the first sample."""
        if self.before is None:
            return 0.0
        return float(self.now["status"]["uptime_seconds"] - self.before["status"]["uptime_seconds"])

    def rate(self, now: float, before: float) -> float | None:
        """The increase per second; None at the first sample."""
        return (now - before) / self.seconds if self.seconds > 0 else None


def screen(sample: Sample, height: int | None, order: str) -> RenderableType:
    """The whole screen. `height` is the number of rows, None: as many as are needed.

    `order` is BY_TIME or BY_CALLS: how the functions are sorted.
    """
    head: list[RenderableType] = [
        _title(sample.now),
        *_gate(sample.now),
        _load(sample.now),
        _throughput(sample),
    ]
    workers, functions = _workers(sample), _functions(sample, order)
    errors = sample.now["recent_errors"]
    rows = [len(workers), len(functions), len(errors)]
    if height is not None:
        rows = shared_out(height - (len(head) - 1 + _LOAD_ROWS) - _EDGES, rows)
    return Group(
        *head,
        _table(_WORKERS, workers, rows[0]),
        _table(_FUNCTIONS, functions, rows[1]),
        _table(_ERRORS, [_error(each) for each in errors], rows[2]),
    )


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
    for first, second in (
        (
            _meter("memory", load["memory_mb"], limits["memory"], ".1f", "MB"),
            _meter("requests/min", gate["admitted_last_minute"], limits["requests"]),
        ),
        (
            _meter("CPU", load["cpu_percent"], limits["cpu"], ".1f", "%"),
            _meter("running", gate["running"], gate["max_concurrent_requests"]),
        ),
        (
            (Text("waiting"), Text(), Text(str(waiting), "bold red" if waiting else "")),
            _meter("connections", gate["connections"], gate["max_connections"]),
        ),
    ):
        table.add_row(*first, *second)
    return table


def _meter(
    label: str, value: float, limit: float, form: str = "g", unit: str = ""
) -> tuple[Text, Text, Text]:
    """A label, a bar, and both numbers."""
    share = value / limit if limit else 0.0
    style = "red" if share >= 1 else "yellow" if share > WARNING_SHARE else "green"
    full = min(_BAR, round(share * _BAR))
    bar = Text.assemble("[", ("|" * full, style), " " * (_BAR - full), "]")
    of = f" of {limit:g}{unit}" if limit else f"{unit}, no limit"
    return Text(label), bar, Text(f"{value:{form}}{of}", no_wrap=True)


def _throughput(sample: Sample) -> Text:
    counts = sample.now["metrics"]["performance_metrics"]
    before = (sample.before or sample.now)["metrics"]["performance_metrics"]
    rates = [
        sample.rate(counts[name], before[name]) for name in ("total_requests", "failed_requests")
    ]
    quantiles = (
        f"p{percent} {_milliseconds(counts[f'p{percent}_response_time'])}"
        if counts["requests_last_5_minutes"]
        else f"p{percent} -"
        for percent in (50, 95, 99)
    )
    return Text(
        f"{_rate(rates[0])} calls/s, {_rate(rates[1])} failed/s  {'  '.join(quantiles)}"
        f"  total {counts['total_requests']}",
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
    before = {each["worker"]: each for each in (sample.before or sample.now)["metrics"]["workers"]}
    rows: list[tuple[str, ...]] = []
    for worker in sample.now["status"]["workers"]:
        each = known[worker["worker"]]
        earlier = before.get(worker["worker"], {"requests": 0})["requests"]
        rows.append(
            (
                str(worker["worker"]),
                str(worker["pid"] or "-"),
                str(worker["generation"]),
                f"{each['memory_mb']:.1f}MB",
                str(each["running"]),
                str(each["sessions"]),
                str(each["connections"]),
                str(each["requests"]),
                _rate(sample.rate(each["requests"], earlier)),
                worker["state"] + (f": {escaped(worker['why'])}" if worker["why"] else ""),
            )
        )
    return rows


def _functions(sample: Sample, order: str) -> list[tuple[str, ...]]:
    """Sorted by what they have taken since the last sample, then by what they have taken at all."""
    before = {each["name"]: each for each in (sample.before or sample.now)["functions"]}
    field = "busy_seconds" if order == BY_TIME else "calls"
    none = {"calls": 0, "busy_seconds": 0.0}

    def since(each: Numbers, name: str) -> float:
        return float(each[name] - before.get(each["name"], none)[name])

    functions = sorted(
        sample.now["functions"], key=lambda each: (-since(each, field), -each[field], each["name"])
    )
    return [
        (
            each["name"],
            str(each["calls"]),
            _rate(sample.rate(since(each, "calls"), 0)),
            f"{each['busy_seconds'] / each['calls'] * 1000:.2f}",
            f"{each['busy_seconds']:.1f}",
            str(each["failed"]),
        )
        for each in functions
    ]


def _error(each: Numbers) -> tuple[str, ...]:
    at = time.strftime("%H:%M:%S", time.localtime(each["timestamp"]))
    return at, each["module_function"], escaped(each["error"])


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
