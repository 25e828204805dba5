"""The example configuration: complete, and its values are the defaults."""

import re
from pathlib import Path

import msgspec

from cpanbridge.supervisor.config import Limits, Module, ModuleDir, Settings, default_socket
from cpanbridge.supervisor.config_sources import load

EXAMPLE = Path(__file__).parents[1] / "etc" / "cpanbridged.toml"
# A commented option or table; prose has a space after its mark.
OPTION = re.compile(r"^#(?=\[|\w+ += )")


def uncommented() -> str:
    lines = EXAMPLE.read_text().splitlines()
    return "\n".join(OPTION.sub("", line) for line in lines)


def test_it_loads_as_it_stands_and_changes_nothing() -> None:
    loaded = load(str(EXAMPLE), environ={})
    assert loaded.settings == Settings()
    assert loaded.warnings == []


def test_it_mentions_every_option() -> None:
    text = uncommented()
    for struct in (Settings, Limits, Module, ModuleDir):
        for field in msgspec.structs.fields(struct):
            name = field.encode_name
            assert re.search(rf"^(\[+{name}[\].]|{name} += )", text, re.MULTILINE), name


def test_every_value_in_it_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(uncommented())
    settings = load(str(file), environ={}).settings
    defaults = Settings()
    assert settings.limits == Limits()
    for field in msgspec.structs.fields(Settings):
        # Where there is no default, or not one for everybody, an example stands.
        if field.name not in ("listen", "socket_group", "user", "group", "modules", "module_dirs"):
            assert getattr(settings, field.name) == getattr(defaults, field.name), field.name
    assert settings.modules["stats"].import_ == "statistics"
    (folder,) = settings.module_dirs
    assert folder == ModuleDir(path=folder.path, request_timeout=0.0, preload=True)
    assert settings.modules["stats"].affinity == "none"


def test_its_socket_is_where_root_has_it() -> None:
    shown = re.search(r'^#listen = \["(.*)"\]$', EXAMPLE.read_text(), re.MULTILINE)
    assert shown is not None
    assert shown[1] == "/run/cpanbridged/cpanbridged.sock"
    assert default_socket({}).endswith("cpanbridged.sock")


def test_it_names_every_variable_that_is_not_named_like_its_option() -> None:
    text = EXAMPLE.read_text()
    for name in ("SOCKET", "WORKERS", "THREADS", "DEBUG", "OVERLOAD", "PRELOAD", "TIMEOUT"):
        assert f"CPAN_BRIDGE_{name}" in text
