"""A process that has nothing left of what it needs: file descriptors, threads."""

import gc
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def no_descriptors(left: int = 0) -> Iterator[None]:
    """Meanwhile this process can open so many more file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill: list[int] = []
    gc.collect()  # what earlier tests have left is not closed meanwhile
    try:
        # Above all that are open: one that is closed meanwhile can be opened again.
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, hard))
        try:
            while True:
                fill.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(left):
                os.close(fill.pop())
        yield
    finally:
        for descriptor in fill:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_threads() -> Iterator[None]:
    """Meanwhile this process can start no thread."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with mock.patch.object(threading.Thread, "start", refuse):
        yield
