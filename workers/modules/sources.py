"""Importing the code that a file has now, not what Python once made of it.

Python keeps compiled code beside a module, in `__pycache__`, and takes it for the file's as long as
size and time of change, in whole seconds, are the same. Of a file that is changed twice within a
second, or replaced with one of the same time as rsync(1), tar(1) and images do, that may be the
code before; and a reload must not say that it has loaded the new one.

Here such a cache counts only when it was written after the last change of the source's inode, a
time that nobody can set. None is written: the daemon leaves nothing in the folders of others.

Python's own library and installed packages, whose caches installers renew, are left to Python: they
are large, and where they were copied or given to another user each start would compile them.
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
from importlib.util import cache_from_source


class FreshLoader(SourceFileLoader):
    """Loads a source file, or what is cached of it where that is younger than the file."""

    def get_data(self, path: str) -> bytes:
        """A file's bytes. Raises OSError for the source's cache when that may be of another one."""
        if path == cache_from_source(self.path) and os.stat(path).st_mtime_ns <= self._changed():
            raise OSError(f"{path} may be older than {self.path}")
        return super().get_data(path)

    def _changed(self) -> int:
        """When the source was changed last, or the link to it was made; nanoseconds."""
        return max(os.stat(self.path).st_ctime_ns, os.lstat(self.path).st_ctime_ns)

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Called to write the cache."""


_find = FileFinder.path_hook(
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (FreshLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)
_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_INSTALLED = {"site-packages", "dist-packages"}


def load_fresh() -> None:
    """From now on, all that this process imports by `sys.path` is loaded so, but for libraries."""
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)
        sys.path_importer_cache.clear()


def _hook(path: str) -> PathEntryFinder:
    if f"{path}/".startswith(_LIBRARY) or not _INSTALLED.isdisjoint(path.split("/")):
        raise ImportError(f"{path} is left to Python's own finder")
    return _find(path)
