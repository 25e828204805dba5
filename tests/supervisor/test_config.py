"""Settings: every key, from every source, and the message for every mistake."""

import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cpanbridge.supervisor import config, config_sources
from cpanbridge.supervisor.cgroup import Cgroups, Memory, Processors
from cpanbridge.supervisor.config import ConfigError, Limits, Loaded, Settings
from cpanbridge.supervisor.config_sources import load

# Key, its default, another value, and its name in the environment after CPAN_BRIDGE_.
LIMITS: list[tuple[str, Any, Any]] = [
    ("max_memory_mb", 1024, 512),
    ("max_cpu_percent", 200.0, 150.5),
    ("max_requests_per_minute", 2000, 0),
    ("max_concurrent_requests", 100, 7),
    ("max_connections", 100, 8),
    ("max_sessions", 4096, 10),
    ("stale_timeout", 300, 60.5),
    ("resource_check_interval", 60, 5),
    ("max_request_size", 10_485_760, 1000),
    ("idle_timeout", 1800, 20),
    ("cleanup_interval", 300, 1.5),
    ("max_string_length", 0, 100),
    ("max_array_length", 0, 101),
    ("max_param_count", 0, 102),
    ("max_object_depth", 64, 10),
    ("read_timeout", 30, 0.5),
    ("request_timeout", 0, 9),
    ("graceful_timeout", 30, 3),
    ("drain_timeout", 0, 4),
    ("sample_interval", 1, 0.25),
    ("memory_grace", 5, 0),
    ("slow_request", 0, 2.5),
]
KEYS: list[tuple[str, Any, Any]] = [
    ("listen", None, ["/tmp/a.sock", "/tmp/b.sock"]),
    ("socket_mode", "0600", "0660"),
    ("socket_group", None, "staff"),
    ("user", None, "nobody"),
    ("group", None, "nogroup"),
    ("workers", 0, 3),
    ("threads", 0, 9),
    ("max_requests", 0, 500),
    ("log_file", "stderr", "/tmp/x.log"),
    ("security_log", "-", "/tmp/s.log"),
    ("log_format", "text", "json"),
    ("debug", False, True),
    ("overload", "wait", "wait"),
    ("preload", True, False),
    ("python_path", [], ["/opt/a", "/opt/b"]),
    *((f"limits.{name}", default, other) for name, default, other in LIMITS),
]
IN_ENVIRONMENT = {
    "CPAN_BRIDGE_SOCKET": "listen",
    "CPAN_BRIDGE_WORKERS": "workers",
    "CPAN_BRIDGE_THREADS": "threads",
    "CPAN_BRIDGE_MAX_REQUESTS": "max_requests",
    "CPAN_BRIDGE_DEBUG": "debug",
    "CPAN_BRIDGE_OVERLOAD": "overload",
    "CPAN_BRIDGE_PRELOAD": "preload",
    "CPAN_BRIDGE_TIMEOUT": "limits.idle_timeout",
    **{f"CPAN_BRIDGE_{n.upper()}": f"limits.{n}" for n, _, _ in LIMITS if n != "idle_timeout"},
}
OTHER = {key: other for key, _, other in KEYS}


def get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def as_text(value: Any) -> str:
    """A value as text, for the environment and flags."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return ",".join(value) if isinstance(value, list) else str(value)


class File:
    """Loads settings from a text, or returns the error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, text: str, *flags: str, **environ: str) -> Loaded:
        self.path.write_text(text)
        return load(str(self.path), flags, environ)

    def error(self, text: str, *flags: str, **environ: str) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(text, *flags, **environ)
        message = str(caught.value)
        assert "\n" not in message
        return message


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "c.toml")


# -- defaults --


@pytest.mark.parametrize(("key", "default", "_"), KEYS)
def test_the_default_of_every_key(file: File, key: str, default: Any, _: Any) -> None:
    assert get(file.load("").settings, key) == default


def test_there_is_no_other_key() -> None:
    fields = {f.name for f in msgspec.structs.fields(Settings)} - {"limits"}
    assert fields == {key for key in OTHER if "." not in key} | {"modules", "module_dirs"}
    assert {f.name for f in msgspec.structs.fields(Limits)} == {name for name, _, _ in LIMITS}


