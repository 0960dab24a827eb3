"""Reads one YAML file into nodes that know their line, and refuses what a profile has no use for.

Safe by construction: scalars become text, numbers, true/false or null and nothing else; size, nesting and the growth
by aliases are bounded; explicit tags, several documents, merge keys (``<<``) and duplicate keys are faults. Words keep
their YAML 1.2 meaning: ``no``, ``on`` and ``010`` are text. Does not own: what keys mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recvirt.errors import Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_NODES = 20_000


@dataclass(frozen=True)
class Origin:
    """Where a value was written. ``line`` counts from 1, 0 is unknown; relative paths are relative to ``folder``."""

    file: str
    line: int
    folder: Path


@dataclass(frozen=True)
class Node:
    """A value with its origin: a mapping of nodes, a list of nodes, or a scalar."""

    value: Any
    origin: Origin

    @property
    def is_mapping(self) -> bool:
        """Whether it holds keys."""
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        """Whether it holds items."""
        return isinstance(self.value, list)

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """This node and everything below it, each with its path (``root.users[0].name``)."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk(join(path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk(f"{path}[{index}]")


def join(path: str, key: str) -> str:
    """``root`` and ``users`` make ``root.users``; a key with a dot is quoted."""
    word = f'"{key}"' if "." in key else key
    return f"{path}.{word}" if path else word


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the parent's own type)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^([-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(0|[1-9][0-9]*)\.[0-9]*([eE][-+]?[0-9]+)?$"), list("-+0123456789")
)


class _RefusedError(Exception):
    """The file as a whole can't be taken."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


def read_file(path: Path, shown: str) -> tuple[Node | None, list[Problem]]:
    """The mapping in a profile file, or None; and every fault found in it. ``shown`` names the file in messages."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return None, [Problem(shown, 0, "", f"can't be read: {error.strerror}")]
    if len(raw) > MAX_BYTES:
        return None, [Problem(shown, 0, "", f"{len(raw)} bytes are too many for a profile (limit {MAX_BYTES})")]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return None, [Problem(shown, line, "", "is not UTF-8 text")]
    node, problems = read_text(text, shown, path.parent)
    if node is not None and not node.is_mapping:
        what = "is empty" if node.value is None else "must hold keys and values (key: value)"
        return None, [*problems, Problem(shown, 1, "", what)]
    return node, problems


def read_text(text: str, shown: str, folder: Path) -> tuple[Node | None, list[Problem]]:
    """The value that YAML text holds, and its faults."""
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Node(None, Origin(shown, 1, folder)), []
            reader = _Converter(loader, shown, folder)
            return reader.convert(root, "", 0), reader.problems
        finally:
            loader.dispose()
    except _RefusedError as error:
        return None, [Problem(shown, error.line, "", error.message)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(filter(None, (error.problem, error.context)))
        return None, [Problem(shown, mark.line + 1 if mark else 0, "", f"not YAML: {said}")]
    except yaml.YAMLError as error:
        return None, [Problem(shown, 0, "", f"not YAML: {str(error).splitlines()[0]}")]


def _check_events(text: str) -> None:
    """Bound depth and number before anything recursive looks at the text (the event parser is a state machine)."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = _line(event)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if depth > MAX_DEPTH:
            raise _RefusedError(line, f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_NODES:
            raise _RefusedError(line, f"holds more than {MAX_NODES} values")
        if documents > 1:
            raise _RefusedError(line, "holds a second document (---); a profile is one")
        tag = getattr(event, "tag", None)
        if tag:
            raise _RefusedError(line, f"the tag {tag} has no meaning here")


def _line(node: yaml.Node | yaml.Event) -> int:
    return node.start_mark.line + 1 if node.start_mark is not None else 0


class _Converter:
    """Turns the composed YAML tree into nodes, with a budget that aliases can't blow."""

    def __init__(self, loader: _Loader, shown: str, folder: Path) -> None:
        self._loader = loader
        self._shown = shown
        self._folder = folder
        self._count = 0
        self.problems: list[Problem] = []

    def convert(self, node: yaml.Node, path: str, depth: int) -> Node:
        """One YAML node and all below it."""
        line = _line(node)
        self._count += 1
        if self._count > MAX_NODES:
            raise _RefusedError(line, f"its aliases unfold to more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise _RefusedError(line, "its aliases nest without end")
        origin = Origin(self._shown, line, self._folder)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path, depth), origin)
        if isinstance(node, yaml.SequenceNode):
            items = [self.convert(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
            return Node(items, origin)
        if node.value == "" and getattr(node, "style", None) is None:
            # Somebody commented out what stood below a key. Taking it for null would reset a whole section unasked.
            message = "has no value: leave the key out, or write null to take the built-in default back"
            self.problems.append(Problem(self._shown, line, path, message))
            return Node(None, origin)
        try:
            return Node(self._loader.construct_object(node), origin)
        except ValueError:
            self.problems.append(Problem(self._shown, line, path, "is not a number that can be read"))
            return Node(None, origin)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(self._shown, line, path, "a key must be a word"))
                continue
            key = str(key_node.value)
            here = join(path, key)
            child = self.convert(value_node, here, depth + 1)
            if key == "<<":
                self.problems.append(Problem(self._shown, line, here, "merge keys are not taken: use extends"))
            elif key in result:
                first = result[key].origin.line
                self.problems.append(Problem(self._shown, line, here, f"stands twice (first in line {first})"))
            else:
                # The key's line is where a person looks, also when the value starts on the next one.
                result[key] = Node(child.value, Origin(self._shown, line, self._folder))
        return result
