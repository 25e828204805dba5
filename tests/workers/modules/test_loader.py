"""What is exposed, what is not, and what is said about modules that cannot be loaded."""

from pathlib import Path

import pytest
from exposing import call, expose, expose_module, load_all, settings

from cpanbridge.workers.modules.loader import ModuleLoadError
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request

pytestmark = pytest.mark.usefixtures("imports_undone")


# -- "*" --

HELPER = """
import os, asyncio, functools, math
from os.path import join
from collections import OrderedDict
from json import dumps as exported

def plain(): return "plain"
def _private(): pass
def __dunder__(): pass
class AClass: pass
class Callable_:
    def __call__(self): pass
an_instance = Callable_()
async def coroutine(): pass
a_value = 17
a_lambda = lambda: "lambda"
@functools.lru_cache
def cached(): return "cached"
@functools.wraps(plain)
def wrapped(): return "wrapped"
def cleanup_stale_resources(): pass
def shutdown(): pass
"""


def test_star_exposes_the_public_functions_that_a_module_defines(tmp_path: Path) -> None:
    registry = expose(tmp_path, helper=HELPER)
    assert registry.exposed["helper"].functions.keys() == {"a_lambda", "cached", "plain", "wrapped"}


def test_star_leaves_out_what_no_request_may_name(tmp_path: Path) -> None:
    text = f"def {'f' * 100}(): pass\ndef {'g' * 101}(): pass\n"
    assert expose(tmp_path, helper=text).exposed["helper"].functions.keys() == {"f" * 100}


def test_all_adds_what_a_module_imported_but_no_underscore(tmp_path: Path) -> None:
    text = HELPER + '__all__ = ["join", "exported", "_private", "OrderedDict", "no_such"]\n'
    names = expose(tmp_path, helper=text).exposed["helper"].functions
    assert {"join", "exported", "plain"} <= names.keys()
    assert not {"_private", "OrderedDict", "no_such"} & names.keys()


@pytest.mark.parametrize(
    "name",
    [
        *("_private", "__dunder__", "AClass", "an_instance", "coroutine", "a_value", "join"),
        *("OrderedDict", "os", "cleanup_stale_resources", "shutdown", "__import__", "__class__"),
    ],
)
def test_all_else_is_not_allowed_and_the_refusal_lists_what_is(tmp_path: Path, name: str) -> None:
    registry = expose(tmp_path, helper=HELPER)
    with pytest.raises(Refusal, match=r"allowed: a_lambda, cached, plain, wrapped") as caught:
        registry.find(Request("helper", name, request_id="r"))
    assert caught.value.kind == "FunctionNotAllowed"
    assert caught.value.request_id == "r"


def test_a_module_that_is_not_exposed_is_not_allowed(tmp_path: Path) -> None:
    registry = expose(tmp_path, helper=HELPER, other="")
    with pytest.raises(Refusal, match=r"'os' is not exposed; allowed: helper, other") as caught:
        registry.find(Request("os", "system", request_id="r"))
    assert caught.value.kind == "ModuleNotAllowed"


def test_star_works_for_modules_written_in_c(tmp_path: Path) -> None:
    assert "sqrt" in expose_module(tmp_path, "math", '"*"').exposed["m"].functions


# -- named functions --


def test_a_class_or_an_imported_function_can_be_named_outright(tmp_path: Path) -> None:
    registry = expose_module(tmp_path, "decimal", '["Decimal"]')
    assert registry.exposed["m"].functions.keys() == {"Decimal"}
    assert str(call(registry, "m", "Decimal", ["1.5"])) == "1.5"
    assert expose(tmp_path, '["join"]', helper=HELPER).exposed["helper"].functions.keys() == {
        "join"
    }


def test_a_named_function_that_is_missing_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError) as caught:
        expose_module(tmp_path, "statistics", '["maen"]')
    message = str(caught.value)
    assert "modules.m" in message
    assert "'maen' does not exist in statistics; did you mean 'mean'?" in message


def test_a_named_value_that_is_no_function_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError, match="'a_value' is not callable"):
        expose(tmp_path, '["a_value"]', helper=HELPER)


def test_a_named_coroutine_function_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError, match="'coroutine' is a coroutine function"):
        expose(tmp_path, '["coroutine"]', helper=HELPER)


# -- modules that cannot be loaded --


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("x = 1\n\nraise ValueError('two\\nlines')\n", "ValueError: two lines", 3),
        ("x = 1\ndef f(:\n", "SyntaxError: ", 2),
        ("\nno_such_name\n", "NameError: name 'no_such_name' is not defined", 2),
        ("import sys\nsys.exit('gone')\n", "SystemExit: gone", 2),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: ", 3),
        ("def f():\n    1 / 0\n\n\nf()\n", "ZeroDivisionError: ", 2),
        ("x = '\x00'\n", "", 0),
    ],
    ids=["raise", "syntax", "name", "exit", "in a library", "in a function", "null byte"],
)
def test_a_broken_module_is_one_line_with_its_file_and_line(
    tmp_path: Path, text: str, kind: str, line: int
) -> None:
    with pytest.raises(ModuleLoadError) as caught:
        expose(tmp_path, broken=text)
    message = str(caught.value)
    assert "\n" not in message
    assert kind in message
    context = f"{tmp_path}/broken.py:{line}" if line else f"{tmp_path}/broken.py"
    assert context in message


