"""Dataclasses as JSON and back. Standard library only; what it reads is not trusted."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar


class ModelError(ValueError):
    """A value or a message that is not what it should be."""


T = TypeVar("T")


def encode(value: Any) -> Any:
    """JSON types only, from dataclasses, enums, tuples and mappings of them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(wanted: type[T], data: Any) -> T:
    """The dataclass ``wanted`` out of parsed JSON. ModelError names what does not fit, and where."""
    result: T = _decode(wanted, data, wanted.__name__)
    return result


def _decode(wanted: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        (inner,) = [item for item in typing.get_args(wanted) if item is not type(None)]
        return _decode(inner, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ModelError(f"{where}: want a list")
        inner = typing.get_args(wanted)[0]
        return tuple(_decode(inner, item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ModelError(f"{where}: want an object")
        return data
    if dataclasses.is_dataclass(wanted):
        return _decode_object(wanted, data, where)
    if issubclass(wanted, enum.Enum):
        try:
            return wanted(data)
        except ValueError:
            raise ModelError(f"{where}: {data!r} is none of {', '.join(item.value for item in wanted)}") from None
    # A bool is an int to Python, not to us.
    if not isinstance(data, wanted) or (isinstance(data, bool) and wanted is not bool):
        raise ModelError(f"{where}: want {wanted.__name__}, not {type(data).__name__}")
    return data


def _decode_object(wanted: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ModelError(f"{where}: want an object")
    hints = typing.get_type_hints(wanted)
    fields = {field.name: field for field in dataclasses.fields(wanted)}
    if unknown := sorted(set(data) - set(fields)):
        raise ModelError(f"{where}: unknown {', '.join(unknown)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ModelError(f"{where}: {name} is missing")
    try:
        return wanted(**values)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
