"""A module that holds memory of its own in each worker, as BENCH_HOLD_MB says."""

import os

KEPT = bytearray(os.urandom(1 << 20)) * int(os.environ["BENCH_HOLD_MB"])


def held() -> int:
    """Bytes that it holds."""
    return len(KEPT)
