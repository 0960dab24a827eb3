"""Package lists: one purpose a file, one package a line, a reason in the comment.

A line is ``NAME [SUITE ...]  # why``: the brackets name the only suites that get the package. Owns the syntax. Does not
own: which packages a suite has (``archive``), or which lists a profile uses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import ConfigError, Problem

#: Debian Policy 5.6.1: lower case letters, digits, + - and ., two characters at least.
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
SUITES = ("bookworm", "trixie", "sid")
_LINE = re.compile(r"(?P<name>\S+?)\s*(?:\[(?P<suites>[^\]]*)\])?")


@dataclass(frozen=True)
class Entry:
    """One package of a list; ``suites`` is empty when every suite gets it. ``line`` counts from 1."""

    name: str
    suites: tuple[str, ...]
    line: int

    def wanted_in(self, suite: str) -> bool:
        """Whether ``suite`` gets the package."""
        return not self.suites or suite in self.suites


def parse_list(text: str, file: str) -> tuple[tuple[Entry, ...], tuple[Problem, ...]]:
    """The entries of one list, and everything that is wrong with it."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, raw in enumerate(text.splitlines(), 1):
        words = raw.split("#", 1)[0].strip()
        if not words:
            continue
        entry, faults = _parse_line(words, number)
        faults += _repeated(entry, entries) if entry else []
        problems += [Problem(file, number, "", fault) for fault in faults]
        if entry and not faults:
            entries.append(entry)
    if not entries and not problems:
        problems.append(Problem(file, 0, "", "the list names no package"))
    return tuple(entries), tuple(problems)


def _parse_line(words: str, number: int) -> tuple[Entry | None, list[str]]:
    match = _LINE.fullmatch(words)
    if not match:
        return None, [f"{words!r} is not a package name with suites in brackets, as: name [trixie sid]"]
    name, faults = match["name"], []
    if not PACKAGE_NAME.fullmatch(name):
        faults.append(f"{name!r} is not a Debian package name")
    suites = tuple((match["suites"] or "").split())
    if match["suites"] is not None and not suites:
        faults.append(f"{name}: the brackets are empty")
    faults += [
        f"{name}: {suite!r} is not one of the suites {', '.join(SUITES)}" for suite in suites if suite not in SUITES
    ]
    return Entry(name, suites, number), faults


def _repeated(entry: Entry, before: Sequence[Entry]) -> list[str]:
    for other in before:
        both_may_be_read = not other.suites or not entry.suites or set(other.suites) & set(entry.suites)
        if other.name == entry.name and both_may_be_read:
            return [f"{entry.name} is in line {other.line} already"]
    return []


def read_lists(paths: Sequence[Path], suite: str) -> tuple[str, ...]:
    """The packages that the lists ask of ``suite``, without repeats, sorted.

    Raises ConfigError with every problem of every list.
    """
    names: set[str] = set()
    problems: list[Problem] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            problems.append(Problem(str(path), 0, "", "there is no such package list"))
            continue
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(str(path), 0, "", f"can't be read: {error}"))
            continue
        entries, faults = parse_list(text, str(path))
        problems += faults
        names |= {entry.name for entry in entries if entry.wanted_in(suite)}
    if problems:
        raise ConfigError(problems, hint="a line is: NAME [SUITE ...]   # why")
    return tuple(sorted(names))
