"""SQL on tables that the caller brings along. Nothing is kept between calls."""

import sqlite3
import time
from decimal import Decimal, localcontext
from typing import Any

MAX_SECONDS = 5.0
MAX_ROWS = 10_000
MAX_VALUE = 1_000_000
_PRECISION = 100
_READING = (
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
)


def query(
    tables: dict[str, list[dict[str, Any]]], statements: dict[str, str]
) -> dict[str, dict[str, list[Any]]]:
    """Run SELECT statements: each one's `columns` and `rows`, by its name.

    A table is a list of rows, at least one, that all have the same keys. For decimal numbers in
    text, `decimal_sum(x)` adds them exactly and `COLLATE number` compares them.

    Raises sqlite3.Error, also if a statement would do anything but read or makes a value of more
    than `MAX_VALUE` bytes, or if all together take longer than `MAX_SECONDS`; ValueError if one
    gives more than `MAX_ROWS` rows.
    """
    deadline = time.monotonic() + MAX_SECONDS
    connection = sqlite3.connect(":memory:")
    try:
        connection.create_collation("number", _compare)
        connection.create_aggregate("decimal_sum", 1, _DecimalSum)
        for name, rows in tables.items():
            keys = list(rows[0])
            connection.execute(f"CREATE TABLE {_quoted(name)} ({', '.join(map(_quoted, keys))})")
            connection.executemany(
                f"INSERT INTO {_quoted(name)} VALUES ({', '.join('?' for _ in keys)})",
                ([row[key] for key in keys] for row in rows),
            )
        # The statements are a client's: they may read these tables, but neither touch a file of the
        # host nor keep it busy.
        connection.set_authorizer(_authorize)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        return {name: _run(connection, name, each) for name, each in statements.items()}
    finally:
        connection.close()


def _run(connection: sqlite3.Connection, name: str, statement: str) -> dict[str, list[Any]]:
    cursor = connection.execute(statement)
    rows = cursor.fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"statement {name!r}: more than {MAX_ROWS} rows; add a LIMIT")
    return {"columns": [column[0] for column in cursor.description or ()], "rows": rows}


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _compare(left: str, right: str) -> int:
    return int(Decimal(left).compare(Decimal(right)))


class _DecimalSum:
    """SQL's sum(), digit by digit; null counts as 0."""

    def __init__(self) -> None:
        self.total = Decimal(0)

    def step(self, value: str | int | None) -> None:
        with localcontext(prec=_PRECISION):
            self.total += Decimal(value or 0)

    def finalize(self) -> Any:
        return f"{self.total:f}"
