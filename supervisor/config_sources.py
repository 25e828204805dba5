"""Reading the settings: the file, the environment and the command's flags, checked and merged.

Each later source beats the earlier: defaults, file, environment, flags. All mistakes are reported,
each in one line that names the source, the key, the value and what is allowed; nothing is guessed
or ignored.

Called in the `cpanbridged` command before anything is started, and by the master for each reload.
"""

import contextlib
import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cpanbridge.supervisor import config
from cpanbridge.supervisor.config import ConfigError, Limits, Loaded, Settings
from cpanbridge.supervisor.config_warnings import warnings_about, warnings_about_environment
from cpanbridge.supervisor.validation import checked
from cpanbridge.supervisor.wording import explain

_PREFIX = "CPAN_BRIDGE_"
# The variables that are not named by the prefix and the key's last part.
_ENVIRONMENT_NAMES = {"listen": "SOCKET", "limits.idle_timeout": "TIMEOUT"}
_ENVIRONMENT_KEYS = (
    *("listen", "workers", "threads", "max_requests", "debug", "overload", "preload"),
    *(f"limits.{name}" for name in Limits.__struct_fields__),
)
ENVIRONMENT = {
    _PREFIX + _ENVIRONMENT_NAMES.get(key, key.rpartition(".")[2].upper()): key
    for key in _ENVIRONMENT_KEYS
}
# Read by the Perl clients, this one and the first: no options of the daemon, and no mistakes.
_CLIENT_ENVIRONMENT = frozenset({"CPAN_BRIDGE_JSON", "CPAN_BRIDGE_FALLBACK"})
# Of the first daemon; what has become of them stands in docs/migration.md.
_FIRST_ENVIRONMENT = frozenset({"CPAN_BRIDGE_DAEMON_SCRIPT", "CPAN_BRIDGE_STRICT_VALIDATION"})
# What the environment and flags may set, with its type: all but tables.
_SETTABLE: dict[str, Any] = {
    f.name: f.type
    for f in msgspec.structs.fields(Settings)
    if f.name not in ("modules", "module_dirs", "limits")
} | {f"limits.{f.name}": f.type for f in msgspec.structs.fields(Limits)}


def load(
    file: str | None = None,
    flags: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    folder: str | None = None,
) -> Loaded:
    """Read all sources and merge them. Raises ConfigError with all mistakes.

    Without a `file`, `/etc/cpanbridged.toml` is read if it exists. `flags` are `KEY=VALUE` texts.
    All paths of the result are absolute: relative ones are relative to `folder`, wherever they were
    set. None: the working folder.
    """
    problems: list[str] = []
    tables: dict[str, Any] = {}
    source = "defaults"
    if file is not None or Path(config.DEFAULT_FILE).exists():
        source = absolute(file or config.DEFAULT_FILE, folder)
        with _collected(problems):
            tables = _read(source)
            _convert(tables, source)
    warnings = []
    for name, text in sorted(environ.items()):
        if not name.startswith(_PREFIX) or name in _CLIENT_ENVIRONMENT or not text:
            continue
        if name in ENVIRONMENT:
            with _collected(problems):
                _set(tables, ENVIRONMENT[name], text, f"environment: {name}")
        else:
            meant = _similar(name, ENVIRONMENT)
            if name in _FIRST_ENVIRONMENT:
                meant = "; it was the first daemon's, see docs/migration.md"
            warnings.append(f"environment: {name} is not an option and has no effect{meant}")
    for flag in flags:
        with _collected(problems):
            _set_by_flag(tables, flag)
    if problems:
        raise ConfigError(*problems)
    settings = _with_absolute_paths(_convert(tables, source), folder)
    variables = {name: key for name, key in ENVIRONMENT.items() if environ.get(name)}
    warnings.extend(warnings_about_environment(variables, settings.limits))
    warnings.extend(warnings_about(settings, tables.get("limits", {})))
    return Loaded(settings, source, warnings)


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Go on after mistakes, and keep them."""
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {explain(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _set_by_flag(tables: dict[str, Any], flag: str) -> None:
    key, separator, text = flag.partition("=")
    if not separator:
        raise ConfigError(f"--set {flag}: must be KEY=VALUE, such as limits.max_connections=50")
    _set(tables, key.strip(), text, "--set")


def _set(tables: dict[str, Any], key: str, text: str, source: str) -> None:
    """Check one value, given as text, and store it under its key."""
    if key not in _SETTABLE:
        allowed = ", ".join(sorted(_SETTABLE))
        meant = _similar(key, _SETTABLE)
        raise ConfigError(
            f"{source}: {key!r} is not an option that can be set here{meant}; allowed: {allowed}"
        )
    raw: Any = paths_in(text) if key in ("listen", "python_path") else text
    label = source if source.startswith("environment") else f"{source} {key}"
    value = checked(raw, _SETTABLE[key], label, strict=False)
    table, _, name = key.rpartition(".")
    if isinstance(within := tables.setdefault("limits", {}) if table else tables, dict):
        within[name] = value


def paths_in(text: str) -> list[str]:
    """The paths in a text that has several, separated by commas; the Perl client reads it alike."""
    return [path.strip() for path in text.split(",") if path.strip()]


def _similar(name: str, names: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _convert(tables: dict[str, Any], source: str) -> Settings:
    """Check all tables, of one source or merged."""
    if type(tables.get("debug")) is int and tables["debug"] in (0, 1):
        tables["debug"] = bool(tables["debug"])  # 0 and 1 are allowed, as in the environment
    return checked(tables, Settings, f"{source}: ")


def _with_absolute_paths(settings: Settings, folder: str | None) -> Settings:
    """The settings with all their paths absolute, for whoever reads them elsewhere."""

    def seen(path: str) -> str:
        return absolute(path, folder)

    def log(path: str, none: str) -> str:
        return path if path == none else seen(path)

    return msgspec.structs.replace(
        settings,
        listen=list(map(seen, settings.listen)) if settings.listen is not None else None,
        log_file=log(settings.log_file, "stderr"),
        security_log=log(settings.security_log, "-"),
        python_path=list(map(seen, settings.python_path)),
        module_dirs=[
            msgspec.structs.replace(each, path=seen(each.path)) for each in settings.module_dirs
        ],
    )


def absolute(path: str, folder: str | None) -> str:
    """A path as seen from `folder`; None: the working folder. Raises ConfigError without one."""
    if os.path.isabs(path):
        return path  # as it was written: its links may lead elsewhere after a `..`
    try:
        return os.path.normpath(os.path.join(folder or os.getcwd(), path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: relative to a working folder that is gone") from None
