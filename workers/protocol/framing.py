"""The framed form of the protocol: each message follows its length, 4 bytes, big-endian.

The first byte of a connection tells the two forms apart. A request's length is below 9 * 2**24 (see
config.MAX_REQUEST_SIZE), so a frame begins with a byte below 9. One-shot JSON begins with white
space, of which a tab (9) is the lowest, or with something higher.
"""

import struct

FRAME_HEADER = struct.Struct(">I")
# "No further request on this connection was or will be read."
NO_MORE_REQUESTS = FRAME_HEADER.pack(0)
MAX_FRAME = 2**32 - 1  # bytes, without the header
_LOWEST_WHITE_SPACE = 9


def is_framed(data: bytes) -> bool:
    """Whether a client whose first bytes are `data` (not empty) uses the framed form."""
    return data[0] < _LOWEST_WHITE_SPACE


def whole_frame(data: bytes) -> bytes | None:
    """The first message in `data`, without its header; None while it is incomplete."""
    if len(data) < FRAME_HEADER.size:
        return None
    (length,) = FRAME_HEADER.unpack_from(data)
    end = FRAME_HEADER.size + length
    return data[FRAME_HEADER.size : end] if end <= len(data) else None


def to_frame(reply: bytes) -> bytes:
    """The reply with its length before it."""
    return FRAME_HEADER.pack(len(reply)) + reply