def test_workers_are_one_per_core_that_may_be_used_between_2_and_8(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = file.load("").settings
    for affinity, quota, workers in (
        *((1, math.inf, 2), (2, math.inf, 2), (5, math.inf, 5), (8, math.inf, 8)),
        *((64, math.inf, 8), (64, 0.5, 2), (64, 2.5, 3), (3, 5.0, 3)),
    ):
        cores = Processors(affinity, quota, "")
        monkeypatch.setattr(Cgroups, "processors", lambda _, cores=cores: cores)
        assert settings.worker_count == workers
    assert file.load("workers = 20").settings.worker_count == 20


def test_limits_above_those_of_the_cgroup_get_a_warning(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cgroups, "processors", lambda _: Processors(8, 1.5, "/c"))
    monkeypatch.setattr(Cgroups, "memory", lambda _: [Memory("/c", 200 << 20, 0)])
    assert file.load("limits = {max_memory_mb = 180, max_cpu_percent = 150}").warnings == []
    assert file.load("limits = {max_memory_mb = 181, max_cpu_percent = 151}").warnings == [
        "limits.max_memory_mb = 181 is more than a cgroup allows: 180 MB hold",
        "limits.max_cpu_percent = 151 is more than may be used here, 150: it will never be reached",
    ]


def test_threads_are_enough_for_all_connections(file: File) -> None:
    assert file.load("limits.max_connections = 37").settings.thread_count == 37
    assert file.load("threads = 4").settings.thread_count == 4


@pytest.mark.parametrize(
    ("uid", "environ", "path"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/cpanbridged/cpanbridged.sock"),
        (7, {"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/cpanbridged.sock"),
        (7, {}, "/tmp/cpanbridged-7/cpanbridged.sock"),
        (7, {"XDG_RUNTIME_DIR": ""}, "/tmp/cpanbridged-7/cpanbridged.sock"),
    ],
)
def test_the_default_socket_path(
    monkeypatch: pytest.MonkeyPatch, uid: int, environ: dict[str, str], path: str
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    assert config.default_socket(environ) == path
    assert config.default_sockets(environ)[-1] == "/run/cpanbridged/cpanbridged.sock"
    # A master that was root's keeps to root's path.
    kept = {config.DEFAULT_SOCKET_VARIABLE: "/run/kept.sock"}
    assert config.default_socket({**environ, **kept}) == "/run/kept.sock"


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", str(tmp_path / "none.toml"))
    loaded = load(environ={})
    assert loaded.settings == Settings()
    assert loaded.source == "defaults"
    (tmp_path / "none.toml").write_text("workers = 3")
    assert load(environ={}).settings.workers == 3


# -- sources --


@pytest.mark.parametrize(("key", "_", "other"), KEYS)
def test_every_key_in_the_file(file: File, key: str, _: Any, other: Any) -> None:
    loaded = file.load(f"{key} = {as_toml(other)}")
    assert get(loaded.settings, key) == other
    assert loaded.source == str(file.path)


@pytest.mark.parametrize(("name", "key"), IN_ENVIRONMENT.items())
def test_every_key_in_the_environment(file: File, name: str, key: str) -> None:
    settings = file.load("", **{name: as_text(OTHER[key])}).settings
    assert get(settings, key) == OTHER[key]


def test_the_environment_has_no_other_names() -> None:
    assert config_sources.ENVIRONMENT == IN_ENVIRONMENT


@pytest.mark.parametrize(("key", "_", "other"), KEYS)
def test_every_key_as_a_flag(file: File, key: str, _: Any, other: Any) -> None:
    assert get(file.load("", f"{key}={as_text(other)}").settings, key) == other


@pytest.mark.parametrize(
    ("key", "name", "values"),
    [
        ("workers", "CPAN_BRIDGE_WORKERS", (2, 3, 4)),
        ("limits.max_connections", "CPAN_BRIDGE_MAX_CONNECTIONS", (20, 30, 40)),
        ("limits.idle_timeout", "CPAN_BRIDGE_TIMEOUT", (20.5, 30.5, 40.5)),
        ("listen", "CPAN_BRIDGE_SOCKET", (["/tmp/a"], ["/tmp/b"], ["/tmp/c"])),
        ("debug", "CPAN_BRIDGE_DEBUG", (True, False, True)),
    ],
)
def test_the_environment_beats_the_file_and_flags_beat_both(
    file: File, key: str, name: str, values: tuple[Any, Any, Any]
) -> None:
    text = f"{key} = {as_toml(values[0])}"
    environ = {name: as_text(values[1])}
    flag = f"{key}={as_text(values[2])}"
    assert get(file.load(text).settings, key) == values[0]
    assert get(file.load(text, **environ).settings, key) == values[1]
    assert get(file.load(text, flag).settings, key) == values[2]
    assert get(file.load(text, flag, **environ).settings, key) == values[2]
    assert get(file.load("", flag, **environ).settings, key) == values[2]


def test_a_source_keeps_the_keys_of_the_others(file: File) -> None:
    limits = file.load(
        "[limits]\nmax_connections = 5", "limits.read_timeout=2", CPAN_BRIDGE_MAX_OBJECT_DEPTH="9"
    ).settings.limits
    assert limits == Limits(max_connections=5, read_timeout=2, max_object_depth=9)


def test_an_empty_variable_counts_as_unset(file: File) -> None:
    assert file.load("workers = 3", CPAN_BRIDGE_WORKERS="").settings.workers == 3


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("1", True), ("false", False), ("true", True)]
)
def test_debug_is_0_or_1_everywhere(file: File, text: str, value: bool) -> None:
    assert file.load(f"debug = {text}").settings.debug is value
    assert file.load("", CPAN_BRIDGE_DEBUG=text).settings.debug is value
    assert file.load("", f"debug={text}").settings.debug is value


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", True), ("00", False), ("Yes", True), ("on", True), ("off", False), ("NO", False)],
)
def test_a_boolean_in_the_environment_is_a_word_or_a_number(
    file: File, text: str, value: bool
) -> None:
    assert file.load("", CPAN_BRIDGE_DEBUG=text).settings.debug is value
    assert file.load("", f"preload={text}").settings.preload is value


