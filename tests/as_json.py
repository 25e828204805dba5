"""The JSON form of each kind of `probe.results`."""

from typing import Any

AS_JSON: list[tuple[str, Any]] = [
    ("none", None),
    ("true", True),
    ("int", 7),
    ("big_int", 2**70),
    ("float", 0.1),
    ("nan", None),
    ("infinity", None),
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
    ("opaque", "an opaque object"),
    ("nested", {"list": [{"tuple": [1, None]}]}),
    ("int_keys", {"1": "one"}),
]
