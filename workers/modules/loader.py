"""Importing what clients may call.

Everything that is exposed is imported before a client is served, so a broken module is one clear
line at start. A template imports what the workers of its generation can share. A worker that it
forks goes on with the same loader, so nothing is imported twice.
"""

import difflib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cpanbridge.supervisor import config
from cpanbridge.supervisor.config import Functions, Module, ModuleDir, Settings
from cpanbridge.supervisor.wording import explain_start
from cpanbridge.workers.modules.module_dirs import HelperFolder
from cpanbridge.workers.modules.registry import Exposed, Registry
from cpanbridge.workers.modules.sources import load_fresh

_HOOKS = ("cleanup_stale_resources", "shutdown")
_IMPORTLIB = os.path.dirname(importlib.__file__)
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))


class ModuleLoadError(config.OperatorError):
    """A module cannot be exposed as configured; one line that says which, where and why."""


class Entry(NamedTuple):
    """A module to be exposed."""

    name: str  # as clients call it
    table: Module | ModuleDir  # the configuration's table that exposes it
    label: str  # what errors of the configuration begin with
    importing: Callable[[], ModuleType]


class Loader:
    """Imports all that the settings expose, in one process or in one and its children."""

    def __init__(self, settings: Settings, built_in: Collection[str]) -> None:
        self._settings = settings
        self._built_in = built_in  # the names of the built-in modules
        self.left_out: dict[str, str] = {}  # modules that could not be imported -> why
        # Called with the label of each module before it is imported, and with "" after the last.
        self.on_import: Callable[[str], None] = lambda label: None

    @cached_property
    def entries(self) -> list[Entry]:
        """All modules, in the order in which they are imported. Raises ModuleLoadError.

        Folders are read once: a file that is added later is for the next generation.
        """
        return list(self._find())

    def import_module(self, entry: Entry) -> ModuleType | None:
        """Import a module; None when it is left out. Raises ModuleLoadError.

        A folder's file is left out when a module that it imports is missing, and the other files
        load: such folders have helpers for libraries that not every host has.
        """
        if entry.name in self.left_out:
            return None
        self.on_import(entry.label)
        try:
            return entry.importing()
        except BaseException as error:  # a module may raise anything, or call sys.exit
            table, what = entry.table, entry.label
            if isinstance(table, Module):
                what = f"{entry.label}: import of {table.import_!r}"
            problem = f"{what} failed: {_describe(error)}"
            if isinstance(table, Module) or not isinstance(error, ImportError):
                raise ModuleLoadError(problem) from error
            self.left_out[entry.name] = problem
            return None

    def load(self, built_in: dict[str, Exposed]) -> Registry:
        """Import all, and list what may be called. Raises ModuleLoadError with all failures."""
        exposed: dict[str, Exposed] = {}
        problems: list[str] = []
        for entry in self.entries:
            try:
                module = self.import_module(entry)
                if module is not None:
                    exposed[entry.name] = self._expose(entry, module)
            except ModuleLoadError as error:
                problems.extend(error.problems)
        self.on_import("")
        if problems:
            raise ModuleLoadError(*problems)
        return Registry(built_in | exposed, self.left_out)

    def _expose(self, entry: Entry, module: ModuleType) -> Exposed:
        table = entry.table
        functions = _select(module, table.functions, entry.label)
        if isinstance(table, Module) and table.functions == "*" and not functions:
            problem = f"finds no function of {table.import_!r}'s own; name them"
            raise ModuleLoadError(f'{entry.label}: "*" {problem}')
        timeout = self._settings.timeout_of(table)
        lenient = table.results == "lenient"
        return Exposed(functions, module, False, timeout, table.affinity, lenient)

    def _find(self) -> Iterator[Entry]:
        load_fresh()
        settings = self._settings
        folders = (*settings.python_path, *(each.path for each in settings.module_dirs))
        if missing := [
            f"{folder}: not a folder" for folder in folders if not Path(folder).is_dir()
        ]:
            raise ModuleLoadError(*missing)
        for folder in folders:
            if os.path.abspath(folder) not in sys.path:
                sys.path.append(os.path.abspath(folder))
        seen: set[str] = set()
        for directory in settings.module_dirs:
            yield from self._find_in(directory, seen)
        for name, table in settings.modules.items():
            label = f"modules.{name}"
            if name in self._built_in:
                raise ModuleLoadError(f"{label}: the name is taken by a built-in module")
            yield Entry(name, table, label, partial(importlib.import_module, table.import_))

    def _find_in(self, directory: ModuleDir, seen: set[str]) -> Iterator[Entry]:
        """A folder's files, but those with a leading underscore and those of a table's name."""
        helpers = HelperFolder(directory.path)
        helpers.install()
        for file in sorted(Path(directory.path).glob("*.py")):
            name = file.stem
            if name.startswith("_") or name in self._settings.modules or not file.is_file():
                continue  # an editor's lock, a link that leads nowhere, a folder
            if name in seen:
                raise ModuleLoadError(f"{file}: another folder has a module {name!r} already")
            seen.add(name)
            if name in self._built_in:
                self.left_out[name] = f"{file}: the name {name!r} is taken by a built-in module"
            elif not re.match(config.NAME_PATTERN, name) or len(name) > config.MAX_MODULE_NAME:
                self.left_out[name] = f"{file}: clients cannot name a module {name!r}; rename it"
            else:
                importing = partial(helpers.import_helper, name)
                yield Entry(name, directory, str(file), importing)


def _describe(error: BaseException) -> str:
    """What an import has raised, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    # The line in the operator's own code says more than the one in a library that it called.
    own = [f for f in theirs if not f.filename.startswith(_LIBRARIES)] or [
        f for f in theirs if not f.filename.startswith(_IMPORTLIB)
    ]
    at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        at = f" ({error.filename}:{error.lineno})"
        error = SyntaxError(error.msg)
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        path = f": {error.filename}" if error.filename is not None else ""
        text = explain_start(error) + path
    return f"{type(error).__name__}: {' '.join(text.split())}{at}"


def _select(module: ModuleType, functions: Functions, label: str) -> dict[str, Callable[..., Any]]:
    if functions == "*":
        return _public_functions(module)
    selected, problems = {}, []
    for name in functions:
        function = getattr(module, name, None)
        if not callable(function):
            problem = "is not callable" if hasattr(module, name) else "does not exist"
            close = difflib.get_close_matches(name, _public_functions(module), 1)
            problem += f" in {module.__name__}"
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"{label}: function {name!r} {problem}{hint}")
        elif inspect.iscoroutinefunction(function):
            problems.append(f"{label}: {name!r} is a coroutine function; expose a plain one")
        else:
            selected[name] = function
    if problems:
        raise ModuleLoadError(*problems)
    return selected


def _public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """What `"*"` exposes: functions that the module defines, or declares in `__all__`.

    Not: names that no request can have, as those with a leading underscore, classes, coroutine
    functions, the hooks, and functions that are merely imported.
    """
    declared = set(getattr(module, "__all__", ()))
    return {
        name: value
        for name, value in vars(module).items()
        if re.match(config.NAME_PATTERN, name)
        and len(name) <= config.MAX_FUNCTION_NAME
        and name not in _HOOKS
        and inspect.isroutine(value)
        and not inspect.iscoroutinefunction(value)
        and (name in declared or getattr(value, "__module__", None) == module.__name__)
    }