def test_all_paths_are_made_absolute(file: File) -> None:
    file.path.write_text(
        'listen = ["a.sock", "/tmp/b.sock"]\nlog_file = "x.log"\nsecurity_log = "../s.log"\n'
        'python_path = ["lib"]\n[[module_dirs]]\npath = "."\n'
    )
    loaded = load(file.path.name, (), {}, str(file.path.parent))
    assert loaded.source == str(file.path)
    folder, settings = file.path.parent, loaded.settings
    assert settings.sockets == [f"{folder}/a.sock", "/tmp/b.sock"]
    assert settings.log_file == f"{folder}/x.log"
    assert settings.security_log == f"{folder.parent}/s.log"
    assert settings.python_path == [f"{folder}/lib"]
    assert settings.module_dirs[0].path == str(folder)


def test_paths_in_the_environment_are_read_as_the_perl_client_reads_them(file: File) -> None:
    settings = file.load("", CPAN_BRIDGE_SOCKET=" /a b , ,,/c,").settings
    assert settings.sockets == ["/a b", "/c"]


def test_what_is_no_path_is_not_made_absolute(file: File) -> None:
    settings = file.load("").settings
    assert (settings.listen, settings.log_file, settings.security_log) == (None, "stderr", "-")


def test_modules_and_folders(file: File) -> None:
    settings = file.load(
        '[modules.stats]\nimport = "statistics"\nfunctions = ["mean", "stdev"]\n'
        '[modules.all]\nimport = "math"\nfunctions = "*"\naffinity = "none"\n'
        '[[module_dirs]]\npath = "/opt/a"\n'
        '[[module_dirs]]\npath = "/opt/b"\nfunctions = ["f"]\naffinity = "none"\n'
    ).settings
    assert settings.modules["stats"].import_ == "statistics"
    assert settings.modules["stats"].functions == ["mean", "stdev"]
    assert settings.modules["all"].functions == "*"
    assert [each.path for each in settings.module_dirs] == ["/opt/a", "/opt/b"]
    assert [each.functions for each in settings.module_dirs] == ["*", ["f"]]


# -- mistakes --


