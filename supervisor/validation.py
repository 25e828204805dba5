"""One value of the configuration, checked against its type; an error is in an operator's words.

`msgspec` checks the type. Its message names a path and a JSON type; here it becomes one line with
the source, the key, the value and what is allowed. Imports nothing of the project.
"""

import re
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


class OperatorError(Exception):
    """What an operator can do something about. The message is one line: what failed, what to do."""

    exit_status = 1


class ConfigError(OperatorError):
    """A setting is wrong. The message has its source, key and value, and what is allowed."""


def checked(value: Any, kind: type[T], label: str, *, strict: bool = True) -> T:
    """The value as `kind`. Raises ConfigError.

    `label` names the source, and the key as it was written. A type's `Meta(description=...)` says
    what is allowed there and below, where msgspec's message would not help an operator. Without
    `strict` a text stands for a number or boolean.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        path = path.strip("`").removeprefix("$")
        found, allowed, rule = _at(path, value, kind)
        if unknown := re.match(r"Object contains unknown field `(.*)`", message):
            path += f".{unknown[1]}"
            names = (field.encode_name for field in msgspec.structs.fields(allowed))
            problem = f": unknown key; allowed: {', '.join(names)}"
        else:
            shown = "" if isinstance(found, dict) else f" = {found!r}"
            problem = f"{shown}: {rule or _in_words(message)}"
        where = f"{label}{path}".replace(": .", ": ")
        raise ConfigError(where + problem) from None


def _at(path: str, value: Any, kind: Any) -> tuple[Any, Any, str]:
    """What stands at a msgspec path such as `.module_dirs[0].path`: the value, its type, its rule.

    The rule is the description of the type, or of the nearest type above it.
    """
    kind, rule = _bare(kind)
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if name:
            value = value[name]
            kind = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}[name]
        else:
            value = value[int(index)]
            (kind,) = get_args(kind)  # of list[kind]
        kind, own = _bare(kind)
        rule = own or rule
    return value, kind, rule


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
    message = message.replace("Object missing required field", "lacks the key")
    message = message.replace("a table missing", "lacks")
    return message[0].lower() + message[1:].replace("Expected", "expected")
