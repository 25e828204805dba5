"""What is exposed, what is not, and how a call's params reach the function."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cpanbridge.supervisor.config import Settings, load
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.modules.loader import Loader, ModuleLoadError
from cpanbridge.workers.modules.registry import Exposed, Registry
from cpanbridge.workers.modules.registry import call as call_target
from cpanbridge.workers.protocol.messages import Refusal, Request

PEER = ClientSocket(-1, 0)


pytestmark = pytest.mark.usefixtures("imports_undone")


def settings(folder: Path, config: str) -> Settings:
    file = folder / "settings.toml"
    file.write_text(config)
    return load(str(file), environ={}).settings


def load_all(settings: Settings, built_in: dict[str, Exposed]) -> Registry:
    return Loader(settings, built_in).load(built_in)


def expose(folder: Path, functions: str = '"*"', **files: str) -> Registry:
    """The registry of a folder with the given files."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    config = f'[[module_dirs]]\npath = "{folder}"\nfunctions = {functions}\n'
    return load_all(settings(folder, config), {})


def expose_module(folder: Path, name: str, functions: str) -> Registry:
    config = f'[modules.m]\nimport = "{name}"\nfunctions = {functions}\n'
    return load_all(settings(folder, f'python_path = ["{folder}"]\n{config}'), {})


def call(registry: Registry, module: str, function: str, params: Any = None) -> Any:
    """The result; raises what the function raised, or Refusal."""
    request = Request(module, function, params)
    outcome = call_target(registry.find(request), request, PEER)
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


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
    assert registry.functions_of("helper") == ["a_lambda", "cached", "plain", "wrapped"]


def test_star_leaves_out_what_no_request_may_name(tmp_path: Path) -> None:
    text = f"def {'f' * 100}(): pass\ndef {'g' * 101}(): pass\n"
    assert expose(tmp_path, helper=text).functions_of("helper") == ["f" * 100]


def test_all_adds_what_a_module_imported_but_no_underscore(tmp_path: Path) -> None:
    text = HELPER + '__all__ = ["join", "exported", "_private", "OrderedDict", "no_such"]\n'
    names = expose(tmp_path, helper=text).functions_of("helper")
    assert {"join", "exported", "plain"} <= set(names)
    assert not {"_private", "OrderedDict", "no_such"} & set(names)


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
    assert "sqrt" in expose_module(tmp_path, "math", '"*"').functions_of("m")


# -- named functions --


def test_a_class_or_an_imported_function_can_be_named_outright(tmp_path: Path) -> None:
    registry = expose_module(tmp_path, "decimal", '["Decimal"]')
    assert registry.functions_of("m") == ["Decimal"]
    assert str(call(registry, "m", "Decimal", ["1.5"])) == "1.5"
    assert expose(tmp_path, '["join"]', helper=HELPER).functions_of("helper") == ["join"]


def test_a_named_function_that_is_missing_is_told_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError) as caught:
        expose_module(tmp_path, "statistics", '["maen"]')
    message = str(caught.value)
    assert "modules.m" in message
    assert "'maen' does not exist in statistics; did you mean 'mean'?" in message


def test_a_named_value_that_is_no_function_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError, match="'a_value' is not callable"):
        expose(tmp_path, '["a_value"]', helper=HELPER)


def test_a_named_coroutine_function_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModuleLoadError, match="'coroutine' is a coroutine function"):
        expose(tmp_path, '["coroutine"]', helper=HELPER)


# -- modules that cannot be had --


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


def test_a_file_that_lacks_what_it_imports_is_left_out(tmp_path: Path) -> None:
    registry = expose(tmp_path, lacks="import no_such_module\n", fine="def f():\n    return 1\n")
    assert registry.names == ["fine"]
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


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    config = f'[[module_dirs]]\npath = "{tmp_path}/none"\n'
    with pytest.raises(ModuleLoadError, match="none: not a folder"):
        load_all(settings(tmp_path, config), {})


