"""Replies: results of every kind as JSON, failures, and the same in pure ASCII."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import probe
import pytest
from as_json import AS_JSON, INEXACT
from decoding import VALUES
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.workers.protocol import replies
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request


def reply_to(result: Any) -> Any:
    encoded = replies.encode_success(Request("m", "f", request_id="r"), result, 1.5, 3)
    return json.loads(encoded)


@pytest.mark.parametrize(("kind", "json_value"), AS_JSON)
def test_results_of_every_kind(kind: str, json_value: Any) -> None:
    assert reply_to(probe.results(kind))["result"] == json_value


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", ["unprintable", "cycle", "surrogate", "exits", "doubly"])
def test_what_has_no_json_form_is_an_unencodable_result(kind: str, lenient: bool) -> None:
    refusal = refusal_of(probe.results(kind), lenient=lenient)
    assert refusal.kind == "UnencodableResult"
    assert refusal.request_id == "r"
    json.loads(replies.encode_failure(refusal))


# -- what JSON cannot carry exactly --


def refusal_of(result: Any, *, lenient: bool = False) -> Refusal:
    with pytest.raises(Refusal) as caught:
        replies.encode_success(Request("m", "f", request_id="r"), result, 1.5, 3, lenient=lenient)
    assert caught.value.message.startswith("Result of m.f cannot be encoded as JSON: ")
    return caught.value


def fault_of(result: Any) -> str:
    return refusal_of(result).message.removeprefix("Result of m.f cannot be encoded as JSON: ")


@pytest.mark.parametrize(("kind", "fault", "_"), INEXACT)
def test_the_refusal_names_the_path(kind: str, fault: str, _: Any) -> None:
    assert fault_of(probe.results(kind)).startswith(fault)


def test_data_that_contains_itself_is_told_by_its_path() -> None:
    node: dict[str, Any] = {"name": "a"}
    node["children"] = [{}, {"parent": node}]
    assert fault_of(node) == "result.children[1].parent contains itself"
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert fault_of(deep) == "result is nested too deep"


class Endless(Sequence[Any]):
    """Each item is another one, made when it is asked for."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if index:
            raise IndexError
        return Endless()


def test_data_without_an_end_is_refused() -> None:
    assert fault_of({"a": Endless()}) == "result is nested too deep"


def test_a_lone_surrogate_is_told_by_its_path() -> None:
    assert fault_of({"files": ["a", "b\udcff"]}).startswith("result.files[1] has a lone surrogate")
    assert fault_of([{"b\udcff": 1}]).startswith("result[0] has a key with a lone surrogate")


# What a function may return, with what JSON cannot carry in it now and then.
_KEYS = st.text(max_size=2) | st.integers(-3, 30) | st.floats() | st.sampled_from(probe.Number)
_RESULTS = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(_KEYS | st.none(), inner, max_size=4)
        | st.builds(probe.Point, inner, inner)
        | st.builds(lambda each: Counter({"a": each}), inner)
    ),
    max_leaves=12,
)


def loses_nothing(value: Any) -> bool:
    """Said once more, as simply as it can be."""
    if isinstance(value, dict):
        texts = [json.loads(msgspec.json.encode({key: 0}, enc_hook=str)) for key in value]
        keys = [text for each in texts for text in each]
        odd = any(
            key is None or (isinstance(key, float) and not math.isfinite(key)) for key in value
        )
        return len(set(keys)) == len(value) and not odd and all(map(loses_nothing, value.values()))
    if isinstance(value, probe.Point):
        return loses_nothing([value.x, value.y])
    if isinstance(value, list | tuple):
        return all(map(loses_nothing, value))
    return not isinstance(value, float) or math.isfinite(value)


@given(_RESULTS)
def test_a_result_is_refused_if_and_only_if_something_of_it_would_be_lost(result: Any) -> None:
    if not loses_nothing(result):
        fault_of(result)
    else:
        lenient = replies.encode_success(Request("m", "f"), result, 1.5, 3, lenient=True)
        assert reply_to(result)["result"] == json.loads(lenient)["result"]


@given(VALUES)
def test_results_are_what_was_returned(result: Any) -> None:
    assert reply_to(result)["result"] == result


@given(st.integers(-(10**1000), 10**1000))
def test_integers_of_any_size_are_exact(number: int) -> None:
    assert reply_to(number)["result"] == number


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64, -(2**63) - 1, 2**70, 10**400])
def test_integers_are_exact_where_64_bits_and_floats_end(number: int) -> None:
    assert reply_to(number)["result"] == number


def test_a_failure_shows_lone_surrogates_escaped() -> None:
    failure = replies.encode_failure(Refusal("ValueError", "a \udc80 b"), "t \udfff")
    reply = json.loads(failure)
    assert reply["error"] == "a \\udc80 b"
    assert reply["traceback"] == "t \\udfff"


# -- ASCII --


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(min_codepoint=0x10000)))
def test_ascii_replies_mean_the_same(text: str, astral: str) -> None:
    reply = replies.encode_success(Request("m", "f"), {text: text + astral}, 0.0, 0)
    escaped = replies.to_ascii(reply)
    assert escaped.isascii()
    assert json.loads(escaped) == json.loads(reply)
    assert json.loads(escaped)["result"] == {text: text + astral}


def test_ascii_replies_hold_every_character() -> None:
    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    escaped = replies.to_ascii(replies.encode_success(Request("m", "f"), text, 0.0, 0))
    assert escaped.isascii()
    assert json.loads(escaped)["result"] == text


def test_ascii_replies_can_be_decoded_twice() -> None:
    reply = replies.to_ascii(replies.encode_success(Request("m", "f"), "\u00e4\u2603", 0.0, 0))
    assert json.loads(reply.decode("latin-1"))["result"] == "\u00e4\u2603"
