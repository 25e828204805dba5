"""A heavy module: about 50 MB of Python objects, as a package with large tables has."""

import os

TABLE = [{"number": number, "name": f"entry {number}"} for number in range(170_000)]


def entries() -> int:
    """How many entries its table has."""
    return len(TABLE)


def read() -> int:
    """Look at every entry; the process that has done so."""
    assert all(entry["number"] is not entry["name"] for entry in TABLE)
    return os.getpid()
