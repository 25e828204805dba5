"""Limits on `params`: the depth is exact, and a refusal has the value's path and the limit."""

import json
import tracemalloc
from typing import Any

import pytest
from decoding import DEFAULTS, decode_params, refusal, refusal_of
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import decode_request


def nested(levels: int, kind: str = "list") -> Any:
    value: Any = [] if kind == "list" else {}
    for _ in range(levels - 1):
        value = [value] if kind == "list" else {"k": value}
    return value


@pytest.mark.parametrize("kind", ["list", "object"])
def test_64_levels_are_allowed_and_65_are_not(kind: str) -> None:
    assert decode_params(nested(64, kind)) == nested(64, kind)
    refused = refusal_of(module="m", function="f", params=nested(65, kind), request_id="r")
    path = "params" + ("[0]" if kind == "list" else ".k") * 64
    assert f"{path}: nested deeper than 64 levels" in refused.message
    assert "limits.max_object_depth" in refused.message
    assert refused.request_id == "r"


def test_many_values_side_by_side_are_not_deep() -> None:
    params = {str(n): [[n]] for n in range(1000)}
    assert decode_params(params) == params


def test_brackets_in_strings_are_not_levels() -> None:
    assert decode_params("[{" * 500) == "[{" * 500


def depth_of(value: Any) -> int:
    """How many objects and arrays are in each other."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth_of, inside), default=0)
    return 0


BRACKETS = st.text(st.sampled_from('{}[]"\\a\n\u2603'), max_size=8)


@given(
    st.recursive(
        BRACKETS | st.integers() | st.none(),
        lambda inside: st.lists(inside, max_size=4) | st.dictionaries(BRACKETS, inside, max_size=4),
        max_leaves=30,
    ),
    st.integers(1, 6),
    st.booleans(),
)
def test_depth_is_exact_whatever_strings_hold(value: Any, limit: int, ascii_: bool) -> None:
    request = {"module": "m", "function": "f", "params": value, "request_id": 'r"{[\\'}
    data = json.dumps(request, ensure_ascii=ascii_).encode()
    limits = Limits(max_object_depth=limit)
    if depth_of(value) <= limit:
        assert decode_request(data, limits).params == value
    else:
        with pytest.raises(Refusal, match="nested deeper than"):
            decode_request(data, limits)


@pytest.mark.parametrize("depth", [66, 900, 1100, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"k":', b"}")])
def test_any_depth_is_refused_without_a_crash(depth: int, opening: bytes, closing: bytes) -> None:
    for value in (opening * depth + b"1" + closing * depth, opening * depth):
        data = b'{"module": "m", "function": "f", "params": ' + value + b"}"
        assert refusal(data).kind == "InvalidRequest"
    data = b'{"module": "m", "function": "f", "x": ' + opening * depth + closing * depth + b"}"
    assert refusal(data).kind == "InvalidRequest"


@pytest.mark.parametrize(
    ("limits", "params", "fits", "path", "words"),
    [
        ({"max_string_length": 3}, {"a": ["abcd"]}, {"a": ["abc"]}, "params.a[0]", "4 characters"),
        ({"max_string_length": 3}, "\u2603" * 4, "\u2603" * 3, "params", "4 characters"),
        ({"max_array_length": 2}, [[1], [1, 2, 3]], [[1], [1, 2]], "params[1]", "3 items"),
        ({"max_array_length": 2}, {"a": {"b": [1, 2, 3]}}, [1, 2], "params.a.b", "3 items"),
        ({"max_param_count": 2}, {"a": 1, "b": 2, "c": 3}, {"a": 1}, "params", "3 parameters"),
        ({"max_param_count": 2}, [1, 2, 3], [1, [1, 2, 3]], "params", "3 parameters"),
        ({"max_object_depth": 1}, [[]], [1], "params[0]", "nested deeper than 1 level"),
    ],
)
def test_a_value_over_a_limit_is_refused_with_its_path_and_the_limit(
    limits: dict[str, int], params: Any, fits: Any, path: str, words: str
) -> None:
    limited = Limits(**limits)
    (name,) = limits
    refused = refusal_of(limited, module="m", function="f", params=params, request_id="r")
    assert refused.message.startswith(f"Invalid request: {path}: {words}")
    assert f"(limits.{name})" in refused.message
    assert refused.request_id == "r"
    assert decode_params(fits, limited) == fits


def test_checking_a_request_takes_memory_in_proportion_to_its_size() -> None:
    # No path may be built for the many values that are within the limits.
    values: list[Any] = [[]] * 65
    params = {"k" * 30_000: values + [1] * 2_000}
    data = json.dumps({"module": "m", "function": "f", "params": params}).encode()
    tracemalloc.start()
    try:
        decode_request(data, DEFAULTS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(data)
