"""The results of `peers.py`, as ratios, a markdown table and a plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from load import Run

# The columns of a table: heading, field of `Run`, factor, and decimal digits.
COLUMNS = (
    ("calls/s", "calls_per_second", 1.0, 0),
    ("p50 us", "p50_us", 1.0, 0),
    ("p99 us", "p99_us", 1.0, 0),
    ("p99.9 us", "p999_us", 1.0, 0),
    ("CPU us/call", "server_cpu_per_1000", 1000.0, 0),
)
BUSY_LOAD = 0.9  # of one core: above it, the load generator may be the bottleneck
DISTURBED = 0.1  # of one core, used by other processes: above it, the figures count as disturbed


@dataclass
class Measured:
    """One row in one cell: its rounds, or the reason why there are none."""

    runs: list[Run] = field(default_factory=list)
    memory: int = 0  # bytes
    missing: str = ""


@dataclass
class Cell:
    """All rows with the same number of clients and the same payload; the baseline first."""

    clients: int
    payload: str
    rows: dict[str, Measured] = field(default_factory=dict)

    def ratios(self, name: str, column: str) -> list[float]:
        """A row's value over the baseline's, of each round."""
        baseline = next(iter(self.rows.values()))
        pairs = zip(baseline.runs, self.rows[name].runs, strict=False)
        return [
            getattr(run, column) / getattr(other, column)
            for other, run in pairs
            if getattr(other, column)
        ]

    def markdown(self) -> str:
        """A heading and a table: medians, and the ratio to the baseline with its spread."""
        headings = ["", *(heading for heading, *_ in COLUMNS), "memory MB"]
        lines = [
            f"### {self.clients} client{'s' if self.clients > 1 else ''}, {self.payload}",
            "",
            _line(headings),
            _line(["---"] * len(headings)),
        ]
        for name, measured in self.rows.items():
            if measured.missing:
                lines.append(_line([name, measured.missing, *[""] * (len(headings) - 2)]))
                continue
            row = [self._label(name, measured.runs)]
            for _, column, scale, digits in COLUMNS:
                row.append(self._value(name, column, scale, digits))
            lines.append(_line([*row, f"{measured.memory / 1e6:.0f}"]))
        return "\n".join(lines) + "\n"

    def _label(self, name: str, runs: Sequence[Run]) -> str:
        errors = sum(run.errors for run in runs)
        busy = any(run.load_cpu_share > BUSY_LOAD for run in runs) and not name.startswith("Perl")
        return name + (f" ({errors} errors)" if errors else "") + (" (load-bound)" if busy else "")

    def _value(self, name: str, column: str, scale: float, digits: int) -> str:
        runs = self.rows[name].runs
        middle = statistics.median(getattr(run, column) for run in runs) * scale
        text = f"{middle:,.{digits}f}"
        found = self.ratios(name, column)
        if name == next(iter(self.rows)) or not found:
            return text
        low, high = min(found), max(found)
        return f"{text} = {_ratio(statistics.median(found))} ({_ratio(low)} to {_ratio(high)})"


def disturbance(cells: Sequence[Cell]) -> str:
    """A warning if other processes used more than DISTURBED, else an empty string."""
    shares = [
        run.others_cpu_share
        for cell in cells
        for measured in cell.rows.values()
        for run in measured.runs
    ]
    taken = max(shares, default=0.0)
    if taken <= DISTURBED:
        return ""
    return f"Disturbed: other processes used up to {taken:.2f} of a core; measure again.\n"


def _ratio(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


# -- the plot: throughput of every row in every cell, as bars on a logarithmic scale --

_BAR, _LEFT, _WIDTH, _TOP = 16, 230, 330, 40
_PANEL = _LEFT + _WIDTH + 110
_LEAST, _DECADES = 0.001, 5  # ratios 0.001 to 100
_COLOURS = (("floor", "#999999"), ("cpanbridged", "#1f6fb4"), ("Perl", "#2a9d6f"), ("", "#d0722a"))


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Write the ratios of throughput as an SVG, one panel for each cell."""
    rows = max(len(cell.rows) for cell in cells)
    columns = len({cell.payload for cell in cells})
    height = _TOP + rows * (_BAR + 4) + 20
    parts = [
        _panel(cell, (number % columns) * _PANEL, (number // columns) * height)
        for number, cell in enumerate(cells)
    ]
    total = height * -(-len(cells) // columns)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * _PANEL}" height="{total}" '
        'font-family="sans-serif" font-size="12">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "".join(parts) + "</svg>\n"
    )


def _panel(cell: Cell, x: int, y: int) -> str:
    title = f"{cell.clients} clients, {cell.payload}: calls per second, as ratio to the floor"
    parts = [_text(x + 8, y + 20, title, "bold")]
    one = x + _LEFT + _length(1.0)
    bottom = y + _TOP + len(cell.rows) * (_BAR + 4)
    parts.append(
        f'<line x1="{one}" y1="{y + _TOP - 6}" x2="{one}" y2="{bottom}" stroke="#999999"/>\n'
    )
    for number, name in enumerate(cell.rows):
        top = y + _TOP + number * (_BAR + 4)
        parts.append(_text(x + 8, top + 12, name))
        found = cell.ratios(name, "calls_per_second")
        if not found:
            parts.append(_text(x + _LEFT, top + 12, "not measured"))
            continue
        middle, low, high = statistics.median(found), min(found), max(found)
        colour = next(colour for start, colour in _COLOURS if name.startswith(start))
        begin, end, line = x + _LEFT, x + _LEFT + _length(high), top + _BAR // 2
        parts.append(
            f'<rect x="{begin}" y="{top}" width="{_length(middle)}" height="{_BAR}" '
            f'fill="{colour}"/>\n<line x1="{begin + _length(low)}" y1="{line}" x2="{end}" '
            f'y2="{line}" stroke="black"/>\n'
        )
        parts.append(_text(max(end, begin + _length(middle)) + 6, top + 12, _ratio(middle)))
    return "".join(parts)


def _length(ratio: float) -> int:
    share = math.log10(max(ratio, _LEAST) / _LEAST) / _DECADES
    return max(1, round(_WIDTH * min(1.0, share)))


def _text(x: int, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}">{escape(text)}</text>\n'
