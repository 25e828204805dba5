"""Results as JSON: carried exactly, or refused with the path to what JSON cannot carry.

msgspec encodes anything, and alters some of it: NaN and infinities become null, and two keys of a
dict may become the same text. So its work is checked. The check of plain data takes a fraction of
the encoding: a small result is looked at value by value, a large one by operations that run in C.
Whatever they do not recognize as plain is walked, which is slow, and finds the path to tell.
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
from itertools import chain
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

_SAFE = frozenset(  # each value of these has a form of its own, or cannot be encoded at all
    {str, int, bool, type(None), bytes, Decimal, date, datetime, time, timedelta, UUID}
)
_LISTS = frozenset({list, tuple, set, frozenset})
_TEXT = frozenset({str})
_TEXT_OR_INT = frozenset({str, int})
_SMALL = 1024  # bytes of a reply: more values than that has are looked at faster in C
_REPLYS_OWN_OBJECTS = 2
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
_pack = msgspec.msgpack.Encoder(enc_hook=_plain_form).encode


def lost_in(encoded: bytes, result: object) -> str | None:
    """What a reply that `encode` has made does not have of its `result`; None: nothing is lost."""
    if type(result) in _SAFE:
        return None
    plain = _is_plain(result) if len(encoded) < _SMALL else _is_plain_in_bulk(result, encoded)
    return None if plain else _first_fault(result)


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


def _is_plain(value: Any) -> bool:
    """Whether nothing of it can be lost, for a small value: so the recursion is shallow."""
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str:
                return False
        value = value.values()
    elif kind not in _LISTS:
        return kind in _SAFE or (kind is float and math.isfinite(value))
    for item in value:  # noqa: SIM110 - `all` takes twice as long
        if type(item) not in _SAFE and not _is_plain(item):
            return False
    return True


def _is_plain_in_bulk(result: object, encoded: bytes) -> bool:
    """The same for a large value, and the reply that has it."""
    objects = encoded.count(b"{") - _REPLYS_OWN_OBJECTS
    return _is_finite(result) and _has_distinct_keys(result, objects)


def _is_finite(result: object) -> bool:
    """Whether each of its numbers is. False also where that is not seen here."""
    try:
        packed = _pack(result)
    except Exception:  # MessagePack has no integers above 64 bits
        return False
    return b"\xcb" not in packed or not _NOT_FINITE.search(packed)


def _has_distinct_keys(result: object, objects: int) -> bool:
    """Whether the keys of each dict differ as text. False also where that is not seen here.

    Level by level, until as many dicts have been found as there may be `objects` in the JSON.
    """
    level: list[Any] = [result]
    while objects > 0 and level:
        kinds = set(map(type, level))
        dict_kinds = {kind for kind in kinds if issubclass(kind, dict)}
        list_kinds = {kind for kind in kinds if issubclass(kind, list | tuple | set | frozenset)}
        if not kinds <= _SAFE | {float} | dict_kinds | list_kinds:
            return False
        dicts = [each for each in level if type(each) in dict_kinds] if dict_kinds else []
        if not _TEXT.issuperset(map(type, set().union(*dicts))):
            # Looked at again one by one: in the set above, a key may stand for an equal one.
            if not _TEXT_OR_INT.issuperset(map(type, chain.from_iterable(dicts))):
                return False
            if any(len(set(map(str, each))) < len(each) for each in dicts):
                return False
        objects -= len(dicts)
        if objects > 0:
            lists = (each for each in level if type(each) in list_kinds)
            level = list(chain.from_iterable(chain(map(dict.values, dicts), lists)))
    return True


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
