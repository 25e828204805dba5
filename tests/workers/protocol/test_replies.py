"""Replies: results of every kind as JSON, failures, and the same in pure ASCII."""

import json
from typing import Any

import probe
import pytest
from as_json import AS_JSON
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


@pytest.mark.parametrize("kind", ["unprintable", "cycle", "surrogate", "exits", "doubly"])
def test_what_has_no_json_form_is_an_unencodable_result(kind: str) -> None:
    with pytest.raises(Refusal) as caught:
        reply_to(probe.results(kind))
    assert caught.value.kind == "UnencodableResult"
    assert caught.value.message.startswith("Result of m.f cannot be encoded as JSON: ")
    assert caught.value.request_id == "r"
    json.loads(replies.encode_failure(caught.value))


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
