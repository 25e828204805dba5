"""The module that the benchmarks call: the least that a real, configured module can do."""

import time


def echo(**params: object) -> dict[str, object]:
    """Give the keyword arguments back."""
    return params


def nap(seconds: float) -> None:
    """Wait, as a call to a slow database does."""
    time.sleep(seconds)


def count(to: int) -> int:
    """Compute, as a parser in pure Python does, and hold the interpreter lock all the while."""
    total = 0
    for number in range(to):
        total += number
    return total
