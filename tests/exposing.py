"""Writing and exposing modules: the registry of a configuration, and calls by its tables."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cpanbridge.supervisor.config import Settings
from cpanbridge.supervisor.config_sources import load
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules.loader import Loader
from cpanbridge.workers.modules.registry import Exposed, Registry
from cpanbridge.workers.modules.registry import call as call_target
from cpanbridge.workers.protocol.requests import Request

CLIENT = ClientSocket(-1, 0)


def settings(folder: Path, config: str) -> Settings:
    """The settings of a configuration, which is written into the folder."""
    file = folder / "settings.toml"
    file.write_text(config)
    return load(str(file), environ={}).settings


def load_all(settings: Settings, built_in: Collection[str] = ()) -> Registry:
    """Import all that the settings expose, beside empty built-in modules of these names."""
    return Loader(settings, built_in).load({name: Exposed({}, None) for name in built_in})


def write_modules(folder: Path, **files: str) -> Path:
    """Write modules, by their names and texts, into a folder, which need not exist; returns it."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def expose(folder: Path, functions: str = '"*"', **files: str) -> Registry:
    """The registry of a folder with these modules."""
    write_modules(folder, **files)
    config = f'[[module_dirs]]\npath = "{folder}"\nfunctions = {functions}\n'
    return load_all(settings(folder, config))


def expose_module(folder: Path, name: str, functions: str) -> Registry:
    """The registry of one module `m`, which is imported under this name, also from the folder."""
    config = f'[modules.m]\nimport = "{name}"\nfunctions = {functions}\n'
    return load_all(settings(folder, f'python_path = ["{folder}"]\n{config}'))


def call(registry: Registry, module: str, function: str, params: Any = None) -> Any:
    """A call's result. Raises what the function raises, or Refusal."""
    request = Request(module, function, params)
    result, error = call_target(registry.find(request), request, CLIENT)
    if error is not None:
        raise error
    return result
