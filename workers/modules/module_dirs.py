"""Importing a folder of helper files, which may import each other in every way that Python has.

A helper is imported under its own name, and `import other` in one of them finds the other. The
folder is also a package with a name of its own, so that `from .other import thing` and
`from . import other` find the same module object with the same state, never a second copy.

A helper with the name of a module of Python or a library, `http.py` or `email.py`, is imported
under another name: it must not replace the library's module.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from cpanbridge.workers.modules.sources import FreshLoader


class _HelperSpec(ModuleSpec):
    """A helper's spec: relative imports in it start at `package`."""

    package: str

    @property
    def parent(self) -> str:
        """Its package, which its name does not contain."""
        return self.package


class _Alias(Loader):
    """Loads a helper under its name in the package: the module that exists already."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The helper itself, imported under its own name."""
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put back the module's own spec, which the import system has replaced."""
        module.__spec__ = self._spec


class HelperFolder(MetaPathFinder):
    """Finds the files of one folder, under all their names."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).absolute()
        number = sum(isinstance(each, HelperFolder) for each in sys.meta_path)
        self._package = f"cpanbridge_helpers_{number}"
        self._names: dict[str, str] = {}  # file stem -> the name under which it is imported
        self._files: dict[str, Path] = {}  # that name -> file
        for file in sorted(self._folder.glob("*.py")):
            if file.stem != "__init__":
                name = f"cpanbridge_module_{file.stem}" if _is_taken(file) else file.stem
                self._names[file.stem] = name
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        """Whether a file of the folder is imported under this name."""
        return name in self._files

    def install(self) -> None:
        """From now on they are found, before other modules of these names."""
        sys.meta_path.insert(0, self)

    def import_helper(self, stem: str) -> ModuleType:
        """Import a file of the folder. Raises what the import raises."""
        return importlib.import_module(self._names[stem])

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Called by the import system."""
        if fullname in self._files:
            file = str(self._files[fullname])
            spec = _HelperSpec(fullname, FreshLoader(fullname, file), origin=file)
            spec.has_location = True
            spec.package = self._package
            return spec
        if fullname == self._package:
            init = self._folder / "__init__.py"
            loader = FreshLoader(fullname, str(init)) if init.exists() else None
            package = ModuleSpec(fullname, loader, is_package=True)
            package.submodule_search_locations = [str(self._folder)]
            return package
        above, _, stem = fullname.rpartition(".")
        if above == self._package and stem in self._names:
            return ModuleSpec(fullname, _Alias(self._names[stem]))
        return None


def _is_taken(file: Path) -> bool:
    """Whether a helper's name is that of another module that can be imported."""
    name = file.stem
    if name in sys.stdlib_module_names:
        return True
    if any(name in each for each in sys.meta_path if isinstance(each, HelperFolder)):
        return True  # by another folder's file, imported or not
    imported = sys.modules.get(name)
    if imported is not None:
        return not _is(getattr(imported, "__file__", None), file)
    found = PathFinder.find_spec(name)
    return found is not None and not _is(found.origin, file)


def _is(path: str | None, file: Path) -> bool:
    return path is not None and Path(path).exists() and file.samefile(path)
