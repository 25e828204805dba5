r"""Finding the end of a one-shot request: one JSON object, in however many pieces it arrives.

Parsing again after each piece would take time quadratic in the size, and a loop over the bytes in
Python would be slow. `ObjectScanner` reads each byte once, and only with operations that run in C:
drop the escapes, keep only quotes and braces, and follow the braces outside of strings.

It finds where the object ends, not whether it is valid: `{]}` is complete, and the parser says what
is wrong with it. UTF-8 needs no decoding here: its bytes beyond ASCII are all above 0x7F.
"""

from itertools import accumulate

_WHITE_SPACE = b" \t\r\n"
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'{}"')
_STEPS = bytes.maketrans(b"{}", b"\x01\xff")  # +1 and -1 as signed bytes
_LEVELS = 8  # of nesting that are removed at once, before the braces are followed one by one


class ObjectScanner:
    """Follows one JSON object through the pieces that `feed` is given."""

    def __init__(self) -> None:
        self._begun = False
        self._depth = 1  # of the object itself; 0 after its end
        self._in_string = False
        self._escape_open = False  # the last byte escapes the next one

    def feed(self, piece: bytes) -> bool:
        """Whether the object, or what stands in its place, ends in this piece (not empty)."""
        if not self._begun:
            piece = piece.lstrip(_WHITE_SPACE)
            if not piece:
                return False
            self._begun = True
            if not piece.startswith(b"{"):
                return True
            piece = piece[1:]
        if self._escape_open:
            piece = piece[1:]
        # Backslashes in a row pair up from the left, as `replace` does.
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in piece else piece
        self._escape_open = plain.endswith(b"\\")
        # Two quotes without a brace between them are a string, or the end of one and the start of
        # the next. Without them, what follows is inside or outside of a string as before.
        parts = plain.translate(None, _NOT_STRUCTURE).replace(b'""', b"").split(b'"')
        structure = b"".join(parts[1 if self._in_string else 0 :: 2])
        self._in_string ^= len(parts) % 2 == 0
        for _ in range(_LEVELS):
            structure = structure.replace(b"{}", b"")  # the depth after it is the same
        steps = memoryview(structure.translate(_STEPS)).cast("b")
        depths = list(accumulate(steps, initial=self._depth))
        self._depth = depths[-1]
        return min(depths) <= 0
