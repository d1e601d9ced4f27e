"""Twenty JSON schemas of many kinds, each of which bounds its answer's length."""

from __future__ import annotations

from typing import Any

_SHORT = {"type": "string", "maxLength": 20}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _node(children: str | None) -> dict[str, Any]:
    name = {"name": {"type": "string", "maxLength": 8}}
    if children is None:
        return _object(**name)
    below = {"type": "array", "items": {"$ref": f"#/$defs/{children}"}, "maxItems": 2}
    return {**_object(**name, children=below), "required": ["name"]}


# The default model repeated itself and never closed one of ten of these: not among the twenty.
RECURSIVE: dict[str, Any] = {"$defs": {"node": _node("node")}, "$ref": "#/$defs/node"}
_TREE: dict[str, Any] = {
    "$defs": {"node": _node("branch"), "branch": _node("leaf"), "leaf": _node(None)},
    "$ref": "#/$defs/node",
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": _object(name=_SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "colour": {"enum": ["red", "green", "blue", "föhnblau", "朱色"]},
    "flag": {"type": "boolean"},
    "nothing": {"type": "null"},
    "grade": {"type": "integer", "minimum": 1, "maximum": 6},
    "share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
    "date": {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]$"},
    "day": {"type": "string", "format": "date"},
    "address": _object(street=_SHORT, city=_SHORT, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    "list of words": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 2, "maxItems": 4},
    "pair": {"type": "array", "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}],
             "minItems": 2, "maxItems": 2, "items": False},
    "nested order": _object(
        customer=_object(name=_SHORT, vip={"type": "boolean"}),
        items={"type": "array", "maxItems": 2, "items": _object(sku={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
               count={"type": "integer", "minimum": 1, "maximum": 99})},
    ),
    "tree": _TREE,
    "shape": {"anyOf": [_object(kind={"const": "circle"}, r={"type": "integer", "minimum": 1, "maximum": 9}),
                        _object(kind={"const": "square"}, a={"type": "integer", "minimum": 1, "maximum": 9})]},
    "optional fields": {"type": "object", "additionalProperties": False, "required": ["id"],
                        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 999}, "note": _SHORT}},
    "unicode greeting": _object(text={"type": "string", "maxLength": 12}, mark={"enum": ["✓", "✗", "…"]}),
    "nullable": _object(value={"type": ["string", "null"], "maxLength": 10}),
    "map": {"type": "object", "patternProperties": {"^[a-c]{1,2}$": {"type": "integer", "minimum": 0, "maximum": 9}},
            "additionalProperties": False, "maxProperties": 3},
    "address of a host": {"type": "string", "format": "ipv4"},
    "weekday set": {"type": "array", "items": {"enum": ["mon", "tue", "wed"]}, "maxItems": 3},
}  # fmt: skip
