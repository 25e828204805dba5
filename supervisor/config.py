"""Settings: the file, the environment and the command's flags, checked and merged.

Each later source beats the earlier: defaults, file, environment, flags. A mistake is reported in
one line that names the source, the key, the value and what is allowed; nothing is guessed or
ignored. The types below are the rules; `validation` checks values against them.

Read in the `cpanbridged` command before anything is started, and by the master for each reload.
Workers receive the finished `Settings`.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import psutil
from msgspec import Meta

from cpanbridge.supervisor.validation import ConfigError as ConfigError
from cpanbridge.supervisor.validation import OperatorError as OperatorError
from cpanbridge.supervisor.validation import checked

DEFAULT_FILE = "/etc/cpanbridged.toml"
ENVIRONMENT_PREFIX = "CPAN_BRIDGE_"
MAX_WORKERS = 256

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]*\Z"
MAX_MODULE_NAME = 50
MAX_FUNCTION_NAME = 100

# A frame begins with a 4-byte length, and the first byte tells a framed client from a one-shot one.
# Up to here that byte stays below 9, the smallest byte that may begin a one-shot request.
MAX_REQUEST_SIZE = 9 * 2**24 - 1

LONGEST_SECONDS = 2_000_000  # 23 days: poll(2) takes milliseconds in 32 bits
UPGRADE_VARIABLE = "CPANBRIDGED_HANDOVER"  # in a new master's environment: its end of the talk
# A worker ends by itself when its time is over, but its shutdown hooks have at least a second. A
# worker that cannot end is killed so many seconds after its time.
KILL_MARGIN = 3.0


def _name(most: int) -> Meta:
    rule = f"must be a letter followed by letters, digits and _, at most {most} characters"
    return Meta(pattern=NAME_PATTERN, max_length=most, description=rule)


# A description says what is allowed, where msgspec's message would not help an operator.
Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=LONGEST_SECONDS)]
SecondsOrNever = Annotated[float, Meta(ge=0, le=LONGEST_SECONDS)]
Flag = Annotated[bool, Meta(description="must be true or false")]
Text = Annotated[str, Meta(min_length=1)]
ModuleName = Annotated[str, _name(MAX_MODULE_NAME)]
FunctionName = Annotated[str, _name(MAX_FUNCTION_NAME)]
Functions = Annotated[
    list[FunctionName] | Literal["*"], Meta(description='must be "*" or a list of function names')
]
Affinity = Annotated[
    Literal["none", "client", "module"], Meta(description='must be "none", "client" or "module"')
]
Sockets = Annotated[list[Text], Meta(min_length=1, description="must be a list of socket paths")]
Mode = Annotated[
    str,
    Meta(pattern=r"^0?[0-7]{3}\Z", description='must be an octal mode such as "0600" or "0660"'),
]
User = Annotated[str, Meta(min_length=1, description="must be a user's name")]
Group = Annotated[str, Meta(min_length=1, description="must be a group's name")]
LogFormat = Annotated[Literal["text", "json"], Meta(description='must be "text" or "json"')]
Overload = Annotated[Literal["wait", "reject"], Meta(description='must be "wait" or "reject"')]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[limits]`. Times are in seconds, sizes in bytes unless the name says otherwise."""

    max_memory_mb: Positive = 1024
    max_cpu_percent: Annotated[float, Meta(gt=0, le=1_000_000)] = 200.0
    max_requests_per_minute: Annotated[int, Meta(ge=0, le=10_000_000)] = 2000
    max_concurrent_requests: Positive = 100
    max_connections: Positive = 100
    max_sessions: Positive = 4096
    stale_timeout: Seconds = 300
    resource_check_interval: Seconds = 60
    max_request_size: Annotated[int, Meta(ge=1, le=MAX_REQUEST_SIZE)] = 10_485_760
    idle_timeout: Seconds = 1800
    cleanup_interval: Seconds = 300
    max_string_length: Count = 0
    max_array_length: Count = 0
    max_param_count: Count = 0
    max_object_depth: Annotated[int, Meta(ge=1, le=500)] = 64
    read_timeout: Seconds = 30
    request_timeout: SecondsOrNever = 0
    graceful_timeout: Seconds = 30
    drain_timeout: SecondsOrNever = 0
    sample_interval: Seconds = 1
    memory_grace: SecondsOrNever = 5
    slow_request: SecondsOrNever = 0


