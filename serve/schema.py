"""Kinds of values in a request. Each has a check and a JSON schema, so that /openapi.json says what
is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from runtime.engine.json_arrays import array_from_json
from runtime.errors import RequestError
from runtime.errors import arguments as checks
from runtime.errors.keywords import check_options
from runtime.errors.messages import refused, shown

T = TypeVar("T")
Schema = Mapping[str, object]
MOST_TEXT = 200
"""Characters of a string, unless a field says otherwise."""


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Attributes:
        schema: Its JSON schema.
        check: (name, value) → value. Raises RequestError for a value of another kind.
        rule: What a value must be, for messages.
    """

    schema: Schema
    check: Callable[[str, object], object]
    rule: str


@dataclass(frozen=True)
class Field:
    """A named value of a request. None is the same as leaving it out, unless it is required."""

    name: str
    kind: Kind
    doc: str
    default: object = None
    required: bool = False

    def to_schema(self) -> dict[str, object]:
        """Return its JSON schema, with its description."""
        kind = dict(self.kind.schema)
        schema = kind if self.required else {"anyOf": [kind, {"type": "null"}]}
        described = {**schema, "description": self.doc}
        return described if self.default is None else {**described, "default": self.default}


def integer(low: int, high: int) -> Kind:
    """An integer from `low` to `high`."""
    schema = {"type": "integer", "minimum": low, "maximum": high}
    rule = f"an integer, {low} to {high}"
    return Kind(schema, lambda name, value: checks.integer(name, value, low, high), rule)


def number(low: float, high: float) -> Kind:
    """A number from `low` to `high`."""
    schema = {"type": "number", "minimum": low, "maximum": high}
    rule = f"a number from {low:g} to {high:g}"
    return Kind(schema, lambda name, value: checks.number(name, value, low, high), rule)


def flag() -> Kind:
    """A boolean."""
    return Kind({"type": "boolean"}, checks.flag, "true or false")


def text(most: int = MOST_TEXT) -> Kind:
    """A string of at most `most` characters. It is a name, never a path."""
    rule = f"a string of at most {most} characters"

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise refused(name, rule, value)
        return value

    return Kind({"type": "string", "maxLength": most}, check, rule)


def scalar() -> Kind:
    """A boolean, a number or a string, which stays as it is: what uses it checks it."""
    rule = f"true, false, a number or a string of at most {MOST_TEXT} characters"
    kinds = [{"type": "boolean"}, {"type": "number"}, {"type": "string", "maxLength": MOST_TEXT}]

    def check(name: str, value: object) -> object:
        if isinstance(value, str) and len(value) <= MOST_TEXT:
            return value
        # Text that holds JSON may hold NaN, too.
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise refused(name, rule, value)

    return Kind({"anyOf": kinds}, check, rule)


def choice(*names: str) -> Kind:
    """One of some names."""
    schema = {"type": "string", "enum": list(names)}
    check = lambda name, value: checks.choice(name, value, names)  # noqa: E731
    return Kind(schema, check, f"one of {', '.join(names)}")


def array_schema() -> Schema:
    """Return the JSON schema of an array of float32."""
    size = {"type": "integer", "minimum": 1, "maximum": checks.MAX_ELEMENTS}
    return {
        "type": "object",
        "required": ["shape", "float32"],
        "properties": {
            "shape": {"type": "array", "items": size, "maxItems": checks.MAX_DIMENSIONS},
            "float32": {"type": "string", "contentEncoding": "base64"},
        },
    }


def array() -> Kind:
    """An array of float32, as `runtime.Request.to_json` writes it."""
    rule = 'an object {"shape": [...], "float32": base64}'

    def check(name: str, value: object) -> object:
        if not isinstance(value, Mapping) or not {"shape", "float32"} <= value.keys():
            raise refused(name, rule, value)
        checks.size_of("shape", value["shape"])
        try:
            return array_from_json(name, value)
        except RequestError:
            raise refused(name, rule, value) from None

    return Kind(array_schema(), check, rule)


def many(kind: Kind, least: int, most: int) -> Kind:
    """A list of `least` to `most` values of one kind."""
    schema = {"type": "array", "items": dict(kind.schema), "minItems": least, "maxItems": most}
    rule = f"a list of {least} to {most} values, each {kind.rule}"

    def check(name: str, value: object) -> list[object]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise refused(name, rule, value)
        return [kind.check(name, entry) for entry in value]

    return Kind(schema, check, rule)


def optional(kind: Kind) -> Kind:
    """A value of a kind, or null."""
    schema = {"anyOf": [dict(kind.schema), {"type": "null"}]}
    return Kind(
        schema,
        lambda name, value: None if value is None else kind.check(name, value),
        f"{kind.rule}, or null",
    )


def either(*kinds: Kind) -> Kind:
    """A value of any of some kinds."""
    schema = {"anyOf": [dict(kind.schema) for kind in kinds]}
    rule = ", or ".join(kind.rule for kind in kinds)

    def check(name: str, value: object) -> object:
        # The first kind that fits decides, as in anyOf.
        for kind in kinds:
            try:
                return kind.check(name, value)
            except RequestError:
                continue
        raise refused(name, rule, value)

    return Kind(schema, check, rule)


def named(kind: Kind, most: int) -> Kind:
    """An object of at most `most` values of one kind, under any names."""
    schema = {"type": "object", "additionalProperties": dict(kind.schema), "maxProperties": most}
    rule = f"an object of at most {most} values"

    def check(name: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping) or len(value) > most:
            raise refused(name, rule, value)
        return {key: kind.check(f"{name}.{key[:60]}", entry) for key, entry in value.items()}

    return Kind(schema, check, rule)


def check_all(what: str, fields: Sequence[Field], value: object) -> dict[str, object]:
    """Check an object.

    Args:
        what: How a message calls it.
        fields: The names that it may have.
        value: Parsed JSON.

    Returns:
        The values that were given, and the defaults of the others that have one.

    Raises:
        RequestError: It is no object, has an unknown name, or a value of another kind.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} must be a JSON object, got {shown(value)}. Send {{}} for none.")
    check_options(what, value, [entry.name for entry in fields])
    found: dict[str, object] = {}
    for entry in fields:
        given = value.get(entry.name)
        # null is the same as nothing: many clients send all their fields.
        if given is not None:
            found[entry.name] = entry.kind.check(entry.name, given)
        elif entry.required:
            raise RequestError(f"{what} needs `{entry.name}`. Pass {entry.kind.rule}: {entry.doc}")
        elif entry.default is not None:
            found[entry.name] = entry.default
    return found


def object_schema(fields: Sequence[Field]) -> dict[str, object]:
    """Return the JSON schema of an object with these fields and no other."""
    required = [entry.name for entry in fields if entry.required]
    schema: dict[str, object] = {
        "type": "object",
        "properties": {entry.name: entry.to_schema() for entry in fields},
        "additionalProperties": False,
    }
    return {**schema, "required": required} if required else schema


def record(fields: Sequence[Field]) -> Kind:
    """An object with these fields and no other. Its check returns what `check_all` does."""

    def check(name: str, value: object) -> object:
        return check_all(f"`{name}`", fields, value)

    return Kind(object_schema(fields), check, "an object")