def test_a_file_whose_import_is_missing_is_left_out(tmp_path: Path) -> None:
    registry = expose(tmp_path, lacks="import no_such_module\n", fine="def f():\n    return 1\n")
    assert list(registry.exposed) == ["fine"]
    why = "ModuleNotFoundError: No module named 'no_such_module'"
    assert registry.left_out == {
        "lacks": f"{tmp_path}/lacks.py failed: {why} ({tmp_path}/lacks.py:1)"
    }
    with pytest.raises(Refusal, match="could not be loaded") as caught:
        registry.find(Request("lacks", "f"))
    assert caught.value.kind == "ModuleNotAllowed"


def test_a_module_that_cannot_be_imported_is_named_by_its_table(tmp_path: Path) -> None:
    with pytest.raises(
        ModuleLoadError, match=r"^modules\.m: import of 'no_such' failed: "
    ) as caught:
        expose_module(tmp_path, "no_such", '"*"')
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    config = f'[[module_dirs]]\npath = "{tmp_path}/none"\n'
    with pytest.raises(ModuleLoadError, match="none: not a folder"):
        load_all(settings(tmp_path, config))


@pytest.mark.parametrize("name", ["with-dash", "1st", "n" * 51, "\u00e4"])
def test_a_file_that_no_client_could_name_is_left_out(tmp_path: Path, name: str) -> None:
    registry = expose(tmp_path, **{name: "", "good": "def one(): return 1"})
    assert list(registry.exposed) == ["good"]
    assert "clients cannot name a module" in registry.left_out[name]


def test_files_with_a_leading_underscore_are_not_exposed(tmp_path: Path) -> None:
    registry = expose(tmp_path, _inner="value = 5", __init__="", helper="import _inner\n")
    assert list(registry.exposed) == ["helper"]


def test_the_built_in_modules_cannot_be_replaced(tmp_path: Path) -> None:
    config = '[modules.system]\nimport = "os"\nfunctions = "*"\n'
    with pytest.raises(ModuleLoadError, match="taken by a built-in module"):
        load_all(settings(tmp_path, config), ["system"])


def test_a_file_with_the_name_of_a_built_in_module_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "system.py").write_text("raise RuntimeError('it is not even imported')")
    config = f'[[module_dirs]]\npath = "{tmp_path}"\n'
    registry = load_all(settings(tmp_path, config), ["system"])
    assert "taken by a built-in module" in registry.left_out["system"]
    assert list(registry.exposed) == ["system"]


def test_two_folders_with_a_module_of_one_name_are_an_error(tmp_path: Path) -> None:
    config = ""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text("")
        config += f'[[module_dirs]]\npath = "{tmp_path / folder}"\n'
    with pytest.raises(ModuleLoadError, match="another folder has a module 'same'"):
        load_all(settings(tmp_path, config))


# -- folders --


def test_a_table_beats_the_folders_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "stats.py").write_text("raise RuntimeError('is not even imported')")
    config = (
        '[modules.stats]\nimport = "statistics"\nfunctions = ["mean"]\n'
        f'[[module_dirs]]\npath = "{tmp_path}"\n'
    )
    registry = load_all(settings(tmp_path, config))
    assert registry.exposed["stats"].functions.keys() == {"mean"}
    assert call(registry, "stats", "mean", [[1, 3]]) == 2


def test_a_helper_named_like_a_library_does_not_replace_it(tmp_path: Path) -> None:
    registry = expose(
        tmp_path,
        http="def get(): return 'helper'\n",
        json="def loads(x): return 'helper'\n",
        user="import http.client, json\ndef status(): return json.loads('[200]')\n",
    )
    assert call(registry, "http", "get") == "helper"
    assert call(registry, "json", "loads", [1]) == "helper"
    assert call(registry, "user", "status") == [200]


@pytest.mark.parametrize(("first", "second"), [("a", "z"), ("z", "a")])
def test_helpers_that_import_each_other_share_their_state(
    tmp_path: Path, first: str, second: str
) -> None:
    keeper = "value = 0\ndef keep(new):\n    global value\n    value = new\n"
    user = f"import {first}\ndef kept(): return {first}.value\n"
    registry = expose(tmp_path, **{first: keeper, second: user})
    call(registry, first, "keep", [5])
    assert call(registry, second, "kept") == 5


def test_python_path_adds_import_folders_after_pythons_own(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def f(): return 'found'\n")
    (tmp_path / "statistics.py").write_text("def mean(data): return 'shadowed'\n")
    assert call(expose_module(tmp_path, "only_here", '"*"'), "m", "f") == "found"
    assert call(expose_module(tmp_path, "statistics", '["mean"]'), "m", "mean", [[1, 3]]) == 2


def test_what_is_no_file_in_a_folder_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone")
    registry = expose(tmp_path, good="def one():\n    return 1\n")
    assert list(registry.exposed) == ["good"]
    assert registry.left_out == {}
