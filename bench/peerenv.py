"""The peers' own environment, `bench/.peers`, so that the project's stays clean."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from servers import BENCH

FOLDER = BENCH / ".peers"
BIN = FOLDER / "bin"


class Missing(Exception):
    """A peer that can't be run here; the message says why."""


def install(client: str) -> Path:
    """Install a peer from PyPI unless it is there, and return its command. Raises Missing."""
    command = BIN / client.lower()
    if command.exists() and version("msgspec"):
        return command
    if not (BIN / "python").exists():
        _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run([str(BIN / "pip"), "install", "--quiet", "--disable-pip-version-check", client, "msgspec"])
    return command


def version(client: str) -> str | None:
    """The version that is installed."""
    for found in metadata.distributions(path=[str(path) for path in FOLDER.glob("lib/*/site-*")]):
        if found.name.lower() == client.lower():
            return found.version
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Missing(f"{' '.join(command[:3])} failed: {last}")
