"""What is imported is what the file says now, whatever is cached of it."""

import importlib.util
import os
import py_compile
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from plain_client import until

from cpanbridge.workers.helpers import HelperFolder
from cpanbridge.workers.sources import FreshLoader, load_fresh

pytestmark = pytest.mark.usefixtures("imports_undone")

OLD, NEW = "value = 1\n", "value = 2\n"  # of one size


def from_path(folder: Path) -> ModuleType:
    sys.path.append(str(folder))
    load_fresh()
    return importlib.import_module("changing_module")


def from_package(folder: Path) -> ModuleType:
    sys.path.append(str(folder.parent))
    load_fresh()
    return importlib.import_module(f"{folder.name}.changing_module")


def from_helpers(folder: Path) -> ModuleType:
    helpers = HelperFolder(str(folder))
    helpers.install()
    return helpers.import_helper("changing_module")


def from_package_of_helpers(folder: Path) -> ModuleType:
    (folder.parent / "helper.py").write_text(f"from .{folder.name} import changing_module as it\n")
    load_fresh()
    helpers = HelperFolder(str(folder.parent))
    helpers.install()
    module: ModuleType = helpers.import_helper("helper").it
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A module whose code before is cached, as Python sees it: the sizes and times are the same."""
    folder = tmp_path / "a_package"
    folder.mkdir()
    file = folder / "changing_module.py"
    file.write_text(OLD)
    times = file.stat()
    py_compile.compile(str(file), doraise=True)
    file.write_text(NEW)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return file


IMPORTS = [from_path, from_package, from_helpers, from_package_of_helpers]


@pytest.mark.parametrize("importing", IMPORTS)
def test_a_change_is_seen_though_size_and_time_are_the_same(
    file: Path, importing: Callable[[Path], ModuleType]
) -> None:
    assert importing(file.parent).value == 2


def test_python_itself_does_not_see_that_change(file: Path) -> None:
    """Or the tests here test nothing."""
    sys.path.append(str(file.parent))
    assert importlib.import_module("changing_module").value == 1


@pytest.mark.parametrize("importing", IMPORTS)
def test_no_cache_is_written(
    file: Path, importing: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    cache = Path(importlib.util.cache_from_source(str(file)))
    cache.unlink()
    assert importing(file.parent).value == 2
    assert not list(file.parent.parent.rglob("*.pyc"))


def test_a_cache_that_was_written_after_the_last_change_is_used(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_later() -> bool:
        cache = py_compile.compile(str(file), doraise=True)
        assert cache is not None
        return os.stat(cache).st_mtime_ns > os.stat(file).st_ctime_ns

    until(written_later)  # the clock of files has steps
    monkeypatch.setattr(FreshLoader, "source_to_code", lambda *_: pytest.fail("it is compiled"))
    assert from_path(file.parent).value == 2


def test_modules_that_are_there_compiled_only_are_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(NEW)
    py_compile.compile(str(source), str(tmp_path / "changing_module.pyc"), doraise=True)
    assert from_path(tmp_path).value == 2


def test_pythons_own_folders_are_left_to_python(file: Path) -> None:
    load_fresh()
    load_fresh()
    assert not isinstance(importlib.util.find_spec("difflib").loader, FreshLoader)  # type: ignore[union-attr]
    assert not isinstance(importlib.util.find_spec("pytest").loader, FreshLoader)  # type: ignore[union-attr]
    sys.path.append(str(file.parent))
    loader = importlib.util.find_spec("changing_module").loader  # type: ignore[union-attr]
    assert type(loader) is FreshLoader
