"""A helper as they are: it keeps what clients leave in dictionaries of the process."""

import itertools
import os
import threading
import time
from typing import Any

from cpanbridge.workers import SessionEnded, current_session

_things: dict[str, Any] = {}
_numbers = itertools.count(1)


def put(value: Any) -> str:
    handle = f"{os.getpid()}-{next(_numbers)}"
    _things[handle] = value
    return handle


def get(handle: str) -> Any:
    return _things[handle]


def size() -> int:
    return len(_things)


def where() -> int:
    return os.getpid()


def where_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def length(text: str) -> int:
    return len(text)


# -- the same in sessions --


class Thing:
    """Writes its value to the file `event` when it is closed."""

    def __init__(self, event: str, value: Any) -> None:
        self.event = event
        self.value = value

    def close(self) -> None:
        with open(self.event, "a") as stream:
            stream.write(f"{self.value}\n")


def keep(event: str, value: Any, name: str | None = None) -> str:
    return current_session().keep(Thing(event, value), name)


def find(name: str) -> Any:
    return current_session().find(name).value


def drop(name: str) -> None:
    current_session().drop(name)


class BadClose:
    def close(self) -> None:
        raise RuntimeError("it cannot be closed")


def keep_bad() -> str:
    return current_session().keep(BadClose())


def use(name: str, seconds: float) -> None:
    """Uses an object for a while; then it writes so to the object's file."""
    thing = current_session().find(name)
    time.sleep(seconds)
    with open(thing.event, "a") as stream:
        stream.write("used\n")


def span(seconds: float) -> list[float]:
    began = time.monotonic()
    time.sleep(seconds)
    return [began, time.monotonic()]


def keep_later(event: str, go_on: str) -> None:
    """A thread of the function's own keeps something once a file exists, and writes the outcome."""
    session = current_session()

    def work() -> None:
        while not os.path.exists(go_on):
            time.sleep(0.01)
        try:
            session.keep(Thing(event, "late"))
        except SessionEnded:
            with open(event, "a") as stream:
                stream.write("told\n")

    threading.Thread(target=work).start()
