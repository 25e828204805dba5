"""A module that holds BENCH_HOLD_MB of memory in each worker."""

import os

KEPT = bytearray(os.urandom(1 << 20)) * int(os.environ["BENCH_HOLD_MB"])


def held() -> int:
    """The number of bytes that it holds."""
    return len(KEPT)
