"""Decoding requests in tests, and hypothesis strategies for JSON values."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import strategies as st

from cpanbridge.supervisor.config import Limits
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request, decode_if_complete, decode_request

DEFAULTS = Limits()
TEXT = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def decode(limits: Limits = DEFAULTS, /, **fields: Any) -> Request:
    """The request with these fields, encoded and decoded."""
    return decode_request(json.dumps(fields).encode(), limits)


def decode_params(params: Any, limits: Limits = DEFAULTS) -> Any:
    """`params`, encoded and decoded in a request."""
    return decode(limits, module="m", function="f", params=params).params


def refusal(data: bytes, limits: Limits = DEFAULTS) -> Refusal:
    """The refusal that `decode_request` raises; `decode_if_complete` must return no request."""
    with pytest.raises(Refusal) as caught:
        decode_request(data, limits)
    assert caught.value.kind == "InvalidRequest"
    assert caught.value.message.startswith("Invalid request: ")
    assert "\n" not in caught.value.message
    request = None
    with contextlib.suppress(Refusal):
        request = decode_if_complete(data, limits)
    assert request is None
    return caught.value


def refusal_of(limits: Limits = DEFAULTS, /, **fields: Any) -> Refusal:
    """The refusal of the request with these fields."""
    return refusal(json.dumps(fields).encode(), limits)