class Module(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[modules.NAME]`: a Python module under the name that clients call it by."""

    import_: Text = msgspec.field(name="import")
    functions: Functions
    affinity: Affinity = "none"
    request_timeout: SecondsOrNever | None = None
    preload: Flag | None = None


class ModuleDir(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[[module_dirs]]`: each `*.py` in the folder is a module of its name."""

    path: Text
    functions: Functions = "*"
    affinity: Affinity = "module"
    request_timeout: SecondsOrNever | None = None
    preload: Flag | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, checked."""

    listen: Sockets | None = None
    socket_mode: Mode = "0600"
    socket_group: Text | None = None
    user: User | None = None
    group: Group | None = None
    workers: Annotated[int, Meta(ge=0, le=MAX_WORKERS)] = 0
    threads: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    max_requests: Count = 0
    log_file: Text = "stderr"
    security_log: Text = "-"
    log_format: LogFormat = "text"
    debug: Flag = False
    overload: Overload = "wait"
    preload: Flag = True
    python_path: list[Text] = msgspec.field(default_factory=list)
    modules: dict[ModuleName, Module] = msgspec.field(default_factory=dict)
    module_dirs: list[ModuleDir] = msgspec.field(default_factory=list)
    limits: Limits = msgspec.field(default_factory=Limits)

    @property
    def sockets(self) -> list[str]:
        """The paths to listen on: as set, or the default for this user."""
        return self.listen or [default_socket()]

    @property
    def worker_count(self) -> int:
        """Workers to run: as set, or one per usable core, at least 2 and at most 8."""
        return self.workers or min(8, max(2, len(os.sched_getaffinity(0))))

    def timeout_of(self, module: Module | ModuleDir) -> float:
        """How many seconds a call of a module may take; 0: no limit."""
        if module.request_timeout is not None:
            return module.request_timeout
        return self.limits.request_timeout

    def preloads(self, module: Module | ModuleDir) -> bool:
        """Whether a module is imported once for all workers, provided that it can be shared."""
        return self.preload if module.preload is None else module.preload

    @property
    def preloads_any(self) -> bool:
        """Whether there is a module that the template should import."""
        tables: list[Module | ModuleDir] = [*self.modules.values(), *self.module_dirs]
        return any(map(self.preloads, tables))

    @property
    def thread_count(self) -> int:
        """Connections that one worker serves at a time: as set, or `max_connections`."""
        return self.threads or self.limits.max_connections


# The variables that are not named by the prefix and the key's last part.
_ENVIRONMENT_NAMES = {"listen": "SOCKET", "limits.idle_timeout": "TIMEOUT"}
_ENVIRONMENT_KEYS = (
    *("listen", "workers", "threads", "max_requests", "debug", "overload", "preload"),
    *(f"limits.{name}" for name in Limits.__struct_fields__),
)
ENVIRONMENT = {
    ENVIRONMENT_PREFIX + _ENVIRONMENT_NAMES.get(key, key.rpartition(".")[2].upper()): key
    for key in _ENVIRONMENT_KEYS
}
# Read by the Perl client: no options of the daemon, but no mistakes either.
_CLIENT_ENVIRONMENT = frozenset({"CPAN_BRIDGE_JSON"})


class Loaded(msgspec.Struct, frozen=True):
    """Settings, the name of their source, and warnings for the operator.

    `follow_link`: whether `log_file` may be a symbolic link. It may where the operator has chosen
    the path.
    """

    settings: Settings
    source: str
    warnings: list[str]
    follow_link: bool = True


Load = Callable[[], Loaded]  # reads the configuration again; raises ConfigError


def default_socket(environ: Mapping[str, str] = os.environ) -> str:
    """The socket path when none is set; the Perl client tries the same paths."""
    uid = os.getuid()
    if uid == 0:
        return "/run/cpanbridged/cpanbridged.sock"
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/cpanbridged.sock"
    return f"/tmp/cpanbridged-{uid}/cpanbridged.sock"


def load(
    file: str | None = None,
    flags: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Loaded:
    """Read all sources and merge them. Raises ConfigError.

    Without a `file`, `/etc/cpanbridged.toml` is read if it exists. `flags` are `KEY=VALUE` texts.
    """
    warnings: list[str] = []
    tables: dict[str, Any] = {}
    source = "defaults"
    if file is not None or Path(DEFAULT_FILE).exists():
        source = file or DEFAULT_FILE
        tables = _read(source)
        _convert(tables, source)
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _CLIENT_ENVIRONMENT or not text:
            continue
        if name in ENVIRONMENT:
            _set(tables, ENVIRONMENT[name], text, f"environment: {name}")
        else:
            warnings.append(f"environment: {name} is not an option and has no effect")
    for flag in flags:
        key, separator, text = flag.partition("=")
        if not separator:
            raise ConfigError(f"--set {flag}: must be KEY=VALUE, such as limits.max_connections=50")
        _set(tables, key.strip(), text, "--set")
    settings = _convert(tables, source)
    warnings.extend(_beyond_the_machine(tables.get("limits", {}), settings.limits))
    together = settings.worker_count * settings.thread_count
    if together < settings.limits.max_connections:
        warnings.append(
            f"threads = {settings.threads}: the {settings.worker_count} workers together serve "
            f"{together} of the {settings.limits.max_connections} connections that "
            "limits.max_connections allows; others wait"
        )
    return Loaded(settings, source, warnings)


def _beyond_the_machine(given: Container[str], limits: Limits) -> Iterator[str]:
    """Warnings about given limits that this machine can never reach."""
    memory = psutil.virtual_memory().total >> 20
    if "max_memory_mb" in given and limits.max_memory_mb > memory:
        yield (
            f"limits.max_memory_mb = {limits.max_memory_mb} is more memory than this machine has "
            f"({memory} MB): it will never be reached"
        )
    cores = os.cpu_count() or 1
    if "max_cpu_percent" in given and limits.max_cpu_percent > 100 * cores:
        yield (
            f"limits.max_cpu_percent = {limits.max_cpu_percent:g} is more than this machine's "
            f"{cores} cores have ({100 * cores}): it will never be reached"
        )


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _set(tables: dict[str, Any], key: str, text: str, source: str) -> None:
    """Check one value, given as text, and store it under its key."""
    if key not in _SETTABLE:
        close = difflib.get_close_matches(key, _SETTABLE, 1, 0.7)
        meant = f"did you mean {close[0]}? " if close else ""
        allowed = ", ".join(sorted(_SETTABLE))
        raise ConfigError(
            f"{source}: {key!r} is not an option that can be set here; {meant}allowed: {allowed}"
        )
    raw: Any = text.split(",") if key in ("listen", "python_path") else text
    label = source if source.startswith("environment") else f"{source} {key}"
    value = checked(raw, _SETTABLE[key], label, strict=False)
    table, _, name = key.rpartition(".")
    (tables.setdefault("limits", {}) if table else tables)[name] = value


def _convert(tables: dict[str, Any], source: str) -> Settings:
    """Check all tables, of one source or merged."""
    if type(tables.get("debug")) is int and tables["debug"] in (0, 1):
        tables["debug"] = bool(tables["debug"])  # 0 and 1 are allowed, as in the environment
    tables = dict(tables)
    modules = tables.get("modules")
    if isinstance(modules, dict):  # one by one, so that an error names the module
        tables["modules"] = {
            name: checked(table, Module, f"{source}: modules.{name}")
            for name, table in modules.items()
        }
        for name in modules:
            if not re.match(NAME_PATTERN, name) or len(name) > MAX_MODULE_NAME:
                rule = _name(MAX_MODULE_NAME).description
                raise ConfigError(f"{source}: modules: the name {name!r} {rule}")
    return checked(tables, Settings, f"{source}: ")


# What the environment and flags may set, with its type: all but tables.
_SETTABLE: dict[str, Any] = {
    f.name: f.type
    for f in msgspec.structs.fields(Settings)
    if f.name not in ("modules", "module_dirs", "limits")
} | {f"limits.{f.name}": f.type for f in msgspec.structs.fields(Limits)}
