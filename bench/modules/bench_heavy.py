"""A large module: about 50 MB of Python objects, as a package with large tables has."""

import os

TABLE = [{"number": number, "name": f"entry {number}"} for number in range(170_000)]


def entries() -> int:
    """The number of entries in its table."""
    return len(TABLE)


def read() -> int:
    """Read every entry; returns the pid of this process."""
    assert all(entry["number"] is not entry["name"] for entry in TABLE)
    return os.getpid()
