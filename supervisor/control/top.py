"""`cpanbridged top`: looks at the daemon again and again, and shows it on the terminal.

It asks the master, as `status` does, so it shows a daemon whose gate is shut or whose calls all
hang. When the daemon goes away it says so and waits for it. Whatever ends it, the terminal is left
as it was found.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.live import Live

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.control import client
from cpanbridge.supervisor.control.client import ControlError
from cpanbridge.supervisor.control.screen import BY_CALLS, BY_TIME, Look, absent, screen

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_QUIT = "q"
_ORDERS = {"t": BY_TIME, "c": BY_CALLS}


class Watcher:
    """Looks at the daemon, and keeps the look before for the rates."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._look: Look | None = None
        self._reason = ""

    def look(self) -> None:
        """Ask the daemon for its numbers."""
        try:
            numbers = client.numbers(self._settings)
        except ControlError as error:
            numbers, self._reason = None, str(error)
        else:
            self._reason = f"not running at {self._settings.sockets[0]}"
        earlier = self._look.now if self._look is not None else None
        self._look = Look.of(numbers, earlier) if numbers is not None else None

    def shown(self, height: int | None, command: str) -> RenderableType:
        """What was seen last."""
        if self._look is None:
            return absent(self._reason)
        return screen(self._look, height, command)


def print_once(settings: Settings, interval: float) -> bool:
    """Print one screen, as long as it takes; its rates are of the next `interval` seconds.

    False when the daemon has gone meanwhile. Raises ControlError.
    """
    before = client.numbers(settings)
    time.sleep(interval)
    now = client.numbers(settings)
    if now is None:
        return False
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    Console().print(screen(Look.of(now, before), None, BY_TIME))
    return True


def run(settings: Settings, interval: float) -> None:
    """Show it until `q`, ^C or the terminal's end, with a look every `interval` seconds."""
    # An error's text may have what this terminal's encoding has not.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Only the terminal knows its size: what a shell has exported stays as it was at a resize.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    console, watcher = Console(), Watcher(settings)
    with (
        contextlib.suppress(KeyboardInterrupt),
        keyboard() as keys,
        # On the alternate screen, drawn over what is there: nothing flickers, nothing is left.
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        command = BY_TIME
        next_look = time.monotonic()
        while True:
            if time.monotonic() >= next_look:
                watcher.look()
                next_look = time.monotonic() + interval
            live.update(watcher.shown(console.height, command), refresh=True)
            key = keys.wait(next_look - time.monotonic())
            if key == _QUIT:
                return
            command = _ORDERS.get(key, command)


class Keyboard:
    """What is typed, that the terminal has another size, and that it is to end.

    `end` is a signal's handler: it raises at once, so that nothing is waited for, and again in
    `wait`, for an exception that comes while the interpreter cleans up is lost. `signalled` is
    readable when there was a signal.
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
        """The next key; `q` at the end of the input; nothing on a resize, and after the time."""
        descriptors = [fd for fd in (self._stdin, self._signalled) if fd is not None]
        ready, _, _ = select.select(descriptors, [], [], max(0.0, seconds))
        if self._signalled in ready:
            os.read(self._signalled, 4096)
        if self._ended_by is not None:
            self.end(self._ended_by)
        if self._stdin in ready:
            return os.read(self._stdin, 1).decode("latin-1") or _QUIT
        return ""


@contextlib.contextmanager
def keyboard() -> Iterator[Keyboard]:
    """Keys are read one by one and not echoed; signals that end it leave by an exception."""
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
