"""What the tests call: functions that do one thing that can be seen from outside."""

import _thread
import array
import collections
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from typing import Any


def echo(**params: Any) -> dict[str, Any]:
    return params


def record(number: int, file: str) -> dict[str, int]:
    """Appends a call's number to a file: the record of what has run, and how often."""
    with open(file, "a") as stream:
        stream.write(f"{number}\n")
    return {"number": number}


def echo_after(seconds: float, **params: Any) -> dict[str, Any]:
    time.sleep(seconds)
    return params


def worker_pid() -> int:
    return os.getpid()


def nap(seconds: float) -> float:
    """Sleeps; returns when it began, in CLOCK_MONOTONIC seconds."""
    began = time.monotonic()
    time.sleep(seconds)
    return began


def span(seconds: float, event: str | None = None) -> list[float]:
    """Sleeps; returns when it began and ended. Before, it writes its pid to the file `event`."""
    began = time.monotonic()
    if event is not None:
        with open(f"{event}.new", "w") as stream:
            stream.write(str(os.getpid()))
        os.rename(f"{event}.new", event)
    time.sleep(seconds)
    return [began, time.monotonic()]


def run_until(file: str, event: str) -> None:
    """Ends when the file is there. Before, it writes its pid to the file `event`."""
    span(0, event)
    while not os.path.exists(file):
        time.sleep(0.02)


def hold_interpreter(seconds: int, event: str) -> None:
    """As `span`, in C code that never lets another thread of the process run."""
    span(0, event)
    ctypes.PyDLL(None).sleep(seconds)


def hold_interpreter_aside(seconds: int, file: str, known: bool) -> int:
    """Begin to do so in another thread, as soon as the file is there, which it then removes.

    A thread that is not `known` is none of `threading`'s. Returns the process id.
    """

    def hold() -> None:
        while not os.path.exists(file):
            time.sleep(0.02)
        os.remove(file)
        ctypes.PyDLL(None).sleep(seconds)

    if known:
        threading.Thread(target=hold, daemon=True).start()
    else:
        _thread.start_new_thread(hold, ())
    return os.getpid()


def stamp(file: str) -> float:
    """Appends the time at which it ran, CLOCK_MONOTONIC nanoseconds, to a file."""
    now = time.monotonic_ns()
    with open(file, "a") as stream:
        stream.write(f"{now}\n")
    return now / 1e9


