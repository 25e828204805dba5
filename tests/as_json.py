"""The JSON form of each kind of `probe.results`."""

from typing import Any

AS_JSON: list[tuple[str, Any]] = [
    ("none", None),
    ("true", True),
    ("int", 7),
    ("big_int", 2**70),
    ("float", 0.1),
    ("str", "snowman \u2603 and \U0001f600"),
    ("bytes", "AP8="),
    ("date", "2026-11-24"),
    ("datetime", "2026-11-24T12:30:15"),
    ("datetime_utc", "2026-11-24T12:30:00Z"),
    ("time", "12:30:00"),
    ("decimal", "1.10"),
    ("uuid", "00000000-0000-0000-0000-000000000001"),
    ("set", [3]),
    ("frozenset", [4]),
    ("tuple", [1, [2]]),
    ("dataclass", {"x": 1, "y": 2}),
    ("enum", "red"),
    ("path", "/etc/hosts"),
    ("subclasses", ["text", 3, 1.5, "AP8=", "2026-11-24T00:00:00"]),
    ("mapping", {"a": 1}),
    ("sequences", [[0, 1], [2], ["a"], [1.5]]),
    ("nested", {"list": [{"tuple": [1, None]}]}),
    ("int_keys", {"1": "one"}),
    ("keys", {"1": 0, "1.5": 0, "red": 0, "2026-11-24": 0, "1.10": 0, "/a": 0}),
]

# What JSON cannot carry exactly: the path that the refusal names, and what is there; and what
# `results = "lenient"` makes of it (...: nothing that a test could compare).
INEXACT: list[tuple[str, str, Any]] = [
    ("nan", "result is nan", None),
    ("infinity", "result is -inf", None),
    ("deep_nan", "result.rows[3].price is nan", {"rows": [0, 1, 2, {"price": None}]}),
    ("nan_in_dataclass", "result.x is nan", {"x": None, "y": 1}),
    ("opaque", "result is of type probe.Opaque", "an opaque object"),
    ("generator", "result.all is of type generator", ...),
    ("fraction", "result is of type fractions.Fraction", "1/3"),
    ("same_keys", "result has the keys 1 and '1', which are the same in JSON", ...),
    ("same_enum_keys", "result['a b'] has the keys <Number.ONE: 1> and 1", ...),
    ("none_key", "result has a key None", {"None": 1}),
    ("bool_key", "result has a key True", {"True": 1}),
    ("nan_key", "result has a key nan", {"nan": 1}),
    ("tuple_key", "result[0] has a key of type tuple", [{"(1, 2)": 1}]),
]
