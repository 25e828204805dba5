"""Results as JSON: carried exactly, or refused with the path to what JSON cannot carry.

msgspec encodes anything as JSON, and alters some of it: NaN and infinities become null, and two
keys of a dict may become the same text. So its work is checked, by encoding the result once more
in a form that shows both: MessagePack has a NaN of its own, and an encoder that sorts keys takes
text alone. That takes about as long as the JSON. A result which is not plain by that is walked,
which is slow, and finds the path to tell.
"""

import dataclasses
import math
import re
import sys
from collections.abc import (
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from numbers import Integral, Rational, Real
from pathlib import PurePath
from typing import Any, TypeAlias
from uuid import UUID

import msgspec

_ALLOWED = (
    "None, booleans, numbers, text, bytes, lists, tuples, sets, dicts, dataclasses, enums, dates "
    "and times, Decimal, UUID and paths"
)
_ALLOWED_KEYS = "text, bytes, finite numbers, enums, dates and times, Decimal, UUID and paths"
_TOO_DEEP = "result is nested too deep"
_IN_EXACT = '(results = "exact")'

_SAFE = frozenset(  # each of their values has a form of its own, except for text that is none
    {str, int, bool, type(None), bytes, Decimal, date, datetime, time, timedelta, UUID}
)
_DEEPEST = 10_000  # deeper than msgspec encodes
# A double in MessagePack whose exponent says that it is infinite or no number. The same bytes may
# be part of other data; then the walk finds nothing.
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")

_Step: TypeAlias = "tuple[str, Any]"  # such as ".price", and the value there


class Inexact(Exception):
    """A value has no exact form in JSON; the message says why."""


def _plain_form(value: Any) -> Any:
    """What stands for a value that msgspec does not encode by itself. Raises Inexact."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational) and _equals(float(value), value):
        return float(value)
    if isinstance(value, date | time) and value == value:  # pandas has a date that is none
        return value.isoformat()
    if isinstance(value, Decimal | PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set | KeysView | ItemsView | ValuesView):
        return list(value)
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufUO":
        plain = value.tolist()
        if type(plain) is not type(value):  # as a number of more than 64 bits
            return plain
    raise Inexact(f"is of type {_name_of(type(value))}; allowed are {_ALLOWED} {_IN_EXACT}")


def _equals(number: float, value: Any) -> bool:
    return bool(number == value) or math.isnan(number)


def _name_of(kind: type) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


encode = msgspec.json.Encoder(enc_hook=_plain_form).encode
encode_leniently = msgspec.json.Encoder(enc_hook=str).encode
# Raises TypeError for a key that is no text, and for integers of more than 64 bits.
_pack = msgspec.msgpack.Encoder(enc_hook=_plain_form, order="deterministic").encode


def lost_in(result: object, *, has_null: bool) -> str | None:
    """What the JSON that `encode` has made of a result does not have; None: nothing is lost.

    `has_null` tells whether that JSON may have a null, which a number could have become.
    """
    if type(result) in _SAFE:
        return None
    try:
        packed = _pack(result)
    except Exception:
        return _first_fault(result)
    return _first_fault(result) if has_null and _NOT_FINITE.search(packed) else None


def explain(result: object, error: BaseException) -> str:
    """Why `encode` has raised `error` for a result."""
    fault = None if isinstance(error, MemoryError) else _first_fault(result)
    if fault is None and isinstance(error, RecursionError):
        fault = _TOO_DEEP
    return fault or f"{type(error).__name__}: {message_of(error)}"


def message_of(error: BaseException) -> str:
    """An exception's message; a placeholder when its `__str__` raises."""
    try:
        return str(error)
    except BaseException:
        return "(its message cannot be shown)"


def _first_fault(result: object) -> str | None:
    """The first value that JSON cannot carry exactly, with its path; None: there is none.

    Walks all values, without recursion.
    """
    path: list[str] = []
    open_ids: dict[int, None] = {}  # of the values that hold the one that is looked at
    pending: list[Iterator[_Step]] = [iter([("result", result)])]
    try:
        while pending:
            step, value = next(pending[-1], (None, None))
            if step is None:
                pending.pop()
                if pending:
                    path.pop()
                    open_ids.popitem()
                continue
            if type(value) in _SAFE and (type(value) is not str or value.isascii()):
                continue
            path.append(step)
            if len(path) > _DEEPEST:
                return _TOO_DEEP
            if id(value) in open_ids:
                raise Inexact("contains itself")
            open_ids[id(value)] = None
            pending.append(iter(_steps_of(value)))
    except Inexact as fault:
        return f"{''.join(path)} {fault}"
    except BaseException as error:  # the module's own classes may raise anything
        return f"{''.join(path)} cannot be read: {type(error).__name__}: {message_of(error)}"
    return None


def _steps_of(value: Any) -> Iterable[_Step]:
    """The values that it holds. Raises Inexact if it or a key of it has no exact form."""
    kind = type(value)
    if isinstance(value, dict):
        return _items_of(value)
    if isinstance(value, list | tuple | set | frozenset):
        return ((f"[{index}]", item) for index, item in enumerate(value))
    if kind is str:
        _check_text(value, "has")
    elif kind is float:
        if not math.isfinite(value):
            raise Inexact(f"is {value}; allowed are finite numbers {_IN_EXACT}")
    elif kind in _SAFE or kind in (bytearray, memoryview) or isinstance(value, UUID):
        pass
    elif isinstance(value, Enum):
        return [("", value.value)]
    elif isinstance(value, msgspec.Struct):
        return _attributes_of(value, value.__struct_fields__)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _attributes_of(value, (field.name for field in dataclasses.fields(value)))
    elif hasattr(kind, "__attrs_attrs__"):
        return _attributes_of(value, (field.name for field in kind.__attrs_attrs__))
    elif not isinstance(value, msgspec.Raw):
        return [("", _plain_form(value))]
    return ()


def _attributes_of(value: Any, names: Iterable[str]) -> Iterator[_Step]:
    """Those that are set: msgspec leaves out the others."""
    for name in names:
        attribute = getattr(value, name, msgspec.UNSET)
        if attribute is not msgspec.UNSET:
            yield f".{name}", attribute


def _items_of(value: dict[Any, Any]) -> Iterator[_Step]:
    seen: dict[str, Any] = {}
    for key in dict.keys(value):  # as msgspec reads it, whatever a subclass overrides
        text = _text_of_key(key)
        if text in seen:
            keys = f"{seen[text]!r:.100} and {key!r:.100}"
            raise Inexact(f"has the keys {keys}, which are the same in JSON")
        seen[text] = key
    for key, item in dict.items(value):
        named = isinstance(key, str) and key.isidentifier()
        yield f".{key:.100}" if named else f"[{key!r:.100}]", item


def _text_of_key(key: Any) -> str:
    """What msgspec makes of a dict's key. Raises Inexact."""
    if type(key) is str:
        _check_text(key, "has a key with")
        return key
    if not (isinstance(key, float) and not math.isfinite(key)):
        try:
            if type(key) is int:
                return str(key)
            (text,) = msgspec.json.decode(encode({key: None}), type=dict[str, None])
        except Exception:
            pass
        else:
            return text
    shown = repr(key) if isinstance(key, float | bool | None) else f"of type {_name_of(type(key))}"
    raise Inexact(f"has a key {shown}; allowed are {_ALLOWED_KEYS} {_IN_EXACT}")


def _check_text(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"a lone surrogate at {error.start}, which is not a character"
        raise Inexact(f"{where} {problem}") from None
