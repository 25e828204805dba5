"""Importing the code that a file has now, not what Python once made of it.

Python keeps compiled code beside a module, in `__pycache__`, and takes it for the file's as long as
size and time of change, in whole seconds, are the same. Of a file that is changed twice within a
second, or replaced with one of the same time as rsync(1), tar(1) and images do, that may be the
code before; and a reload must not say that it has loaded the new one.

Here such a cache counts only when it was written after the last change of the source's inode, a
time that nobody can set. None is written: the daemon leaves nothing in the folders of others.
"""

import os
import sys
import sysconfig
from importlib.abc import PathEntryFinder
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)


class FreshLoader(SourceFileLoader):
    """Loads a source file, and is never fooled by what is cached of it."""

    def get_data(self, path: str) -> bytes:
        """The bytes of the source, or of its cache. Raises OSError when that may be another's."""
        if path != self.path and os.stat(path).st_mtime_ns <= os.stat(self.path).st_ctime_ns:
            raise OSError(f"{path} may be older than {self.path}")
        return super().get_data(path)

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Called to write the cache."""


_find = FileFinder.path_hook(
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (FreshLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)
_LIBRARIES = tuple(
    f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def load_fresh() -> None:
    """From now on, all that this process imports by `sys.path` is loaded so.

    But for Python's own library and the installed packages, whose caches installers renew.
    """
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)
        sys.path_importer_cache.clear()


def _hook(path: str) -> PathEntryFinder:
    if f"{path}/".startswith(_LIBRARIES):
        raise ImportError(f"{path} is left to Python's own finder")
    return _find(path)