def test_all_mistakes_are_reported(file: File) -> None:
    with pytest.raises(ConfigError) as caught:
        file.load(
            "workers = -1\nworker = 2\n"
            "limits = {max_connections = 0, read_timeout = 'soon'}\n"
            "modules = {a = {}, b = {import = 'os', functions = ['_exit', 5, 'getpid']}}\n"
            "module_dirs = [{path = ''}, {path = '/a', affinity = 'none', preload = 2}]",
            "threads=many",
            "thread=2",
            CPAN_BRIDGE_TIMEOUT="soon",
        )
    text = "\n".join(caught.value.problems)
    found = re.findall(
        r"^(?:\S*c\.toml: |environment: |--set:? )'?([\w.\[\]]+)", text, re.MULTILINE
    )
    assert found == [
        *("workers", "worker", "limits.max_connections", "limits.read_timeout"),
        *("modules.a", "modules.a", "modules.b.functions[0]", "modules.b.functions[1]"),
        *("module_dirs[0].path", "module_dirs[1].preload"),
        *("CPAN_BRIDGE_TIMEOUT", "threads", "thread"),
    ]
    assert str(caught.value) == "; ".join(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers = 'two'", "workers = 'two': expected a whole number"),
        ("workers = 2.5", "workers = 2.5: expected a whole number"),
        ("workers = -1", "workers = -1: expected a whole number >= 0"),
        ("workers = 257", "workers = 257: expected a whole number <= 256"),
        ("workers = true", "workers = True: expected a whole number"),
        ("threads = []", "threads = []: expected a whole number"),
        ("debug = 2", "debug = 2: must be true or false"),
        ("debug = 'yes'", "debug = 'yes': must be true or false"),
        ("preload = 1", "preload = 1: must be true or false"),
        ("listen = 5", "listen = 5: must be a list of socket paths"),
        ("listen = '/tmp/x'", "listen = '/tmp/x': must be a list of socket paths"),
        ("listen = []", "listen = []: must be a list of socket paths"),
        ("listen = ['']", "listen[0] = '': must be a list of socket paths"),
        ("listen = ['/a', 5]", "listen[1] = 5: must be a list of socket paths"),
        ("socket_mode = '0999'", "socket_mode = '0999': must be an octal mode"),
        ("socket_mode = 0o600", "socket_mode = 384: must be an octal mode"),
        ("socket_group = ''", "socket_group = '': expected a string of length >= 1"),
        ("log_file = ''", "log_file = '': expected a string of length >= 1"),
        ("log_format = 'xml'", 'log_format = \'xml\': must be "text" or "json"'),
        ("overload = 'drop'", "overload = 'drop': must be \"wait\""),
        ("python_path = '/opt'", "python_path = '/opt': expected a list"),
        ("python_path = [1]", "python_path[0] = 1: expected a string"),
        ("limits = 5", "limits = 5: expected a table"),
        ("modules = 5", "modules = 5: expected a table"),
        ("modules.m = 5", "modules.m = 5: expected a table"),
        ("module_dirs = {}", "module_dirs: expected a list"),
        ("module_dirs = [5]", "module_dirs[0] = 5: expected a table"),
        ("limits.max_connections = 0", "limits.max_connections = 0: expected a whole number >= 1"),
        ("limits.max_cpu_percent = 0", "limits.max_cpu_percent = 0: expected a number > 0"),
        ("limits.max_cpu_percent = '5'", "limits.max_cpu_percent = '5': expected a number"),
        ("limits.read_timeout = 0", "limits.read_timeout = 0: expected a number > 0"),
        ("limits.read_timeout = nan", "limits.read_timeout = nan: expected a number > 0"),
        ("limits.read_timeout = inf", "limits.read_timeout = inf: expected a number <= 2000000"),
        ("limits.idle_timeout = -1", "limits.idle_timeout = -1: expected a number > 0"),
        (
            "limits.max_object_depth = 501",
            "limits.max_object_depth = 501: expected a whole number <=",
        ),
        ("limits.max_request_size = 150994944", "max_request_size = 150994944: expected a whole"),
        ("modules.m.functions = '*'", "modules.m: lacks the key import"),
        ("modules.m.import = 'os'", "modules.m: lacks the key functions"),
        (
            "modules.m = {import = '', functions = '*'}",
            "modules.m.import = '': expected a string of length >= 1",
        ),
        (
            "modules.m = {import = 'os', functions = 'getpid'}",
            "modules.m.functions = 'getpid': must be \"*\" or a list of function names",
        ),
        (
            "modules.m = {import = 'os', functions = ['getpid', '_exit']}",
            "modules.m.functions[1] = '_exit': must be a letter followed by letters",
        ),
        (
            "modules.m = {import = 'os', functions = [5]}",
            "modules.m.functions[0] = 5: must be a letter followed by letters",
        ),
        ("modules.'a-b' = {import = 'os', functions = '*'}", "modules: the name 'a-b' must be a"),
        (f"modules.{'m' * 51} = {{import = 'os', functions = '*'}}", "at most 50 characters"),
        ("module_dirs = [{functions = '*'}]", "module_dirs[0]: lacks the key path"),
        ("module_dirs = [{path = 5}]", "module_dirs[0].path = 5: expected a string"),
        ("module_dirs = [{path = ''}]", "module_dirs[0].path = '': expected a string of length"),
    ],
)
def test_a_wrong_value_in_the_file_is_reported(file: File, text: str, words: str) -> None:
    message = file.error(text)
    assert message.startswith(f"{file.path}: ")
    assert words in message


