"""JSON Schema (2020-12): whether a value is as a schema asks, for rewards on structured answers.

The keywords that describe data are known, `$ref` within the schema included; an unknown one is an error when the schema
is read, never passed over in silence.  Patterns run in bounded time, and so does the whole: a schema that refers to itself
stops at `MAX_DEPTH`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import regex

from pellucid.errors import BadInput, nearest

MAX_DEPTH = 64
PATTERN_SECONDS = 0.1
NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "format",
         "deprecated", "readOnly", "writeOnly", "$anchor", "contentEncoding", "contentMediaType"}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict), "array": lambda v: isinstance(v, list), "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool), "null": lambda v: v is None,
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer()))}


class JsonSchema:
    """A schema that was read and checked.  Errors: BadInput that names the keyword that is unknown or malformed."""

    def __init__(self, schema: Any):
        self.root = schema
        self._patterns: dict[str, Any] = {}
        self._check(schema, "#")

    def is_valid(self, value: Any) -> bool:
        """Whether `value` (as `json.loads` gives it) fits."""
        return self._fits(value, self.root, 0)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _check(self, schema: Any, place: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise BadInput(f"the JSON schema holds {schema!r} at {place}", "a schema is an object, true or false", "mend it")
        for name, given in schema.items():
            if name in NOTES:
                continue
            if name not in KEYWORDS:
                raise BadInput(f"the JSON schema has the keyword {name!r} at {place}{nearest(name, sorted(KEYWORDS))}",
                               f"known are {', '.join(sorted(KEYWORDS))}", "leave it out, or write it otherwise")
            if not KEYWORDS[name](given):
                raise BadInput(f"the JSON schema's {name!r} at {place} cannot be {str(given)[:60]!r}", next="mend it")
        for name in ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas"):
            for key, inner in (schema.get(name) or {}).items():
                self._check(inner, f"{place}/{name}/{key}")
        for name in ("allOf", "anyOf", "oneOf", "prefixItems"):
            for number, inner in enumerate(schema.get(name, [])):
                self._check(inner, f"{place}/{name}/{number}")
        for name in ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"):
            if name in schema:
                self._check(schema[name], f"{place}/{name}")
        if "$ref" in schema:
            self._resolve(schema["$ref"])
        for pattern in [*schema.get("patternProperties", {}), *([schema["pattern"]] if "pattern" in schema else [])]:
            try:
                self._patterns[pattern] = regex.compile(pattern)
            except regex.error as error:
                raise BadInput(f"the JSON schema's pattern {pattern!r} at {place} is none", str(error), "mend it") from error

    def _resolve(self, ref: str) -> Any:
        found = self.root
        for part in ref.removeprefix("#").split("/")[1:] if ref.startswith("#") else ["?"]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                raise BadInput(f"the JSON schema refers to {ref!r}, which is not in it", next="give the definition under $defs")
        return found

    # --- judging ------------------------------------------------------------------------------------------------------

    def _fits(self, value: Any, schema: Any, depth: int) -> bool:
        if isinstance(schema, bool):
            return schema
        if depth > MAX_DEPTH:
            return False
        inner = lambda v, s: self._fits(v, s, depth + 1)
        if "$ref" in schema and not inner(value, self._resolve(schema["$ref"])):
            return False
        return (self._type_fits(value, schema) and self._parts_fit(value, schema, inner)
                and (not TYPES["number"](value) or _number_fits(value, schema))
                and (not isinstance(value, str) or self._text_fits(value, schema))
                and (not isinstance(value, list) or _array_fits(value, schema, inner))
                and (not isinstance(value, dict) or self._object_fits(value, schema, inner)))

    def _type_fits(self, value: Any, schema: dict[str, Any]) -> bool:
        types = schema.get("type", [])
        if types and not any(TYPES[t](value) for t in ([types] if isinstance(types, str) else types)):
            return False
        if "const" in schema and not equal(value, schema["const"]):
            return False
        return "enum" not in schema or any(equal(value, choice) for choice in schema["enum"])

    def _parts_fit(self, value: Any, schema: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
        if not all(inner(value, s) for s in schema.get("allOf", [])):
            return False
        if "anyOf" in schema and not any(inner(value, s) for s in schema["anyOf"]):
            return False
        if "oneOf" in schema and sum(inner(value, s) for s in schema["oneOf"]) != 1:
            return False
        if "not" in schema and inner(value, schema["not"]):
            return False
        if "if" in schema:
            branch = "then" if inner(value, schema["if"]) else "else"
            return branch not in schema or inner(value, schema[branch])
        return True

    def _text_fits(self, value: str, schema: dict[str, Any]) -> bool:
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            return False
        return "pattern" not in schema or self._found(schema["pattern"], value)

    def _found(self, pattern: str, text: str) -> bool:
        try:
            return self._patterns[pattern].search(text, timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            return False

    def _object_fits(self, value: dict[str, Any], schema: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
            return False
        if any(name not in value for name in schema.get("required", [])):
            return False
        for name, others in schema.get("dependentRequired", {}).items():
            if name in value and any(other not in value for other in others):
                return False
        if not all(inner(value, s) for name, s in schema.get("dependentSchemas", {}).items() if name in value):
            return False
        return all(self._member_fits(name, member, schema, inner) for name, member in value.items())

    def _member_fits(self, name: str, member: Any, schema: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
        if "propertyNames" in schema and not inner(name, schema["propertyNames"]):
            return False
        rules = [s for pattern, s in schema.get("patternProperties", {}).items() if self._found(pattern, name)]
        if name in schema.get("properties", {}):
            rules.append(schema["properties"][name])
        return all(inner(member, s) for s in rules or [schema.get("additionalProperties", True)])


def _number_fits(value: float, schema: dict[str, Any]) -> bool:
    if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        return False
    if not schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf):
        return False
    step = schema.get("multipleOf")
    return step is None or (Fraction(str(value)) / Fraction(str(step))).denominator == 1


def _array_fits(value: list[Any], schema: dict[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return False
    if schema.get("uniqueItems") and any(equal(a, b) for i, a in enumerate(value) for b in value[:i]):
        return False
    if "contains" in schema:
        count = sum(inner(item, schema["contains"]) for item in value)
        if not schema.get("minContains", 1) <= count <= schema.get("maxContains", math.inf):
            return False
    first = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    return all(inner(item, first[i] if i < len(first) else rest) for i, item in enumerate(value))


def equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same number, 1 and true are not the same value."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return bool(one == other)


def _is_count(given: Any) -> bool:
    return TYPES["integer"](given) and given >= 0


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def _is_type(given: Any) -> bool:
    return all(isinstance(t, str) and t in TYPES for t in (given if isinstance(given, list) else [given])) and given != []


_any, _object = (lambda given: True), TYPES["object"]
_schemas = lambda given: isinstance(given, list) and bool(given)
# keyword -> whether what is given for it can be
KEYWORDS: dict[str, Callable[[Any], bool]] = {
    "type": _is_type, "enum": TYPES["array"], "const": _any, "$ref": TYPES["string"], "properties": _object,
    "patternProperties": _object, "dependentSchemas": _object, "dependentRequired": lambda g: _object(g) and all(map(_is_names, g.values())),
    "required": _is_names, "additionalProperties": _any, "propertyNames": _any, "items": _any, "contains": _any, "not": _any,
    "if": _any, "then": _any, "else": _any, "allOf": _schemas, "anyOf": _schemas, "oneOf": _schemas, "prefixItems": _schemas,
    "uniqueItems": TYPES["boolean"], "pattern": TYPES["string"], "multipleOf": lambda g: TYPES["number"](g) and g > 0,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), TYPES["number"]),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains",
                     "maxContains"), _is_count)}
