"""Imports run one way: the master's part knows nothing of what workers are made of."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    f"cpanbridge.{package}.{file.stem}": file
    for package in ("supervisor", "workers")
    for file in sorted((ROOT / package).glob("*.py"))
}
FOR_WORKERS = {
    "config",
    "shared",
    "gate",
    "logs",
    "roster",
    "reports",
    "health",
    "owners",
    "place",
    "postbox",
    "tickets",
    "text",
    "version",
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


def test_every_module_is_looked_at() -> None:
    assert "cpanbridge.supervisor.master" in IMPORTS
    assert "cpanbridge.workers.worker" in IMPORTS
    assert "cpanbridge.workers.protocol" in IMPORTS["cpanbridge.workers.connection"]


def test_every_import_is_of_a_module_that_exists() -> None:
    for name, targets in IMPORTS.items():
        assert targets <= set(FILES), name


def test_nothing_in_the_supervisor_but_cli_imports_workers() -> None:
    offenders = {
        name
        for name, targets in IMPORTS.items()
        if name.startswith("cpanbridge.supervisor.")
        and any(target.startswith("cpanbridge.workers") for target in targets)
    }
    assert offenders == {"cpanbridge.supervisor.cli"}


def test_workers_import_only_the_shared_parts_of_the_supervisor() -> None:
    allowed = {f"cpanbridge.supervisor.{name}" for name in FOR_WORKERS}
    for name, targets in IMPORTS.items():
        if name.startswith("cpanbridge.workers."):
            others = {t for t in targets if t.startswith("cpanbridge.supervisor")}
            assert others <= allowed, name


def test_only_the_command_imports_what_needs_libraries_for_eye_and_format() -> None:
    """The daemon would pay for rich and prometheus-client with memory."""
    importers = {
        part: {name for name in IMPORTS if f"cpanbridge.supervisor.{part}" in IMPORTS[name]}
        for part in ("exposition", "top", "screen")
    }
    assert importers == {
        "exposition": {"cpanbridge.supervisor.cli"},
        "top": {"cpanbridge.supervisor.cli"},
        "screen": {"cpanbridge.supervisor.top"},
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
