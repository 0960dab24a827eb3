"""Finds everything that is wrong with a merged profile: types and keys, files that are not there, contradictions."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from recvirt.data import fragment_path, package_list_path, shipped_names
from recvirt.errors import Problem
from recvirt.model import Profile
from recvirt.profile import schema
from recvirt.profile.layers import absolute
from recvirt.profile.nodes import Node, Origin, join
from recvirt.profile.rules import conflicts

#: Formats of the model's texts that name something on the build host.
_NAMED = {
    "recvirt-fragment": ("kernel-configs", fragment_path, "kernel fragment"),
    "recvirt-package-list": ("package-lists", package_list_path, "package list"),
}
_PATHS = ("recvirt-file", "recvirt-folder")
Place = tuple[str | int, ...]


def path_of(place: Sequence[str | int]) -> str:
    """``("root", "users", 0, "name")`` is ``root.users[0].name``."""
    text = ""
    for key in place:
        text = f"{text}[{key}]" if isinstance(key, int) else join(text, key)
    return text


def node_at(root: Node, place: Sequence[str | int]) -> Node:
    """The node at a place, or the nearest one above it."""
    node = root
    for key in place:
        try:
            node = node.value[key]
        except (KeyError, IndexError, TypeError):
            break
    return node


def _problem(root: Node, place: Sequence[str | int], message: str) -> Problem:
    origin = node_at(root, place).origin
    return Problem(origin.file, origin.line, path_of(place), message)


def locate(root: Node) -> tuple[Node, list[Problem]]:
    """``root`` with every host path made absolute, and what is not there.

    Fragments and package lists are shipped names, or paths when they hold a slash.
    """
    problems: list[Problem] = []
    changed: dict[Place, str] = {}
    for place, kind, text in schema.strings_of_format(root.plain(), (*_PATHS, *_NAMED)):
        origin = node_at(root, place).origin
        if kind in _NAMED and "/" not in text:
            problems += _check_name(root, place, kind, text)
            continue
        path = absolute(text, origin.folder)
        changed[place] = str(path)
        wanted = path.is_dir() if kind == "recvirt-folder" else path.is_file()
        if not wanted:
            what = "folder" if kind == "recvirt-folder" else "file"
            problems.append(_problem(root, place, f"there is no {what} {path}"))
    return _replaced(root, changed, ()), problems


def _check_name(root: Node, place: Place, kind: str, text: str) -> Iterator[Problem]:
    folder, find, what = _NAMED[kind]
    if not find(text).is_file():
        yield _problem(root, place, f"there is no {what} {text!r}{_did_you_mean(text, shipped_names(folder))}")


def _replaced(node: Node, changed: Mapping[Place, str], place: Place) -> Node:
    if isinstance(node.value, dict):
        return Node({k: _replaced(v, changed, (*place, k)) for k, v in node.value.items()}, node.origin)
    if isinstance(node.value, list):
        return Node([_replaced(v, changed, (*place, i)) for i, v in enumerate(node.value)], node.origin)
    return Node(changed.get(place, node.value), node.origin)


def validate(root: Node, *, whole: bool = True) -> tuple[Profile | None, list[Problem]]:
    """The model, or None with every fault of types, keys and contradictions.

    Contradictions are only looked for in a ``whole`` profile: what a file that can't be read says is not missing.
    """
    data = root.plain()
    problems = [_problem(root, place, message) for place, message in conflicts(data)] if whole else []
    try:
        return Profile.model_validate(as_tuples(data)), problems
    except ValidationError as error:
        problems += [
            _explain(root, fault["loc"], fault["type"], fault["msg"], fault.get("ctx", {}), fault["input"])
            for fault in error.errors(include_url=False)
        ]
        return None, problems


def as_tuples(value: Any) -> Any:
    """The models are strict and immutable: what YAML calls a list is a tuple to them."""
    if isinstance(value, dict):
        return {key: as_tuples(child) for key, child in value.items()}
    return tuple(as_tuples(child) for child in value) if isinstance(value, list) else value


def _explain(root: Node, place: Place, kind: str, said: str, context: Mapping[str, Any], given: Any) -> Problem:
    bad_key = bool(place) and place[-1] == "[key]"
    if bad_key:
        place = place[:-1]
    if kind == "extra_forbidden":
        key = str(place[-1])
        message = f"unknown key{_did_you_mean(key, schema.known_keys(place[:-1]))}"
        return _problem(root, place, message)
    message = fault_message(kind, said, context, given)
    return _problem(root, place, f"the key {message}" if bad_key else message)


def fault_message(kind: str, said: str, context: Mapping[str, Any], given: Any) -> str:
    """What a person is told about one of pydantic's faults: its type, words, context and the value it met."""
    words = {
        "missing": "is required",
        "string_type": f"must be text, not {_kind(given)} (quote it)",
        "bool_type": f"must be true or false, not {_shown(given)}",
        "int_type": f"must be a whole number, not {_shown(given)}",
        "tuple_type": f"must be a list, not {_kind(given)}",
        "dict_type": f"must hold keys and values, not {_kind(given)}",
        "model_type": f"must hold keys and values, not {_kind(given)}",
        "literal_error": f"must be one of {context.get('expected', '')}, not {_shown(given)}",
        "string_pattern_mismatch": f"{_shown(given)} is not of the form {context.get('pattern', '')}",
        "value_error": str(context.get("error", said)),
    }
    return words.get(kind, said[:1].lower() + said[1:])


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "text", tuple: "a list", dict: "a mapping"}
    return names.get(type(value), "this")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else text[:57] + "...") if isinstance(value, str) else text[:60]


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def origins_of(root: Node) -> dict[str, tuple[str, int]]:
    """Where each value (scalars, and lists and mappings that are empty) was written."""
    return {
        path: (node.origin.file, node.origin.line)
        for path, node in root.walk()
        if path and not (node.value and (node.is_mapping or node.is_list))
    }


__all__ = ["Origin", "locate", "node_at", "origins_of", "path_of", "validate"]
