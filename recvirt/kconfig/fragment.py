"""Fragments: one topic of kernel configuration a file, each group of symbols with its reason.

The syntax, strict so that nothing is passed over silently::

    # The topic of the file, in its first comment.

    # The reason of this group. It belongs to all lines below it, up to the next blank line.
    CONFIG_KVM=m
    CONFIG_HYPERV_VMBUS=y  # since 6.18
    CONFIG_NFS_V4_1=y  # until 7.0 arch x86_64

Values are ``y``, ``m``, ``n`` (also for "not visible at all"), a number or a "string". Behind the value stand at most
one each of ``since VERSION`` (from that version on), ``until VERSION`` (up to, not including it) and ``arch NAME``.
Does not own: conflicts between fragments (:mod:`recvirt.kconfig.merge`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.errors import ConfigError, Problem

Version = tuple[int, ...]

_SYMBOL_LINE = re.compile(r"^CONFIG_(?P<symbol>[A-Za-z0-9_]+)=(?P<rest>.*)$")
_VALUE = re.compile(r'^(?P<value>y|m|n|-?\d+|0[xX][0-9a-fA-F]+|"(?:[^"\\]|\\.)*")(?P<rest>\s.*)?$')
_NOT_SET = re.compile(r"^#\s*CONFIG_(\w+) is not set")
_COMMENTED_OUT = re.compile(r"^#+\s*CONFIG_\w+=")
_VERSION = re.compile(r"^\d+(\.\d+){1,2}$")
_ARCHS = ("x86_64", "arm64")


def parse_version(text: str) -> Version:
    """``6.12.117`` as ``(6, 12, 117)``. ValueError for anything else (``-rc1`` and the like are cut off before)."""
    if not _VERSION.match(text):
        raise ValueError(f"{text!r} is not a kernel version, as 6.12 or 6.12.117")
    return tuple(int(part) for part in text.split("."))


@dataclass(frozen=True)
class Gate:
    """For which kernels a line is meant: ``since <= version < until``, and one architecture or all."""

    since: Version | None = None
    until: Version | None = None
    arch: str | None = None

    def admits(self, version: Version, arch: str) -> bool:
        """Whether a kernel of this version and architecture is meant."""
        if self.since is not None and version < self.since:
            return False
        if self.until is not None and version >= self.until:
            return False
        return self.arch is None or self.arch == arch

    def __str__(self) -> str:
        words = []
        for name, value in (("since", self.since), ("until", self.until)):
            if value is not None:
                words.append(f"{name} {'.'.join(map(str, value))}")
        if self.arch:
            words.append(f"arch {self.arch}")
        return " ".join(words)


@dataclass(frozen=True)
class Request:
    """One line of a fragment: what it wants, why, and where it stands. ``value`` is spelled as in ``.config``."""

    symbol: str
    value: str
    fragment: str
    line: int
    reason: str
    gate: Gate = Gate()


@dataclass(frozen=True)
class Fragment:
    """A parsed fragment. ``name`` is the file's name without ``.config``; ``summary`` its first comment."""

    name: str
    summary: str
    requests: tuple[Request, ...]


