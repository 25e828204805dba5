"""The module that the benchmarks call: the minimum that a configured module can do."""

import time


def echo(**params: object) -> dict[str, object]:
    """Return the keyword arguments."""
    return params


def nap(seconds: float) -> None:
    """Wait, as a call to a slow database does."""
    time.sleep(seconds)


def count(to: int) -> int:
    """Compute, as a parser in pure Python does, and use the interpreter all the time."""
    total = 0
    for number in range(to):
        total += number
    return total
