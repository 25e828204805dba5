"""Settings: what there is to set, what is allowed, and the defaults.

The types below are the rules; `validation` checks values against them, and `config_sources` reads
the file, the environment and the command's flags. Workers receive the finished `Settings`.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cpanbridge.supervisor.cgroup import Cgroups
from cpanbridge.supervisor.validation import ConfigError as ConfigError
from cpanbridge.supervisor.validation import OperatorError as OperatorError

DEFAULT_FILE = "/etc/cpanbridged.toml"
MAX_WORKERS = 256

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]*\Z"
MAX_MODULE_NAME = 50
MAX_FUNCTION_NAME = 100

# A frame begins with a 4-byte length, and the first byte tells a framed client from a one-shot one.
# Up to here that byte stays below 9, the smallest byte that may begin a one-shot request.
MAX_REQUEST_SIZE = 9 * 2**24 - 1
MAX_REQUESTS_PER_MINUTE = 10_000_000

LONGEST_SECONDS = 2_000_000  # 23 days: poll(2) takes milliseconds in 32 bits
SYSTEM_SOCKET = "/run/cpanbridged/cpanbridged.sock"
# In the environment of a daemon that was root's: its default socket path, which a reload and a new
# master keep to.
DEFAULT_SOCKET_VARIABLE = "CPANBRIDGED_DEFAULT_SOCKET"
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
Results = Annotated[Literal["exact", "lenient"], Meta(description='must be "exact" or "lenient"')]
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
    max_requests_per_minute: Annotated[int, Meta(ge=0, le=MAX_REQUESTS_PER_MINUTE)] = 2000
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
    results: Results = "exact"
    request_timeout: SecondsOrNever | None = None
    preload: Flag | None = None


class ModuleDir(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[[module_dirs]]`: each `*.py` in the folder is a module of its name."""

    path: Text
    functions: Functions = "*"
    affinity: Affinity = "module"
    results: Results = "exact"
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
        """Workers to run: as set, or one per core that may be used, at least 2 and at most 8."""
        return self.workers or min(8, max(2, math.ceil(Cgroups().processors().usable)))

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
    """The socket path when none is set: root's also after root has become another user."""
    return environ.get(DEFAULT_SOCKET_VARIABLE) or default_sockets(environ)[0]


def default_sockets(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Where this user finds a daemon when no path is set; the Perl client tries the same paths."""
    uid = os.getuid()
    if uid == 0:
        return [SYSTEM_SOCKET]
    runtime = environ.get("XDG_RUNTIME_DIR")
    own = [f"{runtime}/cpanbridged.sock"] if runtime else []
    return [*own, f"/tmp/cpanbridged-{uid}/cpanbridged.sock", SYSTEM_SOCKET]
