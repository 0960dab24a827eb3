"""The API's own description (OpenAPI 3.1), made from its routes, views and serializers.

A view may say ``bodies`` (serializers of requests, by action), ``raw`` (actions that take plain bytes), ``results`` (of
answers that differ from ``serializer_class``) and ``answers`` (the status of success). A name in a route becomes a
parameter of the path.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.urls import URLPattern, URLResolver, get_resolver
from rest_framework import serializers
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from recvirt import __version__

_METHODS = ("get", "post", "put", "patch", "delete")
_KEYED = "Idempotency-Key"
_SUCCESS = {"create": 202, "destroy": 202}
_TEXTS = {
    101: "A WebSocket from then on.", 200: "Done.", 201: "Made.", 202: "Accepted: the operation.",
    204: "Done; nothing to say.",
}  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    path: str
    method: str
    view: Any
    action: str

    @property
    def parameters(self) -> list[str]:
        """The names in the path."""
        return re.findall(r"{(\w+)}", self.path)

    @property
    def is_list(self) -> bool:
        """Whether the answer is a page of things."""
        return self.action == "list" or self.action == "firings"


def _path_of(pattern: str) -> str:
    """A route's regular expression or path as a template of OpenAPI."""
    text = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", pattern) if "(?P<" not in pattern else pattern
    while "(?P<" in text:
        start = text.index("(?P<")
        name, rest = text[start + 4 :].split(">", 1)
        depth, end = 1, 0
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0) if rest[end - 1 : end] != "\\" else 0
            end += 1
        text = f"{text[:start]}{{{name}}}{rest[end:]}"
    return text.replace("^", "").replace("$", "").replace("\\Z", "").replace("\\.", ".").replace("/?", "")


def endpoints() -> Iterator[Endpoint]:
    """Every method of every route, the router's page of contents and its suffixes for formats aside."""
    yield from _walk(get_resolver().url_patterns, "/")


def _walk(patterns: list[Any], before: str) -> Iterator[Endpoint]:
    for pattern in patterns:
        path = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from _walk(pattern.url_patterns, path)
        elif isinstance(pattern, URLPattern) and "format" not in path and pattern.name != "api-root":
            yield from _of(_path_of(path), pattern.callback)


def _of(path: str, callback: Any) -> Iterator[Endpoint]:
    view = getattr(callback, "cls", None)
    if view is None:
        yield Endpoint(path, "get", callback, callback.__name__)
        return
    actions = getattr(callback, "actions", None)
    if actions is None:
        actions = {method: method for method in _METHODS if hasattr(view, method)}
    for method, action in actions.items():
        if method in _METHODS:
            yield Endpoint(path, method, view, action)


def field_schema(field: Any) -> dict[str, Any]:
    """A serializer's field."""
    schema = _type_of(field)
    if text := getattr(field, "help_text", None):
        schema["description"] = str(text)
    for name, word in (("min_value", "minimum"), ("max_value", "maximum"), ("min_length", "minLength"),
                       ("max_length", "maxLength")):  # fmt: skip
        value = getattr(field, name, None)
        if value is not None:
            is_list = isinstance(field, serializers.ListField)
            schema[word.replace("Length", "Items") if is_list else word] = value
    default: Any = getattr(field, "default", serializers.empty)
    if isinstance(default, (bool, int, str)):
        schema["default"] = default
    elif default in (list, dict):
        schema["default"] = default()
    if getattr(field, "allow_null", False) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if getattr(field, "read_only", False):
        schema["readOnly"] = True
    return schema


def _type_of(field: Any) -> dict[str, Any]:
    if isinstance(field, serializers.ListSerializer):
        return {"type": "array", "items": object_schema(field.child)}
    if isinstance(field, serializers.BaseSerializer):
        return object_schema(field)
    if isinstance(field, serializers.ListField):
        return {"type": "array", "items": field_schema(field.child)}
    if isinstance(field, serializers.DictField):
        return {"type": "object", "additionalProperties": field_schema(field.child)}
    if isinstance(field, serializers.ChoiceField):
        return {"type": "string", "enum": list(field.choices)}
    for kind, schema in (
        (serializers.BooleanField, {"type": "boolean"}),
        (serializers.IntegerField, {"type": "integer"}),
        (serializers.FloatField, {"type": "number"}),
        (serializers.DateTimeField, {"type": "string", "format": "date-time"}),
        (serializers.UUIDField, {"type": "string", "format": "uuid"}),
        (serializers.CharField, {"type": "string"}),
        (serializers.PrimaryKeyRelatedField, {"type": ["string", "null"], "format": "uuid"}),
        (serializers.SlugRelatedField, {"type": ["string", "null"]}),
    ):
        if isinstance(field, kind):
            return dict(schema)
    # JSON, and what a method of the serializer makes.
    return {}


def object_schema(serializer: Any) -> dict[str, Any]:
    """A serializer as JSON Schema. One that refuses unknown fields says so."""
    fields = serializer.fields
    schema: dict[str, Any] = {
        "type": "object", "properties": {name: field_schema(field) for name, field in fields.items()},
    }  # fmt: skip
    required = [name for name, field in fields.items() if field.required and not field.read_only]
    if required:
        schema["required"] = required
    if text := (type(serializer).__doc__ or "").strip():
        schema["description"] = text.split("\n\n")[0]
    return schema


