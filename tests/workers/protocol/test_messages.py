"""Bytes to requests and back: what is accepted is unaltered, what is not is told by its name."""

import contextlib
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from as_json import AS_JSON
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.workers.protocol import messages
from cpanbridge.workers.protocol.messages import Refusal, Request

sys.path.insert(0, str(Path(__file__).parents[2] / "modules"))

import probe

DEFAULTS = Limits()
NO_NAMES: list[Any] = [None, 1, [], {}, True]
NO_NUMBERS: list[Any] = ["1", [], {}, True]
NO_TEXTS: list[Any] = [1, [], {}, True]
TEXT = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def decode(limits: Limits = DEFAULTS, /, **fields: Any) -> Request:
    return messages.decode(json.dumps(fields).encode(), limits)


def decode_params(params: Any, limits: Limits = DEFAULTS) -> Any:
    return decode(limits, module="m", function="f", params=params).params


def refusal(data: bytes, limits: Limits = DEFAULTS) -> Refusal:
    """The refusal that decoding ends in; the same in both ways of decoding."""
    with pytest.raises(Refusal) as caught:
        messages.decode(data, limits)
    assert caught.value.kind == "InvalidRequest"
    assert caught.value.message.startswith("Invalid request: ")
    assert "\n" not in caught.value.message
    request = None
    with contextlib.suppress(Refusal):
        request = messages.decode_if_complete(data, limits)
    assert request is None
    return caught.value


def refusal_of(limits: Limits = DEFAULTS, /, **fields: Any) -> Refusal:
    return refusal(json.dumps(fields).encode(), limits)


# -- fields --


def test_the_smallest_request() -> None:
    request = decode(module="m", function="f")
    assert request == Request("m", "f")
    assert request.params is None


def test_every_field() -> None:
    request = decode(
        module="M_1",
        function="f_2",
        params=[1],
        timestamp=1764000000,
        request_id="r" * 100,
        perl_caller="/opt/x.pl:3 \u2603" + "p" * 180,
        client_version="1" * 50,
        timeout=2.5,
    )
    assert request.timestamp == 1764000000
    assert request.request_id == "r" * 100
    assert request.timeout == 2.5


@pytest.mark.parametrize("field", ["module", "function"])
def test_a_missing_field_is_named(field: str) -> None:
    fields = {"module": "m", "function": "f", "request_id": "r1"}
    del fields[field]
    refused = refusal_of(**fields)
    assert f"`{field}`" in refused.message
    assert refused.request_id == "r1"


@pytest.mark.parametrize("field", ["modul", "args", "id", "\u2603", ""])
def test_an_unknown_field_is_named(field: str) -> None:
    refused = refusal_of(module="m", function="f", **{field: 1})
    assert f"unknown field `{field}`" in refused.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("module", name)
            for name in ("", "1a", "_a", "a-b", "a.b", "a b", "a\n", "\u00e4", "a/")
        ),
        *(("function", name) for name in ("", "__import__", "a.b", "a\x00", "f()", "a\n")),
        ("module", "m" * 51),
        ("function", "f" * 101),
    ],
)
def test_a_name_that_cannot_be_one_is_told(field: str, value: str) -> None:
    fields = {"module": "m", "function": "f"} | {field: value}
    with pytest.raises(Refusal, match=rf"^Invalid request: .*`\$\.{field}`$"):
        decode(**fields)
    # The other way of decoding leaves it to be looked up, and not to be found.
    found = messages.decode_if_complete(json.dumps(fields).encode(), DEFAULTS)
    assert found == Request(fields["module"], fields["function"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, wrong) for field in ("module", "function") for wrong in NO_NAMES),
        *((field, wrong) for field in ("timestamp", "timeout") for wrong in NO_NUMBERS),
        ("timeout", 0),
        ("timeout", -1),
        *(
            (field, wrong)
            for field in ("request_id", "perl_caller", "client_version")
            for wrong in NO_TEXTS
        ),
        ("request_id", "r" * 101),
        ("perl_caller", "p" * 201),
        ("client_version", "v" * 51),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    refused = refusal_of(**({"module": "m", "function": "f"} | {field: value}))
    assert f"`$.{field}`" in refused.message


@pytest.mark.parametrize("name_length", [1, 50])
def test_names_may_be_as_long_as_promised(name_length: int) -> None:
    assert decode(module="m" * name_length, function="f" * 2 * name_length).module


@pytest.mark.parametrize(
    "field", ["params", "timestamp", "request_id", "perl_caller", "client_version", "timeout"]
)
def test_what_may_be_absent_may_be_null(field: str) -> None:
    assert decode(module="m", function="f", **{field: None}) == Request("m", "f")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"nonsense", b"[]", b"null", b'"text"', b"17", b"{}", b"[1, 2", b"\xff\xfe"),
        b'{"module": "m", "function": "f"}{}',
        b'{"module": "m", "function": "f"} x',
        b'{"module": "m", "function": "f",}',
        b"{'module': 'm', 'function': 'f'}",
        b'{"module": "m", "function": "f", "params": NaN}',
        b'{"module": "m", "function": "f", "params": Infinity}',
        b'{"module": "m", "function": "f", "params": 1e999}',
        b'{"module": "m", "function": "f", "params": 01}',
        b'{"module": "m", "function": "f", "params": "a\nb"}',
        b'{"module": "m", "function": "f", "params": "\xff"}',
        b'{"module": "m", "function": "f", "params": {"\xc3": 1}}',
        b'{"module": "m", "function": "f", "params": "\\ud800"}',
        b'{"module": "m", "function": "f", "params": "\\udc00x"}',
        b'{"module": "m", "function": "f", "params": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_a_request_is_refused(data: bytes) -> None:
    refusal(data)


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for decoding in (messages.decode, messages.decode_if_complete):
        with contextlib.suppress(Refusal):  # and nothing else is raised
            decoding(b'{"module": "m", "function": "f", "params": ' + data, DEFAULTS)


