"""SQLite for Perl scripts, in the steps of DBI: connect, prepare, execute, fetch, commit.

A client's connections and statements stand in its session: only the client itself finds them, and
they are closed when its process ends, whatever it forgot. What was not committed is rolled back.
"""

import sqlite3
from typing import Any

from cpanbridge.workers import current_session


class Connection:
    """One connection. A client's calls may come in several threads, but one after another."""

    def __init__(self, path: str) -> None:
        self.sqlite = sqlite3.connect(path, timeout=10, check_same_thread=False)

    def close(self) -> None:
        """Called by the session's end, too."""
        self.sqlite.rollback()
        self.sqlite.close()


class Statement:
    """A statement, and the rows that it has not given out yet."""

    def __init__(self, connection: Connection, sql: str) -> None:
        self.sql = sql
        self.cursor = connection.sqlite.cursor()

    def close(self) -> None:
        self.cursor.close()


def connect(path: str) -> str:
    """Open a database file; returns a handle."""
    return current_session().keep(Connection(path))


def prepare(connection: str, sql: str) -> str:
    """Make a statement; returns a handle."""
    session = current_session()
    return session.keep(Statement(session.find(connection), sql))


def execute(statement: str, values: list[Any] | None = None) -> int:
    """Run it with values for its question marks; returns the number of rows that it has changed."""
    found: Statement = current_session().find(statement)
    found.cursor.execute(found.sql, values or [])
    return max(0, found.cursor.rowcount)


def fetch(statement: str, most: int = 1000) -> list[dict[str, Any]]:
    """The next rows, each by the names of its columns; an empty list at the end."""
    cursor = current_session().find(statement).cursor
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchmany(most)]


def commit(connection: str) -> None:
    """Keep what was changed since the last commit."""
    current_session().find(connection).sqlite.commit()


def rollback(connection: str) -> None:
    """Undo it."""
    current_session().find(connection).sqlite.rollback()


def disconnect(connection: str) -> None:
    """Close a connection. What was not committed is rolled back."""
    current_session().drop(connection)
