"""`cpanbridged top`: samples the daemon's numbers at an interval, and shows them on the terminal.

It asks the master, as `status` does, so it shows a daemon whose gate is closed or whose calls all
hang. When the daemon ends it says so, and waits for the next one. However it ends, the terminal is
restored. Called in the command.
"""

import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.live import Live

from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.control.client import ControlError, Target
from cpanbridge.supervisor.control.screen import BY_CALLS, BY_TIME, Sample, absent, screen
from cpanbridge.supervisor.system.waiting import readable

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_QUIT = "q"
_ORDERS = {"t": BY_TIME, "c": BY_CALLS}


def print_once(target: Target, interval: float) -> None:
    """Print one screen, of any length; its rates are of the next `interval` seconds.

    Raises ControlError, NotRunningError when the daemon has ended meanwhile.
    """
    before = client.numbers(target)
    time.sleep(interval)
    now = client.numbers(target)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    Console().print(screen(Sample.of(now, before), None, BY_TIME))


def run(target: Target, interval: float) -> None:
    """Show the screen until `q`, ^C or the terminal's end; a sample every `interval` seconds."""
    # An error's text may have characters that this terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Only the terminal knows its size: what a shell has exported stays as it was at a resize.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    console = Console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        keyboard() as keys,
        # On the alternate screen, each drawn over the last: nothing flickers, nothing remains.
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        order, next_sample = BY_TIME, time.monotonic()
        sample: Sample | None = None  # None: no daemon answers, for the reason
        while True:
            if time.monotonic() >= next_sample:
                sample, reason = _take(target, sample)
                next_sample = time.monotonic() + interval
            height = console.height
            shown = screen(sample, height, order) if sample is not None else absent(reason)
            live.update(shown, refresh=True)
            key = keys.wait(next_sample - time.monotonic())
            if key == _QUIT:
                return
            order = _ORDERS.get(key, order)


def _take(target: Target, last: Sample | None) -> tuple[Sample | None, str]:
    """The next sample, or why there is none."""
    try:
        numbers = client.numbers(target)
    except ControlError as error:
        return None, str(error)
    return Sample.of(numbers, last.now if last is not None else None), ""


class Keyboard:
    """Events of the terminal: a key, another size, a signal that ends the command.

    `end` is a signal handler. It raises at once, so that nothing is waited for. `wait` raises
    again: an exception that is raised while the interpreter runs a `__del__` is lost. `signalled`
    is readable after a signal.
    """

    def __init__(self, stdin: int | None, signalled: int) -> None:
        self._stdin = stdin
        self._signalled = signalled
        self._ended_by: int | None = None

    def end(self, number: int, _: FrameType | None = None) -> NoReturn:
        self._ended_by = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    def wait(self, seconds: float) -> str:
        """The next key; `q` at the end of the input; "" after a resize or when the time is over."""
        descriptors = [fd for fd in (self._stdin, self._signalled) if fd is not None]
        ready = readable(descriptors, seconds)
        if self._signalled in ready:
            os.read(self._signalled, 4096)
        if self._ended_by is not None:
            self.end(self._ended_by)
        if self._stdin in ready:
            return os.read(self._stdin, 1).decode("latin-1") or _QUIT
        return ""


@contextlib.contextmanager
def keyboard() -> Iterator[Keyboard]:
    """Keys are read one by one and not echoed; a signal that ends the command raises."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    stdin = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    keys = Keyboard(stdin, read_end)
    ignored = {number for number in _ENDING if signal.getsignal(number) is signal.SIG_IGN}
    handlers = {each: signal.signal(each, keys.end) for each in _ENDING if each not in ignored}
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    wake_up = signal.set_wakeup_fd(write_end)
    before = termios.tcgetattr(stdin) if stdin is not None else None
    try:
        if stdin is not None:
            tty.setcbreak(stdin)
        yield keys
    finally:
        if stdin is not None and before is not None:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.set_wakeup_fd(wake_up)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)