def test_the_request_id_is_told_when_another_field_is_wrong() -> None:
    assert refusal_of(module="m", function=1, request_id="r7").request_id == "r7"
    assert refusal_of(module="m", function="f", request_id=7).request_id is None


# -- data is never altered --


@given(VALUES)
def test_params_are_what_was_sent(params: Any) -> None:
    assert decode_params(params) == params


@given(st.integers(-(10**1000), 10**1000))
def test_integers_of_any_size_are_exact_both_ways(number: int) -> None:
    assert decode_params([number]) == [number]
    assert reply_to(number)["result"] == number


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64, -(2**63) - 1, 2**70, 10**400])
def test_big_integers_are_exact(number: int) -> None:
    assert decode_params(number) == number
    assert reply_to(number)["result"] == number


def test_integers_stay_integers_and_floats_floats() -> None:
    assert [type(value) for value in decode_params([1, 1.0, True])] == [int, float, bool]


# -- limits --


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
def test_depth_is_told_exactly_whatever_strings_hold(value: Any, limit: int, ascii_: bool) -> None:
    request = {"module": "m", "function": "f", "params": value, "request_id": 'r"{[\\'}
    data = json.dumps(request, ensure_ascii=ascii_).encode()
    limits = Limits(max_object_depth=limit)
    if depth_of(value) <= limit:
        assert messages.decode(data, limits).params == value
    else:
        with pytest.raises(Refusal, match="nested deeper than"):
            messages.decode(data, limits)


@pytest.mark.parametrize("depth", [66, 900, 1100, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"k":', b"}")])
def test_any_depth_is_refused_in_words(depth: int, opening: bytes, closing: bytes) -> None:
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
        ({"max_object_depth": 1}, [[]], [1], "params[0]", "nested deeper than 1 levels"),
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
    # The path of a value must not be spelled out for each of the many that are fine.
    values: list[Any] = [[]] * 65
    params = {"k" * 30_000: values + [1] * 2_000}
    data = json.dumps({"module": "m", "function": "f", "params": params}).encode()
    tracemalloc.start()
    try:
        messages.decode(data, DEFAULTS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(data)


# -- replies --


def reply_to(result: Any) -> Any:
    encoded = messages.encode_success(Request("m", "f", request_id="r"), result, 1.5, 3)
    return json.loads(encoded)


@pytest.mark.parametrize(
    ("kind", "json_value"),
    AS_JSON,
)
def test_results_of_every_kind(kind: str, json_value: Any) -> None:
    assert reply_to(probe.results(kind))["result"] == json_value


@pytest.mark.parametrize("kind", ["unprintable", "cycle", "surrogate", "exits", "doubly"])
def test_what_has_no_json_form_is_an_unencodable_result(kind: str) -> None:
    with pytest.raises(Refusal) as caught:
        reply_to(probe.results(kind))
    assert caught.value.kind == "UnencodableResult"
    assert caught.value.message.startswith("Result of m.f cannot be encoded as JSON: ")
    assert caught.value.request_id == "r"
    json.loads(messages.encode_failure(caught.value.message, caught.value.kind, "r"))


@given(VALUES)
def test_results_are_what_was_returned(result: Any) -> None:
    assert reply_to(result)["result"] == result


def test_a_failure_shows_lone_surrogates_escaped() -> None:
    failure = messages.encode_failure("a \udc80 b", "ValueError", None, traceback="t \udfff")
    reply = json.loads(failure)
    assert reply["error"] == "a \\udc80 b"
    assert reply["traceback"] == "t \\udfff"


# -- ASCII --


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(min_codepoint=0x10000)))
def test_ascii_replies_mean_the_same(text: str, astral: str) -> None:
    reply = messages.encode_success(Request("m", "f"), {text: text + astral}, 0.0, 0)
    escaped = messages.to_ascii(reply)
    assert escaped.isascii()
    assert json.loads(escaped) == json.loads(reply)
    assert json.loads(escaped)["result"] == {text: text + astral}


def test_ascii_replies_hold_every_character() -> None:
    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    escaped = messages.to_ascii(messages.encode_success(Request("m", "f"), text, 0.0, 0))
    assert escaped.isascii()
    assert json.loads(escaped)["result"] == text


def test_ascii_replies_can_be_decoded_twice() -> None:
    reply = messages.to_ascii(messages.encode_success(Request("m", "f"), "\u00e4\u2603", 0.0, 0))
    assert json.loads(reply.decode("latin-1"))["result"] == "\u00e4\u2603"


def test_a_frame_has_its_length_in_four_bytes_before_it() -> None:
    assert messages.to_frame(b"{}") == b"\x00\x00\x00\x02{}"
    assert messages.NO_MORE_REQUESTS == b"\x00\x00\x00\x00"