@pytest.mark.parametrize("name", ["with-dash", "1st", "n" * 51, "\u00e4"])
def test_a_file_that_no_client_could_name_is_told(tmp_path: Path, name: str) -> None:
    registry = expose(tmp_path, **{name: "", "good": "def one(): return 1"})
    assert registry.names == ["good"]
    assert "clients cannot name a module" in registry.left_out[name]


def test_files_with_a_leading_underscore_are_not_exposed(tmp_path: Path) -> None:
    registry = expose(tmp_path, _inner="value = 5", __init__="", helper="import _inner\n")
    assert registry.names == ["helper"]


def test_the_built_in_modules_cannot_be_replaced(tmp_path: Path) -> None:
    config = '[modules.system]\nimport = "os"\nfunctions = "*"\n'
    with pytest.raises(ModuleLoadError, match="taken by a built-in module"):
        load_all(settings(tmp_path, config), {"system": Exposed({}, None)})


def test_a_file_with_the_name_of_a_built_in_module_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "system.py").write_text("raise RuntimeError('it is not even imported')")
    config = f'[[module_dirs]]\npath = "{tmp_path}"\n'
    registry = load_all(settings(tmp_path, config), {"system": Exposed({}, None)})
    assert "taken by a built-in module" in registry.left_out["system"]
    assert registry.names == ["system"]


def test_two_folders_with_a_module_of_one_name_are_told(tmp_path: Path) -> None:
    config = ""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text("")
        config += f'[[module_dirs]]\npath = "{tmp_path / folder}"\n'
    with pytest.raises(ModuleLoadError, match="another folder has a module 'same'"):
        load_all(settings(tmp_path, config), {})


# -- folders --


def test_a_table_beats_the_folders_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "stats.py").write_text("raise RuntimeError('is not even imported')")
    config = (
        '[modules.stats]\nimport = "statistics"\nfunctions = ["mean"]\n'
        f'[[module_dirs]]\npath = "{tmp_path}"\n'
    )
    registry = load_all(settings(tmp_path, config), {})
    assert registry.functions_of("stats") == ["mean"]
    assert call(registry, "stats", "mean", [[1, 3]]) == 2


def test_a_helper_named_like_a_library_does_not_stand_in_for_it(tmp_path: Path) -> None:
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


def test_hooks_are_found_once_for_each_python_module(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "plain.py").write_text("shutdown = 5\n")
    config = f'python_path = ["{tmp_path}"]\n' + "".join(
        f'[modules.{name}]\nimport = "{target}"\nfunctions = []\n'
        for name, target in (("one", "helper"), ("two", "helper"), ("three", "plain"))
    )
    registry = load_all(settings(tmp_path, config), {})
    assert [name for name, _ in registry.hooks("shutdown")] == ["one"]
    assert [name for name, _ in registry.hooks("cleanup_stale_resources")] == ["one"]


# -- calls --

CALLED = """
import functools
def none(): return "none"
def one(value): return value
def two(first, second="default"): return [first, second]
def only_keyword(*, value): return value
def only_position(value, /): return value
def any_(*args, **kwargs): return [list(args), kwargs]
def inside(): return one()
def c_inside(): return len(5)
def deeper(value): return sorted(value)
def misleading(): raise TypeError("misleading() missing 1 required positional argument: 'x'")
@functools.wraps(one)
def takes_anything(*args): raise TypeError("inside")
def exits(): raise SystemExit(3)
def interrupted(): raise KeyboardInterrupt
@functools.lru_cache
def cached(value): return value
"""


@pytest.fixture
def called(tmp_path: Path) -> Registry:
    return expose(tmp_path, m=CALLED)


