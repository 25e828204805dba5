"""A bar on a terminal's stderr, and nothing elsewhere."""

import sys

WIDTH = 30


class Progress:
    """How many of so many steps are done."""

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._done = 0
        self._shown = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Say what is done now; everything before it is over."""
        if self._shown:
            filled = WIDTH * self._done // self._steps
            bar = "#" * filled + "-" * (WIDTH - filled)
            print(f"\r\033[K[{bar}] {what}", end="", file=sys.stderr, flush=True)
        self._done += 1

    def end(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
