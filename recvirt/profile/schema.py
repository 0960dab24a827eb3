"""The JSON schema of a profile file, and questions answered from it.

The models give the schema of a *merged* profile; a file may also extend others, edit lists and take defaults back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from recvirt.model import Profile

Schema = dict[str, Any]


@cache
def model_schema() -> Schema:
    """The schema of a merged profile, as pydantic sees it. Shared: not to be changed."""
    return Profile.model_json_schema()


def file_schema() -> Schema:
    """The schema for editors: what one file may hold, before merging (JSON schema 2020-12)."""
    schema = copy.deepcopy(model_schema())
    for part in (schema, *schema.get("$defs", {}).values()):
        _allow_edits(part)
    schema["required"] = []  # the name is the file's; the rest has defaults or comes from a parent
    schema["properties"] = {
        "extends": {
            "description": "profiles (names, or paths relative to this file) that this one is laid over, in order",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **schema["properties"],
    }
    kernel = schema["properties"]["kernel"]
    kernel.setdefault("anyOf", []).append({"const": "debian", "description": "Debian's stock cloud kernel"})
    if "$ref" in kernel:
        kernel["anyOf"].insert(0, {"$ref": kernel.pop("$ref")})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "recvirt profile"}


def _allow_edits(part: Schema) -> None:
    properties: dict[str, Schema] = part.get("properties", {})
    for name, field in list(properties.items()):
        if field.get("type") == "array":
            edited = {key: value for key, value in field.items() if key != "default"}
            properties[f"{name}+"] = {**edited, "description": f"appended to {name}"}
            properties[f"{name}-"] = {
                "type": "array", "items": {}, "description": f"removed from {name}; a mapping removes what matches it",
            }  # fmt: skip
        if "default" in field and not _takes_null(field):
            kept = {key: field.pop(key) for key in list(field) if key not in ("default", "description", "title")}
            field["anyOf"] = [*(kept.pop("anyOf", None) or [kept]), {"type": "null"}]


def _takes_null(field: Schema) -> bool:
    return any(choice.get("type") == "null" for choice in field.get("anyOf", ()))


def resolve(schema: Schema) -> Schema:
    """Follow a reference, and look through ``X | None``."""
    if "$ref" in schema:
        return resolve(model_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]])
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    return resolve(choices[0]) if len(choices) == 1 else schema


def at(location: Sequence[str | int]) -> Schema | None:
    """The schema at a place of a merged profile, as ``("root", "users", 0)``; None where there is none."""
    schema = resolve(model_schema())
    for key in location:
        below = schema.get("items") if isinstance(key, int) else _property(schema, key)
        if not isinstance(below, dict):
            return None
        schema = resolve(below)
    return schema


def _property(schema: Schema, key: str) -> Any:
    return schema.get("properties", {}).get(key, schema.get("additionalProperties"))


def known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys that may stand at a place; none where keys are free or there is no mapping."""
    return list((at(location) or {}).get("properties", {}))


def strings_of_format(value: Any, formats: Sequence[str]) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """Every text in ``value`` (a merged profile) whose schema has one of ``formats``: its place, format and text."""
    yield from _find(value, resolve(model_schema()), (), formats)


def _find(
    value: Any, schema: Schema, place: tuple[str | int, ...], formats: Sequence[str]
) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    if isinstance(value, dict):
        for key, child in value.items():
            below = _property(schema, key)
            if isinstance(below, dict):
                yield from _find(child, resolve(below), (*place, key), formats)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _find(child, resolve(schema.get("items", {})), (*place, index), formats)
    elif isinstance(value, str) and schema.get("format") in formats:
        yield place, schema["format"], value
