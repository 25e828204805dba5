"""Importing what the workers of a generation can share, and finding what they cannot.

A fork copies memory and descriptors, and little else. A module is unfit to be shared, and left to
each worker to import, when its import has

- started a thread, which the child does not have, or a process, which is no child of the worker's;
- opened a file, a socket or a database connection, which processes would read and write together;
- mapped memory that a fork shares;
- made a generator of random numbers, as for keys: all workers would have the same numbers.

Called in a template.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Collection, Iterator, Set
from types import ModuleType

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.processes.context import Imports
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError

_SEEDED_ANEW = {"random", "numpy.random", "numpy.random.mtrand"}
_NUMPY_GENERATORS = (
    ("numpy.random._generator", "Generator"),
    ("numpy.random.mtrand", "RandomState"),
)
_JOIN_SECONDS = 0.2  # the kernel still lists a thread for a moment after it was joined


class _State:
    """What this process has that a fork does not simply copy, and its modules."""

    def __init__(self) -> None:
        self.threads = _thread_count()
        self.children = set(_children())
        self.descriptors = set(_descriptors())
        self.mappings = set(_shared_mappings())
        self.modules = set(sys.modules)


def preload(loader: Loader, settings: Settings, kept_out: Collection[str]) -> Imports:
    """Import all modules that may be shared, but those in `kept_out`.

    When some are unfit, so is this process as a template: another one must do it, and keep them
    out. Raises ModuleLoadError with all modules that fail.
    """
    unfit, fit = {}, 0
    problems: list[str] = []
    for entry in loader.entries:
        if entry.name in kept_out or not settings.preloads(entry.table):
            continue
        before = _State()
        try:
            if loader.import_module(entry) is None:
                continue
        except ModuleLoadError as error:
            problems.extend(error.problems)
            continue
        if (reason := _why_unfit(before)) is not None:
            unfit[entry.name] = reason
        else:
            fit += 1
    if problems:
        raise ModuleLoadError(*problems)
    return Imports(unfit=unfit, shared=fit)


def end_children() -> None:
    """Send TERM to all processes that modules have started here."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _why_unfit(before: _State) -> str | None:
    """What an import has made that cannot be shared; None when it is fit."""
    now = _State()
    if now.threads > before.threads and not _threads_end_at_fork(before.threads):
        return "it starts a thread"
    if now.children - before.children:
        return "it starts a process"
    opened = now.descriptors - before.descriptors
    if opened:
        return f"it opens {', '.join(sorted(link for _, link in opened))}"
    if now.mappings - before.mappings:
        return "it maps memory that processes share"
    return next(_generators(now.modules - before.modules), None)


def _threads_end_at_fork(threads: int) -> bool:
    """Whether the threads that an import has started, beyond `threads`, end before a fork.

    Libraries that are made for forks end their threads with pthread_atfork(3), and start them again
    when they are needed, as numpy's OpenBLAS does.
    """
    if (pid := os.fork()) == 0:
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    until = time.monotonic() + _JOIN_SECONDS
    while _thread_count() > threads:
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def _generators(names: Set[str]) -> Iterator[str]:
    """Generators of random numbers in these modules, but for those that a worker seeds anew.

    Reads only the objects' types, never an attribute, which could make a lazy object load what it
    stands for.
    """
    for name in sorted(names - _SEEDED_ANEW):
        module = sys.modules.get(name)
        if not issubclass(type(module), ModuleType):
            continue
        for variable, value in list(vars(module).items()):
            kind = type(value)
            pythons = issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom)
            if pythons or (kind.__module__, kind.__name__) in _NUMPY_GENERATORS:
                yield f"{name}.{variable} is a generator of random numbers"


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def _children() -> Iterator[int]:
    for thread in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{thread}/children", encoding="ascii") as stream,
        ):
            yield from map(int, stream.read().split())


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            yield int(name), os.readlink(f"/proc/self/fd/{name}")


def _shared_mappings() -> Iterator[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            where, mode, *_ = line.split(maxsplit=2)
            if mode.endswith("s") and "w" in mode:
                yield where
