"""Imports run one way: from upper rooms to lower ones, and from workers to what they share."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("supervisor", "workers")
# From the top to the bottom: a file imports from its own room and from those below it.
FLOORS = {
    "supervisor": (
        *("cli", "commands", "daemon", "master", "monitor", "reports", "lifecycle", "processes"),
        *("control", "system", "gate", "memory", "listening"),
        *("config_sources", "config_warnings", "config", "cgroup"),
        *("validation", "wording", "version"),
    ),
    "workers": (
        *("template", "worker", "main_thread", "service", "connection", "endings", "boot"),
        *("sessions", "requests", "accept"),
        *("modules", "handoff", "client", "protocol"),
    ),
}
# What workers may know of the supervisor: rooms and single files.
FOR_WORKERS = (
    *("config", "gate", "memory", "wording", "processes.context"),
    *("reports.connections", "reports.health", "reports.reports"),
    *("system.exhaustion", "system.log_text", "system.logs", "system.start_time"),
    *("system.waiting", "version"),
)
MOST_LINES = 350
MOST_COLLABORATORS = 6


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("cpanbridge", *(part for part in parts if part != "__init__")))


FILES = {
    name_of(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))
}


def imported(file: Path) -> Iterator[str]:
    """The project's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name.startswith("cpanbridge"))


IMPORTS = {name: set(imported(file)) for name, file in FILES.items()}


def room_of(name: str) -> tuple[str, str]:
    """The package and the room of a module; a file beside the rooms is one by itself."""
    _, package, *rest = name.split(".")
    return package, rest[0] if rest else ""


def test_every_module_is_looked_at() -> None:
    assert "cpanbridge.supervisor.master" in IMPORTS
    assert "cpanbridge.workers.protocol.framing" in IMPORTS["cpanbridge.workers.connection"]


def test_every_import_is_of_a_module_that_exists() -> None:
    for name, targets in IMPORTS.items():
        assert targets <= set(FILES), name


def test_nothing_in_the_supervisor_but_the_command_imports_workers() -> None:
    rooms = {
        room_of(name)[1]
        for name, targets in IMPORTS.items()
        if room_of(name)[0] == "supervisor"
        and any(room_of(target)[0] == "workers" for target in targets)
    }
    assert rooms == {"commands"}


def test_workers_import_only_the_shared_parts_of_the_supervisor() -> None:
    allowed = tuple(f"cpanbridge.supervisor.{name}" for name in FOR_WORKERS)
    for name, targets in IMPORTS.items():
        if room_of(name)[0] == "workers":
            others = {target for target in targets if room_of(target)[0] == "supervisor"}
            assert {
                t for t in others if not f"{t}.".startswith(tuple(f"{a}." for a in allowed))
            } == set(), name


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_lower_rooms(package: str) -> None:
    floors = FLOORS[package]
    offenders = []
    for name, targets in IMPORTS.items():
        own, room = room_of(name)
        if own != package or not room:
            continue
        for target in targets:
            other, lower = room_of(target)
            if other == package and lower and floors.index(lower) < floors.index(room):
                offenders.append(f"{name} imports {target}")
    assert offenders == []


def test_every_room_says_what_lives_there() -> None:
    rooms = [file for file in FILES.values() if file.name == "__init__.py"]
    assert len(rooms) > 10
    for file in rooms:
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_every_room_is_installed() -> None:
    """An editable install has them all; a wheel has those that are named."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {name for name, file in FILES.items() if file.name == "__init__.py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == rooms


def test_no_file_is_long() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in FILES.values()
        if (n := len(f.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


def collaborators(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1


def test_no_constructor_takes_many_collaborators() -> None:
    many = {}
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                        count = collaborators(each)
                        if count > MOST_COLLABORATORS:
                            many[f"{name}.{node.name}"] = count
    assert many == {}


def test_only_the_command_imports_what_needs_rich_or_prometheus_client() -> None:
    """They would cost the daemon memory."""
    importers = {
        part: {name for name in IMPORTS if f"cpanbridge.supervisor.{part}" in IMPORTS[name]}
        for part in ("reports.prometheus", "control.top", "control.screen")
    }
    assert importers == {
        "reports.prometheus": {"cpanbridge.supervisor.commands.show"},
        "control.top": {"cpanbridge.supervisor.commands.show"},
        "control.screen": {"cpanbridge.supervisor.control.top"},
    }


def test_there_are_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above, name))
        if name not in done:
            for target in sorted(IMPORTS[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())
