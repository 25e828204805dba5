"""The environment of the other servers, `bench/.peers`: the project's own has none of them."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from servers import BENCH

FOLDER = BENCH / ".peers"
BIN = FOLDER / "bin"


class Missing(Exception):
    """A server that cannot be run here; the message has the reason."""


def install(package: str) -> Path:
    """Install a server from PyPI unless it is there, and return its command. Raises Missing."""
    command = BIN / package.lower()
    if command.exists() and version("msgspec"):
        return command
    if not (BIN / "python").exists():
        _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run(
        [str(BIN / "pip"), "install", "--quiet", "--disable-pip-version-check", package, "msgspec"]
    )
    return command


def version(package: str) -> str | None:
    """The installed version; None without one."""
    for found in metadata.distributions(path=[str(path) for path in FOLDER.glob("lib/*/site-*")]):
        if found.name.lower() == package.lower():
            return found.version
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Missing(f"{' '.join(command[:3])} failed: {last}")