@dataclass
class _Parser:
    """Reads one file line by line and keeps every fault."""

    name: str
    file: str
    problems: list[Problem] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    comment: list[str] = field(default_factory=list)
    summary: str = ""
    in_group: bool = False

    def fault(self, line: int, message: str, symbol: str = "") -> None:
        self.problems.append(Problem(self.file, line, f"CONFIG_{symbol}" if symbol else "", message))

    def blank(self) -> None:
        if self.comment and not self.in_group and not self.summary:
            self.summary = " ".join(self.comment)
        self.comment, self.in_group = [], False

    def comment_line(self, number: int, text: str) -> None:
        if match := _NOT_SET.match(text):
            self.fault(number, f"a comment sets nothing here: write CONFIG_{match[1]}=n", match[1])
        elif _COMMENTED_OUT.match(text):
            self.fault(number, "a line that is commented out says nothing: delete it")
        elif self.in_group:
            self.fault(number, "a new reason needs a blank line before it")
        else:
            self.comment.append(text.lstrip("#").strip())

    def symbol_line(self, number: int, symbol: str, rest: str) -> None:
        match = _VALUE.match(rest)
        if not match:
            self.fault(number, f'{rest.split("#")[0].strip()!r} is no value: y, m, n, a number or a "string"', symbol)
            return
        gate = self.gate(number, symbol, (match["rest"] or "").strip())
        self.in_group = True
        if not self.comment:
            self.fault(number, "has no reason: put a comment above its group", symbol)
        if gate is not None:
            reason = " ".join(self.comment)
            self.requests.append(Request(symbol, match["value"], self.name, number, reason, gate))

    def gate(self, number: int, symbol: str, text: str) -> Gate | None:
        if not text:
            return Gate()
        words = text.removeprefix("#").split()
        if not text.startswith("#") or len(words) % 2:
            self.fault(
                number, f"{text!r} is not understood: since VERSION, until VERSION or arch NAME behind a #", symbol
            )
            return None
        given: dict[str, str] = {}
        for key, value in zip(words[::2], words[1::2], strict=True):
            if key not in ("since", "until", "arch") or key in given:
                self.fault(number, f"{key!r} is not one of since, until, arch (once each)", symbol)
                return None
            given[key] = value
        return self.made_gate(number, symbol, given)

    def made_gate(self, number: int, symbol: str, given: dict[str, str]) -> Gate | None:
        try:
            since = parse_version(given["since"]) if "since" in given else None
            until = parse_version(given["until"]) if "until" in given else None
        except ValueError as error:
            self.fault(number, str(error), symbol)
            return None
        if since is not None and until is not None and since >= until:
            self.fault(number, "holds for no version: since is not before until", symbol)
        if given.get("arch", _ARCHS[0]) not in _ARCHS:
            self.fault(number, f"{given['arch']!r} is not a known architecture: {', '.join(_ARCHS)}", symbol)
        return Gate(since, until, given.get("arch"))

    def check_repeats(self) -> None:
        seen: dict[tuple[str, Gate], Request] = {}
        for request in self.requests:
            key = (request.symbol, request.gate)
            if key in seen:
                self.fault(request.line, f"stands already in line {seen[key].line}", request.symbol)
            seen.setdefault(key, request)


def parse_fragment(text: str, name: str, file: str | None = None) -> Fragment:
    """Parse a fragment's text. ``file`` is what problems name. Raises ConfigError with every fault."""
    parser = _Parser(name, file or f"{name}.config")
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.rstrip()
        if not line:
            parser.blank()
        elif line.startswith("#"):
            parser.comment_line(number, line)
        elif match := _SYMBOL_LINE.match(line):
            parser.symbol_line(number, match["symbol"], match["rest"])
        else:
            parser.fault(number, f"{line!r} is neither CONFIG_NAME=value nor a comment")
    parser.blank()
    parser.check_repeats()
    if not parser.summary:
        parser.fault(1, "its topic is not said: begin with a comment and a blank line")
    if not parser.requests and not parser.problems:
        parser.fault(0, "asks for nothing")
    if parser.problems:
        raise ConfigError(parser.problems, hint="docs/kernel.md describes the syntax of fragments")
    return Fragment(name, parser.summary, tuple(parser.requests))


def load_fragments(files: Iterable[tuple[str, Path]]) -> tuple[Fragment, ...]:
    """Read fragments, given as (name, path) in order. Raises ConfigError with every fault of all files."""
    problems: list[Problem] = []
    found: list[Fragment] = []
    for name, path in files:
        try:
            found.append(parse_fragment(path.read_text(encoding="utf-8"), name, str(path)))
        except OSError as error:
            problems.append(Problem(str(path), 0, "", f"can't be read: {error.strerror}"))
        except UnicodeDecodeError as error:
            problems.append(Problem(str(path), 0, "", f"is not UTF-8 (byte {error.start})"))
        except ConfigError as error:
            problems += error.problems
    _check_names(found, problems)
    if problems:
        raise ConfigError(problems, hint="docs/kernel.md describes the syntax of fragments")
    return tuple(found)


def _check_names(fragments: Sequence[Fragment], problems: list[Problem]) -> None:
    names = [fragment.name for fragment in fragments]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"{name}.config", 0, "", "is named twice; two fragments need two names"))
