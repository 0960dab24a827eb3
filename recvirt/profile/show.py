"""A loaded profile as YAML again, each value with a comment that says where it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recvirt.profile import DEFAULT, LoadedProfile
from recvirt.profile.nodes import join, read_text

_PLAIN = re.compile(r"^[A-Za-z0-9_./-][A-Za-z0-9_./@+-]*$")
_COMMENT_COLUMN = 56


def as_yaml(loaded: LoadedProfile, *, defaults: bool = True) -> str:
    """The merged profile as text that loads to the same values. ``defaults``: also what no profile wrote."""
    lines = list(_mapping(loaded.data, "", "", loaded.origins, defaults))
    return "\n".join(lines) + "\n"


def _mapping(
    data: dict[str, Any], path: str, indent: str, origins: dict[str, tuple[str, int]], defaults: bool
) -> Iterator[str]:
    # The name first, then what the file says: the order of the model.
    for key, value in sorted(data.items(), key=lambda item: item[0] != "name"):
        here = join(path, key)
        yield from _entry(f"{indent}{_scalar(key)}:", value, here, indent, origins, defaults)


def _entry(
    head: str, value: Any, path: str, indent: str, origins: dict[str, tuple[str, int]], defaults: bool
) -> Iterator[str]:
    if path in origins:
        file, line = origins[path]
        if defaults or file != DEFAULT:
            yield _commented(f"{head} {_scalar(value)}", file, line)
        return
    if isinstance(value, dict):
        lines = list(_mapping(value, path, indent + "  ", origins, defaults))
    else:
        lines = [
            line for i, item in enumerate(value) for line in _item(item, f"{path}[{i}]", indent, origins, defaults)
        ]
    if lines:
        yield head
        yield from lines


def _item(value: Any, path: str, indent: str, origins: dict[str, tuple[str, int]], defaults: bool) -> Iterator[str]:
    if path in origins:
        yield from _entry(f"{indent}  -", value, path, indent, origins, defaults)
        return
    below = indent + "    "
    lines = list(_mapping(value, path, below, origins, defaults))
    for index, line in enumerate(lines):
        yield f"{indent}  - {line[len(below) :]}" if index == 0 else line


def _commented(text: str, file: str, line: int) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {file}:{line}" if line else f"{text:<{_COMMENT_COLUMN}}  # {file}"


def _scalar(value: Any) -> str:
    """YAML for a scalar, an empty list or mapping; JSON's quoting wherever plain text would read as something else."""
    if isinstance(value, str) and _PLAIN.match(value):
        node, _ = read_text(value, "", Path())
        if node is not None and node.value == value:
            return value
    return json.dumps(value, ensure_ascii=False)
