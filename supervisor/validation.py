"""One value of the configuration, checked against its type; an error is in an operator's words.

`msgspec` checks the type. Its message names a path and a JSON type; here it becomes one line with
the source, the key, the value and what is allowed. Imports nothing of the project.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

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


class ConfigError(Exception):
    """A setting is wrong. The message is one line: source, key, value, and what is allowed."""


def checked(
    value: Any,
    kind: type[T],
    label: str,
    key: str,
    rules: Mapping[str, str],
    *,
    strict: bool = True,
) -> T:
    """The value as `kind`. Raises ConfigError.

    `label` names the source, and the key as it was written. `key` is the option; `rules` says for
    the last part of an option's name what is allowed, where msgspec's message would not help, and
    for its items under the name with "[]". Without `strict` a text stands for a number or boolean.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        path = path.strip("`").removeprefix("$")
        where = f"{label}{path}".replace(": .", ": ")
        if unknown := re.match(r"Object contains unknown field `(.*)`", message):
            where = f"{label}{path}.{unknown[1]}".replace(": .", ": ")
            allowed = ", ".join(_fields_at(kind, path))
            raise ConfigError(f"{where}: unknown key; allowed: {allowed}") from None
        found = _value_at(value, path)
        shown = "" if isinstance(found, dict) else f" = {found!r}"
        rule = _rule_for(key + path, rules) or _in_words(message)
        raise ConfigError(f"{where}{shown}: {rule}") from None


def _steps(path: str) -> list[tuple[str, str]]:
    """A msgspec path such as `.module_dirs[0].path`, in pairs of name and index; one is empty."""
    return re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)


def _fields_at(kind: Any, path: str) -> list[str]:
    """The names that the struct at `path` below `kind` knows."""
    for name, _ in _steps(path):
        if name:
            kind = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}[name]
        else:
            (kind,) = get_args(kind)  # of list[kind]
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _value_at(value: Any, path: str) -> Any:
    for name, index in _steps(path):
        value = value[int(index)] if index and not isinstance(value, dict) else value[name or index]
    return value


def _rule_for(path: str, rules: Mapping[str, str]) -> str | None:
    last = re.search(r"(\w+)(\[\d+\])?$", path)
    if last is None:
        return None
    if last[2] and f"{last[1]}[]" in rules:
        return rules[f"{last[1]}[]"]
    return rules.get(last[1])


def _in_words(message: str) -> str:
    message = message.replace("`", "").replace(" | null", "")
    names = "|".join(_TYPE_NAMES)
    message = re.sub(rf"\b({names})\b", lambda match: _TYPE_NAMES[match[0]], message)
    message = message.replace("Object missing required field", "lacks the key")
    message = message.replace("a table missing", "lacks")
    return message[0].lower() + message[1:].replace("Expected", "expected")
