"""Lays profile files over each other.

Mappings merge key by key; lists and scalars replace what was there; ``key+: [...]`` appends to a list (what is there
already is not repeated) and ``key-: [...]`` removes from it; ``null`` takes the built-in default back.
Does not own: where layers come from, nor which keys exist.
"""

from __future__ import annotations

from typing import Any

from recvirt.errors import Problem
from recvirt.profile.nodes import Node, join

APPEND, REMOVE = "+", "-"


def split_key(key: str) -> tuple[str, str]:
    """``packages+`` is ``("packages", "+")``; a plain key has an empty mode."""
    return (key[:-1], key[-1]) if len(key) > 1 and key[-1] in (APPEND, REMOVE) else (key, "")


def merge(base: Node, layer: Node, defaults: Node | None, problems: list[Problem], path: str = "") -> Node:
    """``layer`` (a mapping) laid over ``base`` (a mapping). ``defaults`` is what null goes back to at this path."""
    result: dict[str, Node] = dict(base.value)
    default_keys: dict[str, Node] = defaults.value if defaults is not None and defaults.is_mapping else {}
    # Plain values first, then removals, then additions: the order of keys in a file carries no meaning.
    for key, node in sorted(layer.value.items(), key=lambda item: ("", REMOVE, APPEND).index(split_key(item[0])[1])):
        name, mode = split_key(key)
        here = join(path, name)
        if mode:
            if name in layer.value:
                problems.append(_problem(node, join(path, key), f"stands beside {name}: write one of the two"))
            else:
                _edit_list(result, name, mode, node, here, problems)
        elif node.value is None:
            if name in default_keys:
                result[name] = default_keys[name]
            else:
                result.pop(name, None)
        elif node.is_mapping:
            below = result.get(name)
            start = below if below is not None and below.is_mapping else Node({}, node.origin)
            merged = merge(start, node, default_keys.get(name), problems, here)
            result[name] = Node(merged.value, node.origin)
        else:
            result[name] = _fresh(node, here, problems)
    return Node(result, base.origin)


def _fresh(node: Node, path: str, problems: list[Problem]) -> Node:
    """A value with nothing below it: edit keys inside its items have nothing to work on."""
    if node.is_list:
        items = [_fresh(item, f"{path}[{i}]", problems) for i, item in enumerate(node.value)]
        return Node(items, node.origin)
    if node.is_mapping:
        return merge(Node({}, node.origin), node, None, problems, path)
    return node


def _edit_list(result: dict[str, Node], name: str, mode: str, node: Node, path: str, problems: list[Problem]) -> None:
    if not node.is_list:
        problems.append(_problem(node, path + mode, "must be a list"))
        return
    below = result.get(name)
    if below is not None and below.value is not None and not below.is_list:
        problems.append(_problem(node, path + mode, f"{path} is not a list"))
        return
    items: list[Node] = list(below.value) if below is not None and below.value is not None else []
    for item in _fresh(node, path + mode, problems).value:
        wanted = item.plain()
        if mode == APPEND:
            if all(present.plain() != wanted for present in items):
                items.append(item)
            continue
        kept = [present for present in items if not _matches(present.plain(), wanted)]
        if len(kept) == len(items):
            problems.append(_problem(item, path + mode, f"{wanted!r} is not in the list that it would be removed from"))
        items = kept
    result[name] = Node(items, node.origin)


def _matches(present: Any, wanted: Any) -> bool:
    """Equal; or, for mappings, alike in every key that is named (``users-: [{name: guest}]``)."""
    if isinstance(present, dict) and isinstance(wanted, dict):
        return all(key in present and present[key] == value for key, value in wanted.items())
    return bool(present == wanted)


def _problem(node: Node, path: str, message: str) -> Problem:
    return Problem(node.origin.file, node.origin.line, path, message)