def variables(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def say(text: str) -> None:
    print(text, flush=True)


def fail(message: str = "as asked") -> None:
    raise ValueError(message)


def leave() -> None:
    sys.exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def segfault() -> None:
    ctypes.string_at(0)


def exit_at_once(status: int) -> None:
    os._exit(status)


def fail_in_a_thread() -> None:
    def run() -> None:
        raise ValueError("in a thread")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def log_line(number: int) -> None:
    """Writes a line to the log, as a module does that writes to standard error."""
    os.write(2, f"line {number}\n".encode())


def type_error_inside(value: int) -> Any:
    return value + "text"  # type: ignore[operator]


def fork_and_return() -> int:
    """Both parent and child return from here; only the parent's client may hear of it."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return os.getpid()


def threads() -> int:
    return threading.active_count()


def two(first: Any, second: Any = "default") -> list[Any]:
    return [first, second]


def big(size: int) -> str:
    return "x" * size


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: int


class Number(enum.Enum):
    ONE = 1


class Text(str):
    pass


class Whole(int):
    pass


class Float(float):
    pass


class Bytes(bytes):
    pass


class Moment(datetime.datetime):
    pass


class Opaque:
    def __str__(self) -> str:
        return "an opaque object"


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Exits:
    def __str__(self) -> str:
        sys.exit(4)


class Doubly:
    """Neither it nor what it raises can be shown."""

    def __str__(self) -> str:
        raise UnprintableError


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitingError(Exception):
    def __str__(self) -> str:
        sys.exit(4)


def fail_as(kind: str) -> None:
    """Raises an exception of each kind that is not plain."""
    raise {
        "unprintable": UnprintableError(),
        "exiting": ExitingError(),
        "surrogate": ValueError("a \udc80 b"),
        "two_lines": ValueError("one\ntwo"),
        "empty": KeyError(),
        "interrupt": KeyboardInterrupt("now"),
        "generator_exit": GeneratorExit(),
        "group": ExceptionGroup("both", [ValueError("a"), TypeError("b")]),
    }[kind]


def results(kind: str) -> Any:
    """A value of each kind that a function may return."""
    cycle: list[Any] = []
    cycle.append(cycle)
    return {
        "none": None,
        "true": True,
        "int": 7,
        "big_int": 2**70,
        "float": 0.1,
        "nan": float("nan"),
        "infinity": float("-inf"),
        "str": "snowman \u2603 and \U0001f600",
        "bytes": b"\x00\xff",
        "date": datetime.date(2026, 11, 24),
        "datetime": datetime.datetime(2026, 11, 24, 12, 30, 15),
        "datetime_utc": datetime.datetime(2026, 11, 24, 12, 30, tzinfo=datetime.UTC),
        "time": datetime.time(12, 30),
        "decimal": decimal.Decimal("1.10"),
        "uuid": uuid.UUID(int=1),
        "set": {3},
        "frozenset": frozenset({4}),
        "tuple": (1, (2,)),
        "dataclass": Point(1, 2),
        "enum": Colour.RED,
        "opaque": Opaque(),
        "nested": {"list": [{"tuple": (1, None)}]},
        "int_keys": {1: "one"},
        "keys": {
            1: 0,
            1.5: 0,
            Colour.RED: 0,
            datetime.date(2026, 11, 24): 0,
            decimal.Decimal("1.10"): 0,
            pathlib.PurePosixPath("/a"): 0,
        },
        "path": pathlib.Path("/etc/hosts"),
        "subclasses": [
            Text("text"),
            Whole(3),
            Float(1.5),
            Bytes(b"\x00\xff"),
            Moment(2026, 11, 24),
        ],
        "mapping": types.MappingProxyType({"a": 1}),
        "sequences": [
            range(2),
            collections.deque([2]),
            {"a": 1}.keys(),
            array.array("d", [1.5]),
        ],
        "deep_nan": {"rows": [0, 1, 2, {"price": float("nan")}]},
        "nan_in_dataclass": Point(float("nan"), 1),
        "generator": {"all": (each for each in range(3))},
        "fraction": fractions.Fraction(1, 3),
        "same_keys": {1: "a", "1": "b"},
        "same_enum_keys": {"a b": {Number.ONE: "a", 1: "b"}},
        "none_key": {None: 1},
        "bool_key": {True: 1},
        "nan_key": {float("nan"): 1},
        "tuple_key": [{(1, 2): 1}],
        "unprintable": Unprintable(),
        "cycle": cycle,
        "surrogate": "\udc80",
        "exits": Exits(),
        "doubly": Doubly(),
    }[kind]


def set_default_timeout(seconds: float) -> None:
    socket.setdefaulttimeout(seconds)


def terminate_a_child() -> int | None:
    """Forks a child that sleeps, asks it to end, and returns how it ended."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(20)
    return child.exitcode


def leave_a_child(seconds: float) -> int:
    """Forks a child that goes on after the call; returns its pid."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
    child.start()
    assert child.pid is not None
    return child.pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


KEPT: list[bytearray] = []


def hoard(megabytes: int) -> int:
    """Keeps so much memory for as long as the worker lives; returns the worker's pid."""
    KEPT.append(bytearray(os.urandom(1 << 20)) * megabytes)
    return os.getpid()


def start_hoarder(megabytes: int) -> int:
    """Starts a program that keeps so much memory, whatever becomes of this worker; its pid."""
    text = f"import os, time; kept = bytearray(os.urandom(1 << 20)) * {megabytes}; time.sleep(600)"
    return start(sys.executable, "-c", text)


def burn_until(file: str) -> int:
    """Keeps a processor busy until the file is there; returns the worker's pid."""
    while not os.path.exists(file):
        pass
    return os.getpid()


def start(*command: str) -> int:
    """Starts another program that goes on; returns its pid."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL).pid


def hide() -> int:
    """Forks a child whose memory only root may look at; returns its pid."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
        time.sleep(60)
        os._exit(0)
    return pid


def points(text: str) -> list[int]:
    return [ord(each) for each in text]


def backtrack(event: str | None = None) -> bool:
    """As `span`, for ever: a regular expression that tries all ways to cut the text."""
    span(0, event)
    return re.match(r"(a+)+$", "a" * 64 + "b") is not None


def deadlock(event: str | None = None) -> None:
    """As `backtrack`, without using the processor: C code that waits for a lock that it holds."""
    span(0, event)
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def _gate_lock() -> Any:
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "shared"):  # of the worker's code that calls this
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["self"].shared.lock


def hold_gate(event: str) -> None:
    """Takes the gate's lock and hangs, as a call may do that gets to run in the wrong moment."""
    with _gate_lock():
        deadlock(event)


def stop_with_gate() -> None:
    """Takes the gate's lock, and the whole process is stopped."""
    with _gate_lock():
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)  # another thread may get the signal, and this one goes on until that runs


def fork_bomb() -> list[int]:
    """Forks until the kernel refuses; the pids of the children, which do nothing."""
    children: list[int] = []
    while True:
        try:
            child = os.fork()
        except BlockingIOError:
            return children
        if child == 0:
            while True:
                signal.pause()
        children.append(child)
