"""A module that computes for 0.3 s at import, as a large package does."""

import time

_until = time.process_time() + 0.3
while time.process_time() < _until:
    pass


def done() -> bool:
    """Whether it has been imported."""
    return True
