"""Writing figures into docs/performance.md, between the markers that it has for them."""

from datetime import UTC, datetime
from pathlib import Path

from rows import versions
from servers import BENCH, BenchError

PAGE = BENCH.parent / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")


def heading(command: str) -> str:
    """The command that measured, the date, and the versions."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {found}.\n"


def write(section: str, text: str, page: Path = PAGE) -> None:
    """Replace the text between the markers of a section. Raises BenchError if they are missing."""
    begin, end = f"<!-- {section}: written by bench -->", f"<!-- {section}: end -->"
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise BenchError(f"{page}: the markers {begin!r} and {end!r} must occur once each")
    head, _, rest = old.partition(begin)
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}")
