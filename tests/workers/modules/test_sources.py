"""What is imported is what the file says now, whatever is cached of it."""

import importlib.machinery
import importlib.util
import os
import pkgutil
import py_compile
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from plain_client import until

from cpanbridge.workers.modules.module_dirs import HelperFolder
from cpanbridge.workers.modules.sources import FreshLoader, load_fresh

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


def test_a_cache_that_is_as_old_as_the_file_does_not_count(file: Path) -> None:
    changed = file.stat().st_ctime_ns
    os.utime(importlib.util.cache_from_source(str(file)), ns=(changed, changed))
    assert from_path(file.parent).value == 2


def test_a_link_that_leads_elsewhere_now_is_a_change(tmp_path: Path) -> None:
    targets = [tmp_path / "one.py", tmp_path / "two.py"]
    for target, text in zip(targets, (NEW, OLD), strict=True):
        target.write_text(text)
        os.utime(target, ns=(10**18, 10**18))
    link = tmp_path / "folder" / "changing_module.py"
    link.parent.mkdir()
    link.symlink_to(targets[1])
    py_compile.compile(str(link), doraise=True)
    link.unlink()
    link.symlink_to(targets[0])
    assert from_path(link.parent).value == 2


def test_other_files_of_a_package_are_read_however_old(file: Path) -> None:
    (file.parent / "__init__.py").touch()
    data = file.parent / "data.sql"
    data.write_text("select")
    os.utime(data, (0, 0))
    from_package(file.parent)
    assert pkgutil.get_data(file.parent.name, "data.sql") == b"select"


def test_the_package_of_a_helper_folder_is_loaded_so(file: Path) -> None:
    init = file.parent / "__init__.py"
    init.write_text(OLD)
    times = init.stat()
    py_compile.compile(str(init), doraise=True)
    init.write_text(NEW)
    os.utime(init, ns=(times.st_atime_ns, times.st_mtime_ns))
    (file.parent / "helper.py").write_text("from . import value\n")
    helpers = HelperFolder(str(file.parent))
    helpers.install()
    assert helpers.import_helper("helper").value == 2


def test_what_was_looked_up_before_is_looked_up_anew(file: Path) -> None:
    sys.path.append(str(file.parent))
    assert importlib.util.find_spec("changing_module")
    assert from_path(file.parent).value == 2


def test_extension_modules_come_first_as_they_always_do(file: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (file.parent / f"changing_module{suffix}").touch()
    sys.path.append(str(file.parent))
    load_fresh()
    spec = importlib.util.find_spec("changing_module")
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


@pytest.mark.parametrize("name", ["site-packages", "dist-packages"])
def test_installed_packages_are_left_to_python(file: Path, name: str) -> None:
    """They may be large, and a copy of them has no cache that counts."""
    folder = file.parent / name
    folder.mkdir()
    file.rename(folder / file.name)
    sys.path.append(str(folder))
    load_fresh()
    loader = importlib.util.find_spec("changing_module").loader  # type: ignore[union-attr]
    assert type(loader) is importlib.machinery.SourceFileLoader


def test_pythons_own_folders_are_left_to_python(file: Path) -> None:
    load_fresh()
    load_fresh()
    for name in ("difflib", "pytest"):  # not util.find_spec: they are imported already
        spec = importlib.machinery.PathFinder.find_spec(name)
        assert spec is not None
        assert not isinstance(spec.loader, FreshLoader)
    sys.path.append(str(file.parent))
    loader = importlib.util.find_spec("changing_module").loader  # type: ignore[union-attr]
    assert type(loader) is FreshLoader
