"""One value of the configuration, checked against its type; an error is in an operator's words.

`msgspec` checks the type. Its message names a path and a JSON type; here it becomes one line with
the source, the key, the value and what is allowed. msgspec stops at the first mistake, so each part
of a table is checked by itself. Imports nothing of the project.
"""

import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

T = TypeVar("T")

# TOML's names of the types instead of JSON's.
_TYPE_NAMES = {
    "array": "a list",
    "object": "a table",
    "str": "a string",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class OperatorError(Exception):
    """What an operator can do something about.

    Each argument is one problem in one line: what failed, what to do. As a text they are one line.
    """

    exit_status = 1

    @property
    def problems(self) -> tuple[str, ...]:
        """Each of them as a line of its own."""
        return self.args

    def __str__(self) -> str:
        return "; ".join(self.problems)


class ConfigError(OperatorError):
    """Settings are wrong. Each problem has its source, key and value, and what is allowed."""


def checked(value: Any, kind: type[T], label: str, *, strict: bool = True) -> T:
    """The value as `kind`. Raises ConfigError with all mistakes in it.

    `label` names the source, and the key as it was written. A type's `Meta(description=...)` says
    what is allowed there and below, where msgspec's message would not help an operator. Without
    `strict` a text stands for a number or boolean.
    """
    if not strict and isinstance(value, str) and _bare(kind)[0] is bool:
        value = _truth(value)
    if mistakes := list(_mistakes(value, kind, label, "", strict)):
        raise ConfigError(*mistakes)
    return msgspec.convert(value, kind, strict=strict)


def _truth(text: str) -> bool | str:
    """A boolean as the environment has it: a word, or a number, of which only 0 is false."""
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    return word.strip("0") != "" if re.fullmatch(r"[0-9]+", word) else text


def _mistakes(value: Any, kind: Any, label: str, rule: str, strict: bool) -> Iterator[str]:
    """All mistakes in a value, deepest first. `rule` is the nearest description above it."""
    whole = kind
    kind, own = _bare(kind)
    rule = own or rule
    found = False
    for mistake in _mistakes_inside(value, kind, label, rule, strict):
        found = True
        yield mistake
    if found:
        return
    try:
        msgspec.convert(value, whole, strict=strict)
    except msgspec.ValidationError as error:
        shown = "" if isinstance(value, dict) else f" = {value!r}"
        yield f"{label}{shown}: {rule or _in_words(str(error))}"


def _mistakes_inside(value: Any, kind: Any, label: str, rule: str, strict: bool) -> Iterator[str]:
    """Those in the parts of a table or list. A label of a whole source ends with `: `."""
    dot = "" if label.endswith(": ") else "."
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        for name, each in value.items():
            if name in fields:
                yield from _mistakes(each, fields[name].type, f"{label}{dot}{name}", rule, strict)
            else:
                yield f"{label}{dot}{name}: unknown key; allowed: {', '.join(fields)}"
        for name, field in fields.items():
            if field.required and name not in value:
                yield f"{label}: lacks the key {name}"
    elif isinstance(value, dict) and get_origin(kind) is dict:
        of_names, of_values = get_args(kind)
        for name, each in value.items():
            for _ in _mistakes(name, of_names, "", "", strict):
                yield f"{label}: the name {name!r} {_bare(of_names)[1]}"
            yield from _mistakes(each, of_values, f"{label}{dot}{name}", rule, strict)
    elif isinstance(value, list) and get_origin(kind) is list:
        for index, each in enumerate(value):
            yield from _mistakes(each, get_args(kind)[0], f"{label}[{index}]", rule, strict)


def _bare(kind: Any) -> tuple[Any, str]:
    """A type without its alternatives and constraints, and its description."""
    rule = ""
    while get_origin(kind) in (Annotated, Union, UnionType):
        if get_origin(kind) is Annotated:
            rule = rule or kind.__metadata__[0].description or ""
        kind = get_args(kind)[0]
    return kind, rule


def _in_words(message: str) -> str:
    message = message.replace("`", "").replace(" | null", "")
    names = "|".join(_TYPE_NAMES)
    message = re.sub(rf"\b({names})\b", lambda match: _TYPE_NAMES[match[0]], message)
    return message[0].lower() + message[1:].replace("Expected", "expected")
