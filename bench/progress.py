"""A progress bar on stderr, if that is a terminal."""

import sys

WIDTH = 30


class Progress:
    """Shows how many of `steps` steps are done."""

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._done = 0
        self._shown = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Show the step that begins now; the ones before it are done."""
        if self._shown:
            filled = WIDTH * self._done // self._steps
            bar = "#" * filled + "-" * (WIDTH - filled)
            print(f"\r\033[K[{bar}] {what}", end="", file=sys.stderr, flush=True)
        self._done += 1

    def end(self) -> None:
        """Remove the bar."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