def _name_of(kind: type[Any]) -> str:
    return kind.__name__.removesuffix("Serializer")


class _Document:
    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {
            "Problem": {
                "type": "object", "description": "RFC 9457 problem details: type for programs, title for people.",
                "properties": {"status": {"type": "integer"}, "type": {"type": "string"}, "title": {"type": "string"},
                               "errors": {}},
                "required": ["status", "type"],
            }
        }  # fmt: skip

    def reference(self, kind: type[Any]) -> dict[str, str]:
        name = _name_of(kind)
        if name not in self.schemas:
            self.schemas[name] = object_schema(kind())
        return {"$ref": f"#/components/schemas/{name}"}

    def operation(self, endpoint: Endpoint) -> dict[str, Any]:
        view, action = endpoint.view, endpoint.action
        handler = getattr(view, action, view)
        inherited = action in ("list", "retrieve")
        text = ((view.__doc__ if inherited else handler.__doc__) or "").strip()
        summary, _, more = text.partition("\n\n")
        words: dict[str, Any] = {
            "operationId": f"{endpoint.method}-{endpoint.path.strip('/').replace('{', '').replace('}', '')}".replace(
                "/", "-"
            ),
            "summary": summary.rstrip("."),
            "tags": [view.__name__],
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in endpoint.parameters
            ],
            "responses": self._responses(endpoint),
        }
        if getattr(view, "authentication_classes", None) == []:
            words["security"] = []
        if more:
            words["description"] = re.sub(r"\s+", " ", more)
        if endpoint.is_list:
            words["parameters"] += [
                {"name": name, "in": "query", "schema": {"type": "integer", "minimum": 0}}
                for name in ("limit", "offset")
            ]
        body = getattr(view, "bodies", {}).get(action)
        if body is not None:
            media = {"application/json": {"schema": self.reference(body)}}
            words["requestBody"] = {"required": endpoint.method != "delete", "content": media}
        elif action in getattr(view, "raw", ()):
            words["requestBody"] = {"required": True, "content": {"application/octet-stream": {}}}
        if endpoint.method in ("post", "delete") and self._status(endpoint) == 202:
            words["parameters"].append(
                {"name": _KEYED, "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": 64},
                 "description": "The same key with the same request gives the same operation."}
            )  # fmt: skip
        return words

    @staticmethod
    def _status(endpoint: Endpoint) -> int:
        said = getattr(endpoint.view, "answers", {}).get(endpoint.action)
        if said is not None:
            return int(said)
        if endpoint.action == "console_socket":
            return 101
        if endpoint.method in ("get", "patch", "put"):
            return 200
        return _SUCCESS.get(endpoint.action, 202 if not hasattr(endpoint.view, "answers") else 200)

    def _responses(self, endpoint: Endpoint) -> dict[str, Any]:
        status = self._status(endpoint)
        success: dict[str, Any] = {"description": _TEXTS[status]}
        if (schema := self._result(endpoint, status)) is not None:
            success["content"] = schema
        problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        return {str(status): success, "default": {"description": "Refused, and why.", "content": problem}}

    def _result(self, endpoint: Endpoint, status: int) -> dict[str, Any] | None:
        if status in (101, 204):
            return None
        if endpoint.action == "stream":
            return {"text/event-stream": {"schema": {"type": "string"}}}
        kind = getattr(endpoint.view, "results", {}).get(endpoint.action)
        if kind is None and status == 202:
            from recvirt.nestedcloud.central.serializers import OperationSerializer

            kind = OperationSerializer
        kind = kind or getattr(endpoint.view, "serializer_class", None)
        if kind is None:
            media = "text/plain" if endpoint.path == "/metrics" else "application/json"
            return {media: {"schema": {"type": "string" if media == "text/plain" else "object"}}}
        schema: dict[str, Any] = self.reference(kind)
        if endpoint.is_list:
            link = {"type": ["string", "null"], "format": "uri"}
            schema = {
                "type": "object", "required": ["count", "next", "previous", "results"],
                "properties": {"count": {"type": "integer"}, "next": link, "previous": link,
                               "results": {"type": "array", "items": schema}},
            }  # fmt: skip
        return {"application/json": {"schema": schema}}


@functools.cache
def document() -> dict[str, Any]:
    """The whole description. Routes do not change while a process runs."""
    made = _Document()
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints():
        paths.setdefault(endpoint.path, {})[endpoint.method] = made.operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "recvirt Nested Cloud", "version": __version__,
            "description": "Reading is direct. What changes an instance makes an operation: the answer is 202 with it.",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": dict(sorted(made.schemas.items())),
        },
    }  # fmt: skip


class Schema(APIView):
    """The API's description in OpenAPI 3.1."""

    permission_classes = [IsAuthenticated]
    open_to_scoped = True

    def get(self, request: Request, **kwargs: Any) -> Response:
        """The description."""
        return Response(document())
