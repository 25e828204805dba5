"""Requests: valid ones are decoded unaltered, the refusal of others names what is wrong."""

import contextlib
import json
from typing import Any

import pytest
from decoding import DEFAULTS, VALUES, decode, decode_params, refusal, refusal_of
from hypothesis import given
from hypothesis import strategies as st

from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request, decode_if_complete, decode_request

NO_NAMES: list[Any] = [None, 1, [], {}, True]
NO_NUMBERS: list[Any] = ["1", [], {}, True]
NO_TEXTS: list[Any] = [1, [], {}, True]


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
def test_the_refusal_names_a_missing_field(field: str) -> None:
    fields = {"module": "m", "function": "f", "request_id": "r1"}
    del fields[field]
    refused = refusal_of(**fields)
    assert f"`{field}`" in refused.message
    assert refused.request_id == "r1"


@pytest.mark.parametrize("field", ["modul", "args", "id", "\u2603", ""])
def test_the_refusal_names_an_unknown_field(field: str) -> None:
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
def test_an_invalid_name_is_refused_and_its_field_named(field: str, value: str) -> None:
    fields = {"module": "m", "function": "f"} | {field: value}
    with pytest.raises(Refusal, match=rf"^Invalid request: .*`\$\.{field}`$"):
        decode(**fields)
    # The other function leaves it to the look-up, which does not find it.
    found = decode_if_complete(json.dumps(fields).encode(), DEFAULTS)
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
def test_the_refusal_names_a_wrong_field(field: str, value: Any) -> None:
    refused = refusal_of(**({"module": "m", "function": "f"} | {field: value}))
    assert f"`$.{field}`" in refused.message


@pytest.mark.parametrize("name_length", [1, 50])
def test_names_may_be_as_long_as_documented(name_length: int) -> None:
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
    for function in (decode_request, decode_if_complete):
        with contextlib.suppress(Refusal):  # and nothing else is raised
            function(b'{"module": "m", "function": "f", "params": ' + data, DEFAULTS)


def test_a_refusal_has_the_request_id_when_another_field_is_wrong() -> None:
    assert refusal_of(module="m", function=1, request_id="r7").request_id == "r7"
    assert refusal_of(module="m", function="f", request_id=7).request_id is None


# -- values are not altered --


@given(VALUES)
def test_params_are_what_was_sent(params: Any) -> None:
    assert decode_params(params) == params


@given(st.integers(-(10**1000), 10**1000))
def test_integers_of_any_size_are_exact(number: int) -> None:
    assert decode_params([number]) == [number]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64, -(2**63) - 1, 2**70, 10**400])
def test_integers_are_exact_where_64_bits_and_floats_end(number: int) -> None:
    assert decode_params(number) == number


def test_integers_stay_integers_and_floats_floats() -> None:
    assert [type(value) for value in decode_params([1, 1.0, True])] == [int, float, bool]
