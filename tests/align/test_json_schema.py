"""JSON Schema against the package jsonschema, on hand-made and on generated schemas and values."""

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.align.json_schema import KEYWORDS, JsonSchema
from pellucid.errors import BadInput

VALUES = [None, True, False, 0, 1, 1.0, 1.5, -3, 7, 0.25, [False], "", "a", "abc", "ünï", [], [1], [1, 1], [1, 1.0], [1, True], ["a", 2, None], [[1], [1]],
          {}, {"a": 1}, {"a": "x", "b": 2}, {"b": 2, "c": {"a": 1}}, {"a": {"a": {"a": None}}}, [0, False], {"x-1": 1, "y": "s"}, [{"a": 1}, {"a": 1.0}]]
SCHEMAS = [
    True, False, {}, {"type": "integer"}, {"type": "number"}, {"type": ["string", "null"]}, {"type": "boolean"}, {"type": "array"},
    {"enum": [1, "a", [1], {"a": 1}, True]}, {"const": 1}, {"const": True}, {"const": {"a": 1.0}}, {"const": [False]}, {"minimum": 1, "maximum": 7},
    {"exclusiveMinimum": 1, "exclusiveMaximum": 7}, {"multipleOf": 0.5}, {"multipleOf": 3}, {"minLength": 1, "maxLength": 3}, {"pattern": "^a"},
    {"pattern": "b"}, {"items": {"type": "integer"}}, {"prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"prefixItems": [{"const": 1}]}, {"minItems": 1, "maxItems": 2}, {"uniqueItems": True}, {"contains": {"const": 1}}, {"contains": {"const": 1}, "maxContains": 1},
    {"contains": {"type": "string"}, "minContains": 0}, {"properties": {"a": {"type": "integer"}}}, {"required": ["a"]},
    {"properties": {"a": {}}, "additionalProperties": False}, {"additionalProperties": {"type": "integer"}}, {"patternProperties": {"^x": {"type": "integer"}},
     "additionalProperties": {"type": "string"}}, {"propertyNames": {"maxLength": 1}}, {"minProperties": 1, "maxProperties": 1}, {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {"required": ["b"]}}}, {"allOf": [{"type": "integer"}, {"minimum": 1}]}, {"anyOf": [{"type": "string"}, {"minimum": 2}]},
    {"oneOf": [{"type": "integer"}, {"minimum": 1}]}, {"not": {"type": "integer"}}, {"if": {"type": "integer"}, "then": {"minimum": 1}, "else": {"type": "string"}},
    {"if": {"type": "integer"}, "then": {"minimum": 1}}, {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"a": {"$ref": "#/$defs/tree"}},
     "additionalProperties": False}}}, {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}, "title": "t", "description": "d", "default": 3},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"], "additionalProperties": False},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}}, {"properties": {"a": {"$ref": "#"}}, "type": "object"}]


def agrees(schema, value):
    theirs = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert JsonSchema(schema).is_valid(value) == theirs, (schema, value, theirs)
    return theirs


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_hand_made_schemas(schema):
    seen = {agrees(schema, value) for value in VALUES}
    assert len(seen) == 2 or schema in (True, False, {}) or ("contains" in schema and schema.get("minContains") == 0)


def test_every_keyword_is_tried():
    def keywords(schema):
        return set(schema) | {k for v in schema.values() for s in (v if isinstance(v, list) else [v]) if isinstance(s, dict) for k in keywords(s)} if isinstance(schema, dict) else set()
    assert set(KEYWORDS) <= set().union(*map(keywords, SCHEMAS))


simple = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.5]), st.text("ab", max_size=3))
values = st.recursive(simple, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.sampled_from("abc"), v, max_size=3)), max_leaves=6)


def schemas(inner):
    def some(**fields):
        return st.fixed_dictionaries({}, optional=fields)
    return st.one_of(
        some(type=st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"]), enum=st.lists(values, max_size=2), const=values),
        some(minimum=st.integers(-2, 2), exclusiveMaximum=st.integers(-2, 3), multipleOf=st.sampled_from([1, 2, 0.5])),
        some(minLength=st.integers(0, 2), maxLength=st.integers(0, 3), pattern=st.sampled_from(["a", "^b", "a.*b", "^$"])),
        some(items=inner, prefixItems=st.lists(inner, min_size=1, max_size=2), minItems=st.integers(0, 2), uniqueItems=st.booleans(), contains=inner),
        some(properties=st.dictionaries(st.sampled_from("abc"), inner, max_size=2), required=st.lists(st.sampled_from("abc"), max_size=2, unique=True),
             additionalProperties=inner, maxProperties=st.integers(0, 3), dependentRequired=st.just({"a": ["b"]})),
        st.one_of(*(st.fixed_dictionaries({k: st.lists(inner, min_size=1, max_size=2)}) for k in ("allOf", "anyOf", "oneOf"))),
        st.fixed_dictionaries({"not": inner}), st.fixed_dictionaries({"if": inner}, optional={"then": inner, "else": inner}))


@settings(max_examples=400, deadline=None)
@given(st.recursive(st.booleans(), schemas, max_leaves=5), st.lists(values, min_size=1, max_size=4))
def test_generated_schemas(schema, some):
    for value in some:
        agrees(schema, value)


@pytest.mark.parametrize("schema, message", [
    ({"typ": "string"}, "did you mean 'type'"), ({"type": "text"}, "'type' at #"), ({"properties": {"a": {"minimum": "3"}}}, "at #/properties/a"),
    ({"required": "a"}, "'required'"), ({"items": 3}, "holds 3"), ({"pattern": "("}, "is none"), ({"$ref": "#/$defs/x"}, "not in it"),
    ({"$ref": "http://x/y"}, "not in it"), ({"allOf": []}, "'allOf'"), ({"multipleOf": 0}, "'multipleOf'"), ("string", "holds 'string'"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"), ({"minItems": -1}, "'minItems'"), ({"type": []}, "'type'")])
def test_what_is_no_schema_is_refused(schema, message):
    with pytest.raises(BadInput) as error:
        JsonSchema(schema)
    assert message in str(error.value)


def test_bounded_time():
    assert not JsonSchema({"pattern": "^(a+)+$"}).is_valid("a" * 5000 + "!")
    endless = JsonSchema({"$ref": "#"})
    assert not endless.is_valid(1)
    deep = value = {}
    for _ in range(200):
        value["a"] = value = {}
    assert not JsonSchema({"properties": {"a": {"$ref": "#"}}}).is_valid(deep)  # deeper than can be judged
