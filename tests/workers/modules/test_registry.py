"""How a call's params reach the function, and what comes back; which functions are quick; hooks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from exposing import CLIENT, call, expose, expose_module, load_all, settings

from cpanbridge.workers.modules.registry import Exposed, Registry
from cpanbridge.workers.modules.registry import call as call_target
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request

pytestmark = pytest.mark.usefixtures("imports_undone")


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
    assert isinstance(call_target(called.find(request), request, CLIENT)[1], error)


def test_misfits_and_errors_of_functions_in_c_are_told_apart_too(tmp_path: Path) -> None:
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


def test_built_in_functions_receive_the_request_itself() -> None:
    function = lambda request, client: (request, client)  # noqa: E731
    registry = Registry({"b": Exposed({"f": function}, None, takes_request=True)})
    request = Request("b", "f", [json.loads("5")])
    assert call_target(registry.find(request), request, CLIENT) == ((request, CLIENT), None)


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


# -- hooks --


def test_hooks_are_found_once_for_each_python_module(tmp_path: Path) -> None:
    hooks = "def cleanup_stale_resources(): pass\ndef shutdown(): pass\n"
    (tmp_path / "helper.py").write_text(hooks)
    (tmp_path / "plain.py").write_text("shutdown = 5\n")
    config = f'python_path = ["{tmp_path}"]\n' + "".join(
        f'[modules.{name}]\nimport = "{target}"\nfunctions = []\n'
        for name, target in (("one", "helper"), ("two", "helper"), ("three", "plain"))
    )
    registry = load_all(settings(tmp_path, config))
    assert [name for name, _ in registry.hooks("shutdown")] == ["one"]
    assert [name for name, _ in registry.hooks("cleanup_stale_resources")] == ["one"]
