"""Laying files over each other: list edits, null, and what is said when they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.errors import Problem
from recvirt.profile.merge import merge, split_key
from recvirt.profile.nodes import Node, Origin, read_text

HERE = Path("/")


def node(text: str) -> Node:
    read, problems = read_text(text, "t.yaml", HERE)
    assert read is not None
    assert not problems
    return read


def merged(base: str, layer: str, defaults: str = "{}") -> tuple[Any, list[str]]:
    problems: list[Problem] = []
    result = merge(node(base), node(layer), node(defaults), problems)
    return result.plain(), [f"{p.path}: {p.message}" for p in problems]


@pytest.mark.parametrize(
    ("base", "layer", "wanted"),
    [
        ("{a: 1, b: 2}", "{b: 3}", {"a": 1, "b": 3}),
        ("{a: {x: 1, y: 2}}", "{a: {y: 3, z: 4}}", {"a": {"x": 1, "y": 3, "z": 4}}),
        ("{a: [1, 2]}", "{a: [3]}", {"a": [3]}),
        ("{a: [1, 2]}", "{a+: [3, 1]}", {"a": [1, 2, 3]}),
        ("{a: [1, 2, 3]}", "{a-: [2]}", {"a": [1, 3]}),
        ("{a: [1, 2, 3]}", "{a+: [4], a-: [2]}", {"a": [1, 3, 4]}),
        ("{a: [1, 2]}", "{a+: [2], a-: [2]}", {"a": [1, 2]}),
        ("{}", "{a+: [1]}", {"a": [1]}),
        ("{a: null}", "{a+: [1]}", {"a": [1]}),
        ("{a: 1}", "{a: {b: 2}}", {"a": {"b": 2}}),
        ("{a: {b: 2}}", "{a: 1}", {"a": 1}),
        ("{a: [{n: x, m: 1}, {n: y, m: 2}]}", "{a-: [{n: x}]}", {"a": [{"n": "y", "m": 2}]}),
    ],
)
def test_merging(base: str, layer: str, wanted: Any) -> None:
    assert merged(base, layer) == (wanted, [])


def test_null_takes_the_default_back_or_removes_a_free_key() -> None:
    defaults = "{a: 1, c: {d: [5]}}"
    assert merged("{a: 2, b: 3, c: {d: [6]}}", "{a: null, b: null, c: {d: null}}", defaults) == (
        {"a": 1, "c": {"d": [5]}},
        [],
    )


@pytest.mark.parametrize(
    ("base", "layer", "fault"),
    [
        ("{a: [1]}", "{a: [2], a+: [3]}", "a+: stands beside a: write one of the two"),
        ("{a: [1]}", "{a+: 3}", "a+: must be a list"),
        ("{a: 1}", "{a+: [3]}", "a+: a is not a list"),
        ("{a: [1]}", "{a-: [3]}", "a-: 3 is not in the list that it would be removed from"),
        ("{}", "{a: [{b-: [1]}]}", "a[0].b-: 1 is not in the list that it would be removed from"),
    ],
)
def test_edits_without_sense(base: str, layer: str, fault: str) -> None:
    assert merged(base, layer)[1] == [fault]


def test_origins_stay_with_their_values() -> None:
    problems: list[Problem] = []
    layer, _ = read_text("a:\n  y: 2\nl+:\n  - two\n", "layer.yaml", HERE)
    assert layer is not None
    result = merge(node("{a: {x: 1, y: 1}, l: [one]}"), layer, None, problems)
    found = {path: (child.origin.file, child.origin.line) for path, child in result.walk()}
    assert found["a.x"] == ("t.yaml", 1)
    assert found["a.y"] == ("layer.yaml", 2)
    assert found["l[0]"] == ("t.yaml", 1)
    assert found["l[1]"] == ("layer.yaml", 4)


def test_the_base_is_not_changed() -> None:
    base = node("{a: {x: 1}, l: [1]}")
    merge(base, node("{a: {x: 2}, l+: [2]}"), None, [])
    assert base.plain() == {"a": {"x": 1}, "l": [1]}


@pytest.mark.parametrize(
    ("key", "parts"), [("a", ("a", "")), ("a+", ("a", "+")), ("a-", ("a", "-")), ("+", ("+", "")), ("-", ("-", ""))]
)
def test_split_key(key: str, parts: tuple[str, str]) -> None:
    assert split_key(key) == parts


_LEAF = st.one_of(st.integers(), st.text("abc", max_size=3), st.lists(st.integers(), max_size=3))
_TREE = st.recursive(_LEAF, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=8)
_MAPPING = st.dictionaries(st.sampled_from("abcd"), _TREE, max_size=4)


def wrap(value: Any) -> Node:
    origin = Origin("g", 1, HERE)
    if isinstance(value, dict):
        return Node({key: wrap(child) for key, child in value.items()}, origin)
    if isinstance(value, list):
        return Node([wrap(child) for child in value], origin)
    return Node(value, origin)


@given(_MAPPING)
def test_a_layer_over_itself_changes_nothing(data: dict[str, Any]) -> None:
    assert merge(wrap(data), wrap(data), None, []).plain() == data


@given(_MAPPING, _MAPPING)
def test_the_layer_wins_and_the_base_keeps_the_rest(base: dict[str, Any], layer: dict[str, Any]) -> None:
    result = merge(wrap(base), wrap(layer), None, []).plain()
    assert set(result) == set(base) | set(layer)
    for key, value in layer.items():
        if not isinstance(value, dict):
            assert result[key] == value
    for key, value in base.items():
        if key not in layer:
            assert result[key] == value