@pytest.mark.parametrize(
    ("function", "params", "result"),
    [
        ("none", None, "none"),
        ("none", [], "none"),
        ("none", {}, "none"),
        ("one", [[1]], [1]),
        ("one", [None], None),
        ("one", {"value": {"a": 1}}, {"a": 1}),
        ("one", 5, 5),
        ("one", "text", "text"),
        ("one", False, False),
        ("one", 0, 0),
        ("one", "", ""),
        ("two", [1], [1, "default"]),
        ("two", {"second": 2, "first": 1}, [1, 2]),
        ("only_keyword", {"value": 1}, 1),
        ("only_position", [1], 1),
        ("any_", [1, 2], [[1, 2], {}]),
        (
            "any_",
            {"not an identifier": 1, "self": 2, "": 3},
            [[], {"not an identifier": 1, "self": 2, "": 3}],
        ),
        ("any_", 1.5, [[1.5], {}]),
        ("cached", [1], 1),
    ],
)
def test_params_reach_the_function(
    called: Registry, function: str, params: Any, result: Any
) -> None:
    assert call(called, "m", function, params) == result


@pytest.mark.parametrize(
    ("function", "params"),
    [
        ("none", [1]),
        ("none", 5),
        ("none", {"a": 1}),
        ("one", None),
        ("one", []),
        ("one", {}),
        ("one", [1, 2]),
        ("one", {"wrong": 1}),
        ("only_keyword", [1]),
        ("only_position", {"value": 1}),
        ("cached", [1, 2]),
    ],
)
def test_params_that_do_not_fit_the_signature_are_invalid(
    called: Registry, function: str, params: Any
) -> None:
    with pytest.raises(Refusal, match=rf"^Invalid params for m\.{function}: ") as caught:
        call(called, "m", function, params)
    assert caught.value.kind == "InvalidParams"


@pytest.mark.parametrize(
    ("function", "params"),
    [
        ("inside", None),
        ("c_inside", None),
        ("deeper", [[1, "a"]]),
        ("deeper", [5]),
        ("misleading", None),
        ("takes_anything", [1, 2]),
        ("cached", [[]]),
    ],
)
def test_a_type_error_inside_the_function_is_its_own(
    called: Registry, function: str, params: Any
) -> None:
    with pytest.raises(TypeError):
        call(called, "m", function, params)


@pytest.mark.parametrize(
    ("function", "error"), [("exits", SystemExit), ("interrupted", KeyboardInterrupt)]
)
def test_whatever_a_function_raises_is_its_outcome(
    called: Registry, function: str, error: type[BaseException]
) -> None:
    request = Request("m", function)
    assert isinstance(call_target(called.find(request), request, PEER).error, error)


def test_functions_written_in_c_tell_misfits_from_errors_too(tmp_path: Path) -> None:
    registry = expose_module(tmp_path, "math", '"*"')
    assert call(registry, "m", "sqrt", [9]) == math.sqrt(9)
    assert call(registry, "m", "sqrt", 9) == math.sqrt(9)
    for misfit in (None, [1, 2], {"x": 9}):
        with pytest.raises(Refusal, match=r"Invalid params for m\.sqrt"):
            call(registry, "m", "sqrt", misfit)
    with pytest.raises(TypeError, match="must be real number"):
        call(registry, "m", "sqrt", ["nine"])
    with pytest.raises(ValueError, match="math domain error"):
        call(registry, "m", "sqrt", [-1])


def test_a_request_is_handed_to_built_in_functions_as_it_is() -> None:
    function = lambda request, client: (request, client)  # noqa: E731
    registry = Registry({"b": Exposed({"f": function}, None, takes_request=True)})
    request = Request("b", "f", [json.loads("5")])
    assert call_target(registry.find(request), request, PEER).result == (request, PEER)


# -- quick or slow --


def test_a_function_is_quick_once_its_calls_were_and_no_longer_when_they_are_not(
    called: Registry,
) -> None:
    target = called.find(Request("m", "none"))
    assert not target.is_quick
    for _ in range(50):
        target.took(1_000)
    assert target.is_quick
    for _ in range(50):
        target.took(1_000_000_000)
    assert not target.is_quick


def test_what_is_no_file_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone")
    registry = expose(tmp_path, good="def one():\n    return 1\n")
    assert registry.names == ["good"]
    assert registry.left_out == {}
