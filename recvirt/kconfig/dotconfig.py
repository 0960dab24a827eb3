"""``.config`` files: reading, comparing. A symbol that is not there has the value ``n``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SET = re.compile(r"^CONFIG_(\w+)=(.*)$")
_UNSET = re.compile(r"^# CONFIG_(\w+) is not set$")


def parse_dotconfig(text: str) -> dict[str, str]:
    """Symbol to value; what the file names as not set is there with ``n``, what it does not name is absent."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _SET.match(line):
            found[match[1]] = match[2].strip()
        elif match := _UNSET.match(line):
            found[match[1]] = "n"
    return found


def same_value(one: str, other: str) -> bool:
    """Whether two spellings mean the same: ``0x40`` and ``64`` do."""
    if one == other:
        return True
    try:
        return int(one, 0) == int(other, 0)
    except ValueError:
        return False


def count_values(config: Mapping[str, str]) -> dict[str, int]:
    """How many symbols are ``y`` and ``m``: the usual measure of a configuration's size."""
    return {value: sum(v == value for v in config.values()) for value in ("y", "m")}


@dataclass(frozen=True)
class Difference:
    """One symbol that two configurations set differently (``n`` when it is not set)."""

    symbol: str
    left: str
    right: str


def compare(left: Mapping[str, str], right: Mapping[str, str]) -> list[Difference]:
    """Every symbol whose value differs, by name."""
    return [
        Difference(symbol, left.get(symbol, "n"), right.get(symbol, "n"))
        for symbol in sorted(set(left) | set(right))
        if not same_value(left.get(symbol, "n"), right.get(symbol, "n"))
    ]