@pytest.mark.parametrize(
    ("text", "where", "allowed"),
    [
        ("worker = 2", "worker", "workers"),
        ("limits.max_connection = 5", "limits.max_connection", "max_connections"),
        ("[limits]\nworkers = 5", "limits.workers", "max_connections"),
        ("max_connections = 5", "max_connections", "limits"),
        ("modules.m = {import = 'os', functions = '*', x = 1}", "modules.m.x", "import, functions"),
        ("[[module_dirs]]\npath = '/a'\nimport = 'os'", "module_dirs[0].import", "path, functions"),
        ("[modules.m.sub]\nx = 1", "modules.m.sub", "import, functions"),
    ],
)
def test_an_unknown_key_is_reported_with_those_that_are_allowed(
    file: File, text: str, where: str, allowed: str
) -> None:
    message = file.error(text)
    assert message.startswith(f"{file.path}: {where}: unknown key; allowed: ")
    assert allowed in message.partition("allowed: ")[2]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("CPAN_BRIDGE_WORKERS", "many", "expected a whole number"),
        ("CPAN_BRIDGE_WORKERS", "2.5", "expected a whole number"),
        ("CPAN_BRIDGE_WORKERS", "-1", "expected a whole number >= 0"),
        ("CPAN_BRIDGE_DEBUG", "maybe", "must be true or false"),
        ("CPAN_BRIDGE_PRELOAD", "maybe", "must be true or false"),
        ("CPAN_BRIDGE_OVERLOAD", "drop", 'must be "wait"'),
        ("CPAN_BRIDGE_SOCKET", " , ", "must be a list of socket paths"),
        ("CPAN_BRIDGE_MAX_CONNECTIONS", "0", "expected a whole number >= 1"),
        ("CPAN_BRIDGE_TIMEOUT", "soon", "expected a number"),
        ("CPAN_BRIDGE_READ_TIMEOUT", "nan", "expected a number"),
    ],
)
def test_a_wrong_variable_is_reported(file: File, name: str, text: str, words: str) -> None:
    message = file.error("", **{name: text})
    assert message.startswith(f"environment: {name}")
    assert words in message
    shown = repr(text) if "," not in text else "[]"
    assert shown in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("workers", "--set workers: must be KEY=VALUE"),
        ("workers=many", "--set workers = 'many': expected a whole number"),
        ("limits.max_connections=0", "--set limits.max_connections = '0': expected a whole number"),
        ("worker=2", "--set: 'worker' is not an option that can be set here; "),
        ("max_connections=2", "--set: 'max_connections' is not an option"),
        ("modules={}", "--set: 'modules' is not an option that can be set here"),
        ("limits=5", "--set: 'limits' is not an option that can be set here"),
        ("=5", "--set: '' is not an option"),
    ],
)
def test_a_wrong_flag_is_reported(file: File, flag: str, words: str) -> None:
    assert file.error("", flag).startswith(words)


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(str(tmp_path / "none.toml"), environ={})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(str(tmp_path), environ={})


@pytest.mark.parametrize("text", ["workers =", "[limits", "workers = 1\nworkers = 2", "\x00"])
def test_invalid_toml_is_reported_with_its_line(file: File, text: str) -> None:
    message = file.error(text)
    assert message.startswith(f"{file.path}: not valid TOML: ")
    assert re.search(r"line \d|end of document", message)


def test_a_file_that_is_not_utf_8_is_reported(file: File) -> None:
    file.path.write_bytes(b"log_file = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(str(file.path), environ={})


# -- affinity, limits, preload --


@pytest.mark.parametrize("affinity", ["none", "client", "module"])
def test_a_module_has_the_affinity_that_is_set(file: File, affinity: str) -> None:
    settings = file.load(
        f"modules.m = {{import='os', functions='*', affinity='{affinity}'}}\n"
        f"module_dirs = [{{path='/a', affinity='{affinity}'}}]"
    ).settings
    assert settings.modules["m"].affinity == affinity
    assert settings.module_dirs[0].affinity == affinity


def test_a_folder_shares_its_state_by_default_and_a_module_has_none(file: File) -> None:
    settings = file.load("modules.m = {import='os', functions='*'}\nmodule_dirs = [{path='/a'}]")
    assert settings.settings.modules["m"].affinity == "none"
    assert settings.settings.module_dirs[0].affinity == "module"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "modules.m = {import='os', functions='*', affinity='user'}",
            "modules.m.affinity = 'user'",
        ),
        ("module_dirs = [{path='/a', affinity=1}]", "module_dirs[0].affinity = 1"),
    ],
)
def test_another_affinity_is_refused(file: File, text: str, where: str) -> None:
    message = file.error(text)
    assert message == f'{file.path}: {where}: must be "none", "client" or "module"'


