"""Profiles: found by name or path, laid over what they extend, checked as a whole, with the origin of every value.

Owns: files to :class:`recvirt.model.Profile`. Does not own: what the keys mean (:mod:`recvirt.model` says it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recvirt.errors import ConfigError
from recvirt.model import Profile
from recvirt.profile.check import locate, origins_of, validate
from recvirt.profile.layers import (
    find_profile,
    load_layers,
    profile_names,
    read_override,
    shown_path,
    unknown_profile,
)
from recvirt.profile.merge import merge
from recvirt.profile.nodes import Node, Origin
from recvirt.profile.schema import file_schema

#: What an origin's file is for values that no profile wrote.
DEFAULT = "built-in default"
_HINT = "recvirt profile keys explains every key"


@dataclass(frozen=True)
class LoadedProfile:
    """A whole profile: the checked model, where each value was written, and the files, the most general first."""

    model: Profile
    origins: dict[str, tuple[str, int]]  # path of a value -> (file, line); line 0: --set or a built-in default
    files: tuple[Path, ...]
    data: dict[str, Any]  # as merged, before the model: what ``profile show`` prints

    @property
    def name(self) -> str:
        """The profile's name: its ``name`` key, else its file's name."""
        return self.model.name


@cache
def _defaults() -> Node:
    data = Profile(name="unnamed").model_dump(mode="json", exclude={"name"})
    return _node_of(data, Origin(DEFAULT, 0, Path("/")))


def _node_of(value: Any, origin: Origin) -> Node:
    if isinstance(value, dict):
        return Node({key: _node_of(child, origin) for key, child in value.items()}, origin)
    if isinstance(value, list):
        return Node([_node_of(child, origin) for child in value], origin)
    return Node(value, origin)


def load_profile(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedProfile:
    """Load a profile by name (``./profiles`` first, then the shipped ones) or by path.

    ``overrides`` are ``key.key=value`` words as of ``--set``, laid over the files in order. Raises ConfigError with
    every fault of every file at once.
    """
    path = find_profile(str(name_or_path))
    if path is None:
        raise ConfigError(unknown_profile(str(name_or_path)), hint="recvirt profiles lists them")
    layers = load_layers(path)
    problems = layers.problems
    root = _defaults()
    for mapping in (*layers.mappings, *(n for text in overrides if (n := read_override(text, problems)))):
        root = merge(root, mapping, _defaults(), problems)
    if "name" not in root.value:
        root.value["name"] = Node(path.stem, Origin(shown_path(path), 0, path.parent))
    root, missing = locate(root)
    model, faults = validate(root, whole=not layers.unreadable)
    problems += missing + faults
    if problems or model is None:
        raise ConfigError(sorted(set(problems)), hint=_HINT)
    return LoadedProfile(model, origins_of(root), tuple(layers.files), root.plain())


__all__ = ["DEFAULT", "LoadedProfile", "file_schema", "find_profile", "load_profile", "profile_names"]
