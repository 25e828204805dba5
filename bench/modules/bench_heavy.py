"""A heavy module: about 50 MB of Python objects, as a package with large tables has."""

TABLE = [{"number": number, "name": f"entry {number}"} for number in range(170_000)]


def entries() -> int:
    """How many entries its table has."""
    return len(TABLE)