def test_limits_that_the_machine_can_never_reach_get_a_warning(file: File) -> None:
    (warning,) = file.load("limits.max_memory_mb = 999999").warnings
    assert warning.startswith(
        "limits.max_memory_mb = 999999 is more memory than this machine has ("
    )
    assert warning.endswith("MB): it will never be reached")
    (warning,) = file.load("", CPAN_BRIDGE_MAX_CPU_PERCENT="99999").warnings
    assert warning.startswith("limits.max_cpu_percent = 99999 is more than may be used here, ")
    assert warning.endswith("it will never be reached")
    assert file.load("limits = {max_memory_mb = 64, max_cpu_percent = 50}").warnings == []


@pytest.mark.parametrize("key", ["max_memory_mb", "max_cpu_percent", "max_connections"])
def test_a_limit_of_zero_is_refused_where_nothing_could_ever_run(file: File, key: str) -> None:
    assert f"limits.{key} = 0: expected" in file.error(f"limits.{key} = 0")


def test_an_unknown_variable_gets_a_warning(file: File) -> None:
    loaded = file.load("", CPAN_BRIDGE_MAX_CONECTIONS="5", CPAN_BRIDGE_JSON="PP", PATH="/bin")
    (warning,) = loaded.warnings
    assert warning == (
        "environment: CPAN_BRIDGE_MAX_CONECTIONS is not an option and has no effect; "
        "did you mean CPAN_BRIDGE_MAX_CONNECTIONS?"
    )


def test_variables_of_the_first_client_and_daemon_are_known(file: File) -> None:
    assert file.load("", CPAN_BRIDGE_FALLBACK="0").warnings == []
    (warning,) = file.load("", CPAN_BRIDGE_STRICT_VALIDATION="1").warnings
    assert warning == (
        "environment: CPAN_BRIDGE_STRICT_VALIDATION is not an option and has no effect; "
        "it was the first daemon's, see docs/migration.md"
    )


def test_a_limit_that_refuses_what_the_first_daemon_ran_gets_a_warning(file: File) -> None:
    limits = {"STRING_LENGTH": "10000", "ARRAY_LENGTH": "0", "OBJECT_DEPTH": "10"}
    variables = {f"CPAN_BRIDGE_MAX_{name}": value for name, value in limits.items()}
    loaded = file.load("limits.max_param_count = 5", **variables)
    assert loaded.warnings == [
        "environment: CPAN_BRIDGE_MAX_STRING_LENGTH = 10000: a call with a longer string is "
        "refused (InvalidRequest); in the first daemon it was cut",
        "environment: CPAN_BRIDGE_MAX_OBJECT_DEPTH = 10: a call with data nested deeper is "
        "refused (InvalidRequest); in the first daemon nothing was done",
    ]


@pytest.mark.parametrize("preload", [True, False])
def test_a_modules_own_preload_beats_the_one_for_all(file: File, preload: bool) -> None:
    settings = file.load(
        f"preload = {as_toml(not preload)}\n"
        f'[modules.own]\nimport = "json"\nfunctions = "*"\npreload = {as_toml(preload)}\n'
        '[modules.other]\nimport = "json"\nfunctions = "*"\n'
        f'[[module_dirs]]\npath = "/opt"\npreload = {as_toml(preload)}\n'
    ).settings
    assert settings.preloads(settings.modules["own"]) is preload
    assert settings.preloads(settings.modules["other"]) is not preload
    assert settings.preloads(settings.module_dirs[0]) is preload
    assert settings.preloads_any


def test_nothing_is_preloaded_where_nothing_is_exposed(file: File) -> None:
    assert not file.load("").settings.preloads_any
    module = '[modules.m]\nimport = "json"\nfunctions = "*"\n'
    assert not file.load(f"preload = false\n{module}").settings.preloads_any
    assert not file.load(f"{module}preload = false\n").settings.preloads_any
