"""Every key of a profile as Markdown tables: what ``recvirt profile keys`` prints and the manual holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

from recvirt.profile.schema import Schema, model_schema, resolve

_HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")
_PATH_WORDS = {
    "recvirt-file": "file", "recvirt-folder": "folder", "recvirt-fragment": "name or path",
    "recvirt-package-list": "name or path",
}  # fmt: skip


def as_markdown() -> str:
    """A table for each part of a profile, in the order of the model."""
    lines: list[str] = []
    for path, part in _parts(resolve(model_schema()), ""):
        lines += ["", f"**{path or 'top level'}**", "", *_HEAD]
        required = part.get("required", [])
        for name, field in part["properties"].items():
            default = "" if name in required and path else _default(field)
            lines.append(f"| `{name}` | {_type(field)} | {default} | {_escape(field.get('description', ''))} |")
    return "\n".join(lines[1:]) + "\n"


def _parts(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every mapping with known keys, with its path; a list's items as ``root.users[]``."""
    yield path, schema
    for name, field in schema["properties"].items():
        inner = resolve(field)
        here = f"{path}.{name}" if path else name
        if inner.get("type") == "array":
            inner, here = resolve(inner["items"]), f"{here}[]"
        if "properties" in inner:
            yield from _parts(inner, here)


def _type(field: Schema) -> str:
    inner = resolve(field)
    if "enum" in inner:
        return " / ".join(f"`{value}`" for value in inner["enum"])
    if inner.get("type") == "array":
        return f"list of {_type(inner['items'])}"
    if "properties" in inner:
        return "mapping"
    if inner.get("type") == "object":
        return "mapping of texts"
    if inner.get("format") in _PATH_WORDS:
        return _PATH_WORDS[inner["format"]]
    return {"string": "text", "integer": "number", "boolean": "true / false"}.get(str(inner.get("type")), "text")


def _default(field: Schema) -> str:
    value = field.get("default")
    if value is None or value in ([], {}, "") or isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
