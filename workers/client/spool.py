"""Large requests that wait for room are kept in a file, not in memory.

A request that waits takes memory and cannot run to give it back: enough large ones would close the
gate for good. So one that is large is written to a file without a name, and read and decoded again
when its turn has come. The file is in /var/tmp, because /tmp is often memory as well; where no file
can be made (the disk is full, no descriptor is left), the request stays in memory.
"""

import contextlib
import ctypes
import os
import tempfile
from typing import IO

LARGE = 256 * 1024  # bytes; smaller requests stay in memory: a connection each, that is not much
FOLDER = "/var/tmp"
# The C library keeps memory that is freed. Asked twice: the first time a thread may not have
# dropped its last reference yet.
_TIMES = 2

_times_due = 0


def spool(data: bytes) -> IO[bytes] | None:
    """A file that holds the data; None when the data is small, or there can be no file."""
    if len(data) < LARGE:
        return None
    folder = FOLDER if os.access(FOLDER, os.W_OK) else None  # None: where TMPDIR says
    try:
        file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    except OSError:
        return None
    _give_back_soon()
    return file


def _give_back_soon() -> None:
    global _times_due
    _times_due = _TIMES


def give_memory_back() -> None:
    """Give back to the system what large requests have taken, if there were any lately.

    Called in the worker's main thread, once a second.
    """
    global _times_due
    if _times_due:
        _times_due -= 1
        with contextlib.suppress(AttributeError):  # not the GNU C library
            ctypes.CDLL(None).malloc_trim(0)


def unspool(file: IO[bytes]) -> bytes:
    """What the file holds; it is closed. Raises OSError."""
    _give_back_soon()  # when the request has run
    with file:
        file.seek(0)
        return file.read()
