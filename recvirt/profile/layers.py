"""Finds a profile's file and those it extends, and puts them in the order in which they are laid over each other.

Does not own: merging, and what keys mean (only ``extends`` and the short form ``kernel: debian`` are known here).
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.data import data_path, shipped_names
from recvirt.errors import Problem
from recvirt.profile.merge import APPEND, REMOVE
from recvirt.profile.nodes import Node, Origin, read_file, read_text

#: Longer chains are a mistake, or somebody's joke.
MAX_FILES = 64
_KEY = re.compile(r'(?:"(?P<quoted>[^"]+)"(?P<edit>[+-]?)|(?P<bare>[^."]+))(?P<dot>\.|$)')


@dataclass
class Layers:
    """The mappings of a profile's files, the most general first, with the faults met on the way."""

    mappings: list[Node] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unreadable: bool = False  # a file could not be read, so values may be missing that are there


def shown_path(path: Path) -> str:
    """A path as short as it stays clear: relative below the current folder, else absolute."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def profile_names() -> dict[str, Path]:
    """Every profile that can be called by name: the shipped ones, and those in ``./profiles``, which win."""
    found = {name: data_path("profiles", f"{name}.yaml") for name in shipped_names("profiles")}
    found.update({path.stem: path for path in sorted((Path.cwd() / "profiles").glob("*.yaml"))})
    return dict(sorted(found.items()))


def _is_path(reference: str) -> bool:
    return "/" in reference or reference.endswith((".yaml", ".yml"))


def find_profile(reference: str, *, folder: Path | None = None, asking: Path | None = None) -> Path | None:
    """The file that ``reference`` means, or None. A path is relative to ``folder`` (unset: the current one).

    A name is looked up in ``folder`` (unset: ``./profiles``), then among the shipped ones. ``asking`` is passed over,
    so that a file may extend a shipped profile of its own name.
    """
    if _is_path(reference):
        path = ((folder or Path.cwd()) / Path(reference).expanduser()).resolve()
        return path if path.is_file() else None
    own = folder or Path.cwd() / "profiles"
    for candidate in (own / f"{reference}.yaml", data_path("profiles", f"{reference}.yaml")):
        path = candidate.resolve()
        if path.is_file() and path != asking:
            return path
    return None


def unknown_profile(reference: str) -> str:
    """What to say about a reference that means nothing."""
    if _is_path(reference):
        return f"there is no file {reference}"
    close = difflib.get_close_matches(reference, profile_names(), 1)
    return f"there is no profile {reference!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def load_layers(path: Path) -> Layers:
    """Read ``path`` and all that it extends; each file counts once, below everything that extends it."""
    layers = Layers()
    _add(path.resolve(), layers, ())
    return layers


def _add(path: Path, layers: Layers, chain: tuple[Path, ...]) -> None:
    if path in layers.files:
        return
    if len(layers.files) + len(chain) >= MAX_FILES:
        layers.unreadable = True
        layers.problems.append(Problem(shown_path(path), 0, "extends", f"more than {MAX_FILES} profiles in one"))
        return
    node, problems = read_file(path, shown_path(path))
    layers.problems += problems
    if node is None:
        layers.unreadable = True
    else:
        mapping = dict(node.value)
        for reference in _parents(mapping.pop("extends", None), layers.problems):
            _add_parent(reference, path, layers, (*chain, path))
        if chain:
            mapping.pop("name", None)  # a name is not inherited
        layers.mappings.append(Node(_expand(mapping), node.origin))
    layers.files.append(path)


def _add_parent(reference: Node, child: Path, layers: Layers, chain: tuple[Path, ...]) -> None:
    parent = find_profile(reference.value, folder=child.parent, asking=child)
    origin = reference.origin
    if parent is None or parent in chain:
        layers.unreadable = True
    if parent is None:
        layers.problems.append(Problem(origin.file, origin.line, "extends", unknown_profile(reference.value)))
    elif parent in chain:
        circle = " -> ".join(shown_path(p) for p in (*chain[chain.index(parent) :], parent))
        layers.problems.append(Problem(origin.file, origin.line, "extends", f"goes round in a circle: {circle}"))
    else:
        _add(parent, layers, chain)


def _parents(node: Node | None, problems: list[Problem]) -> list[Node]:
    if node is None:
        return []
    wanted = node.value if node.is_list else [node]
    good = [item for item in wanted if isinstance(item.value, str) and item.value]
    for item in wanted:
        if item not in good:
            problems.append(
                Problem(item.origin.file, item.origin.line, "extends", "must be a profile's name, its path, or a list")
            )
    return good


def _expand(mapping: dict[str, Node]) -> dict[str, Node]:
    """``kernel: debian`` says only where the kernel comes from; the parents' fragments stay, for the audit."""
    kernel = mapping.get("kernel")
    if kernel is not None and kernel.value == "debian":
        mapping["kernel"] = Node({"source": kernel}, kernel.origin)
    return mapping


def read_override(text: str, problems: list[Problem]) -> Node | None:
    """One ``--set a.b=value`` as a mapping to lay over the rest. ``a.b+=x`` and ``a.b-=x`` edit lists.

    A key that holds a dot is quoted: ``root.sysctl."net.ipv4.ip_forward"=1``.
    """
    shown = f"--set {text}"
    name, equals, value_text = text.partition("=")
    keys = _split_path(name)
    if not equals or not keys or not value_text.strip():
        problems.append(Problem(shown, 0, "", "must look like key.key=value (null takes the built-in default back)"))
        return None
    value, found = read_text(value_text, shown, Path.cwd())
    problems += [Problem(shown, 0, name, problem.message) for problem in found]
    if value is None:
        return None
    origin = Origin(shown, 0, Path.cwd())
    node = _at(value, origin)
    if keys[-1].endswith((APPEND, REMOVE)) and not node.is_list:
        node = Node([node], origin)
    for key in reversed(keys):
        node = Node({key: node}, origin)
    return Node(_expand(node.value), origin)


def _at(node: Node, origin: Origin) -> Node:
    """``node`` with one origin for all of it: lines within a command-line word help nobody."""
    if node.is_mapping:
        return Node({key: _at(child, origin) for key, child in node.value.items()}, origin)
    if node.is_list:
        return Node([_at(child, origin) for child in node.value], origin)
    return Node(node.value, origin)


def _split_path(text: str) -> list[str]:
    """``a."b.c".d`` is a, b.c, d; an empty list where a part is empty or a quote is left open."""
    keys: list[str] = []
    position = 0
    while match := _KEY.match(text, position):
        keys.append((match["quoted"] or match["bare"]) + (match["edit"] or ""))
        position = match.end()
        if not match["dot"]:
            break
    return keys if keys and position == len(text) and not text.endswith(".") else []


def absolute(path: str, folder: Path) -> Path:
    """A path written in a file of ``folder``, made absolute without following links in its last part."""
    return Path(os.path.normpath(folder / Path(path).expanduser()))
