"""The configured limits on a request's `params`: depth, lengths, count.

Only the depth is limited by default. It is then checked on the request's text by scans that run in
C: a walk over the values of a large request takes ten times as long as decoding it.
"""

import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeAlias

from cpanbridge.supervisor.config import Limits
from cpanbridge.supervisor.wording import count_of
from cpanbridge.workers.protocol.refusal import Refusal

# The path to a value: that of the value that holds it, and its key there; None: it is `params`.
_Path: TypeAlias = "tuple[_Path, str | int] | None"

_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'{}[]"')


def check_params(params: Any, request_id: str | None, data: bytes, limits: Limits) -> None:
    """Check the `params` of the valid request in `data`.

    Raises Refusal (InvalidRequest) with the path of a value that is over a limit, and the limit.
    """
    only_depth = not (limits.max_string_length or limits.max_array_length or limits.max_param_count)
    if only_depth and _is_shallow(data, limits.max_object_depth):
        return
    if isinstance(params, dict | list | str):
        _walk(params, request_id, limits)


def _is_shallow(text: bytes, depth: int) -> bool:
    """Whether `params` in a valid request are nested no deeper than `depth` levels.

    Of the text only the brackets are kept, all of one kind. Removing the innermost pairs takes one
    level off everything.
    """
    if text.count(b"{") + text.count(b"[") <= depth:
        return True
    if b"\\" in text:  # from the left, as backslashes pair up
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = text.translate(_TO_BRACES, _NOT_STRUCTURE).replace(b'""', b"")
    if b'"' in structure:  # some string has brackets in it: leave out what stands in quotes
        outside = b"".join(text.split(b'"')[::2])
        structure = outside.translate(_TO_BRACES, _NOT_STRUCTURE)
    for _ in range(1 + depth):  # the request itself is one level
        structure = structure.replace(b"{}", b"")
        if not structure:
            return True
    return False


def _walk(params: Any, request_id: str | None, limits: Limits) -> None:
    """Check every value, without recursion. Raises Refusal."""

    def refuse(path: _Path, what: str, limit: str) -> NoReturn:
        message = f"Invalid request: {_shown(path)}: {what} (limits.{limit})"
        raise Refusal("InvalidRequest", message, request_id)

    def refuse_count(path: _Path, count: int, what: str, limit: str) -> NoReturn:
        most = getattr(limits, limit)
        verb = "is" if most == 1 else "are"
        refuse(path, f"{count} {what}, at most {most} {verb} allowed", limit)

    most_characters = limits.max_string_length or sys.maxsize
    most_items = limits.max_array_length or sys.maxsize
    if not isinstance(params, str) and len(params) > (limits.max_param_count or sys.maxsize):
        refuse_count(None, len(params), "parameters", "max_param_count")
    pending: list[tuple[_Path, Any, int]] = [(None, params, 1)]
    while pending:
        path, value, depth = pending.pop()
        if isinstance(value, str):
            if len(value) > most_characters:
                refuse_count(path, len(value), "characters", "max_string_length")
            continue
        if depth > limits.max_object_depth:
            levels = count_of(limits.max_object_depth, "level")
            refuse(path, f"nested deeper than {levels}", "max_object_depth")
        items: Iterable[tuple[str | int, Any]]
        if isinstance(value, dict):
            items = value.items()
        else:
            if len(value) > most_items:
                refuse_count(path, len(value), "items", "max_array_length")
            items = enumerate(value)
        pending.extend(
            ((path, key), item, depth + 1)
            for key, item in items
            if isinstance(item, dict | list | str)
        )


def _shown(path: _Path) -> str:
    """A path as `params.key[3]`. Built only for a message: most values need none."""
    steps = []
    while path is not None:
        path, key = path
        steps.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "params" + "".join(reversed(steps))
