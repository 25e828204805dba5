"""Importing the code that a file has now, not what Python once compiled from it.

Python uses the compiled code in `__pycache__` as long as the source's size and modification time,
in whole seconds, are the same. For a file that is changed twice within a second, or replaced with
one of the same time as rsync(1), tar(1) and images do, that may be the previous code; and a reload
must not report that it has loaded the new one. Here a cache is used only when it was written after
the last change of the source's inode, a time that nobody can set (ctime). None is written: the
daemon leaves nothing in other users' folders.

Python's own library and installed packages, whose caches installers renew, are left to Python. They
are large, and where they were copied or changed their owner, each start would compile them.
"""

import os
import sys
import sysconfig
from importlib import machinery
from importlib.abc import PathEntryFinder
from importlib.util import cache_from_source


class FreshLoader(machinery.SourceFileLoader):
    """Loads a source file, or its cache where that is younger than the file."""

    def get_data(self, path: str) -> bytes:
        """A file's bytes. Raises OSError for a cache that may be older than its source."""
        if path == cache_from_source(self.path) and os.stat(path).st_mtime_ns <= self._changed():
            raise OSError(f"{path} may be older than {self.path}")
        return super().get_data(path)

    def _changed(self) -> int:
        """When the source was last changed, or the link to it was made; nanoseconds."""
        return max(os.stat(self.path).st_ctime_ns, os.lstat(self.path).st_ctime_ns)

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Called to write the cache; does nothing."""


_find = machinery.FileFinder.path_hook(
    (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    (FreshLoader, machinery.SOURCE_SUFFIXES),
    (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
)
_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_INSTALLED = {"site-packages", "dist-packages"}


def load_fresh() -> None:
    """From now on, use `FreshLoader` for what this process imports by `sys.path`, but libraries."""
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)
        sys.path_importer_cache.clear()


def _hook(path: str) -> PathEntryFinder:
    if f"{path}/".startswith(_LIBRARY) or not _INSTALLED.isdisjoint(path.split("/")):
        raise ImportError(f"{path} is left to Python's own finder")
    return _find(path)
