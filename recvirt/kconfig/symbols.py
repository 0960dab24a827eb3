"""An index of a kernel tree's symbols, read from its Kconfig files: where, what type, on what it depends, who
selects it.

It explains; it never decides a value: resolving is left to the tree's own tool, which alone knows every rule. Reads any
tree from 6.12 to 7.x (``depends on A if B`` and ``transitional`` among the newer words).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recvirt.errors import StageError
from recvirt.kconfig.expression import Expr, N, all_of, evaluate, parse_expression
from recvirt.kconfig.fragment import Version

SRCARCH = {"x86_64": "x86", "arm64": "arm64"}
_TYPES = ("bool", "tristate", "string", "int", "hex")
_SOURCE = re.compile(r'^source\s+"?([^"]+?)"?\s*$')
_ENTRY = re.compile(r"^(config|menuconfig)\s+(\w+)\s*$")
_MAKEFILE = re.compile(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)[ \t]*=[ \t]*(\S*)[ \t]*$", re.M)


@dataclass
class Definition:
    """One ``config`` entry (a symbol may have several)."""

    symbol: str
    file: str
    line: int
    type: str = ""
    prompt: str = ""
    depends: Expr | None = None
    selects: list[tuple[str, Expr | None]] = field(default_factory=list)
    help: str = ""
    choice: int = 0  # number of the choice that it is a member of


@dataclass(frozen=True)
class Selector:
    """A symbol that selects another one, under a condition."""

    symbol: str
    condition: Expr | None


@dataclass
class Index:
    """All definitions by name, and the reverse of ``select``."""

    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    selectors: dict[str, list[Selector]] = field(default_factory=dict)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.definitions

    def active_selectors(self, symbol: str, config: Mapping[str, str]) -> list[str]:
        """Who selects ``symbol`` under this configuration."""
        found = []
        for selector in self.selectors.get(symbol, ()):
            on = config.get(selector.symbol, "n") in ("y", "m")
            if on and (selector.condition is None or evaluate(selector.condition, config) > N):
                found.append(selector.symbol)
        return found

    def rivals(self, symbol: str) -> list[str]:
        """The other members of the choice that ``symbol`` belongs to."""
        numbers = {d.choice for d in self.definitions.get(symbol, ()) if d.choice}
        found = (
            name
            for name, definitions in self.definitions.items()
            if name != symbol and any(d.choice in numbers for d in definitions)
        )
        return sorted(found) if numbers else []


def kernel_version(tree: Path) -> tuple[str, Version]:
    """The tree's version as text (``6.12.117``, with ``-rc1`` if there is one) and as numbers."""
    try:
        fields = dict(_MAKEFILE.findall((tree / "Makefile").read_text(encoding="utf-8")))
        numbers = tuple(int(fields[name]) for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
    except (OSError, KeyError, ValueError) as error:
        raise StageError(
            f"{tree} is no kernel tree: its Makefile tells no version", hint="kernel.tree must be the top of one"
        ) from error
    return ".".join(map(str, numbers)) + fields.get("EXTRAVERSION", ""), numbers


@dataclass
class _Reader:
    """Reads Kconfig files recursively. The stack holds the conditions of the open ``if``, ``menu`` and ``choice``."""

    tree: Path
    arch: str
    index: Index = field(default_factory=Index)
    stack: list[tuple[str, Expr | None, int]] = field(default_factory=list)
    current: Definition | None = None
    choices: int = 0

    def read(self, name: str) -> None:
        path = self.tree / name.replace("$(SRCARCH)", SRCARCH[self.arch]).replace("$(HEADER_ARCH)", SRCARCH[self.arch])
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise StageError(f"{self.tree} is no whole kernel tree: {name} is missing") from None
        for number, line, help_text in _logical_lines(text):
            if help_text:
                if self.current is not None:
                    self.current.help = help_text
                continue
            self.statement(line, name, number)
        self.current = None

    def statement(self, line: str, file: str, number: int) -> None:
        if match := _SOURCE.match(line):
            self.current = None
            self.read(match[1])
            return
        if match := _ENTRY.match(line):
            self.open_entry(match[2], file, number)
            return
        word, _, rest = line.partition(" ")
        if word in ("if", "menu", "choice"):
            self.current = None
            self.choices += word == "choice"
            self.stack.append((word, _expression(rest) if word == "if" else None, self.choices))
        elif word in ("endif", "endmenu", "endchoice"):
            self.current = None
            if self.stack:
                self.stack.pop()
        elif word in ("comment", "mainmenu"):
            # A comment may have a "depends on" of its own, which must not become its menu's.
            self.current = Definition("", file, number)
        else:
            self.attribute(word, rest.strip())

    def open_entry(self, symbol: str, file: str, number: int) -> None:
        around = all_of(*(condition for _, condition, _ in self.stack))
        choice = next((n for word, _, n in reversed(self.stack) if word == "choice"), 0)
        self.current = Definition(symbol, file, number, depends=around, choice=choice)
        self.index.definitions.setdefault(symbol, []).append(self.current)

    def attribute(self, word: str, rest: str) -> None:
        if word == "depends" and rest.startswith("on "):
            self.depend(rest[3:])
        if self.current is None:
            return
        if word in _TYPES:
            self.current.type = word
            self.current.prompt = _quoted(rest) or self.current.prompt
        elif word in ("def_bool", "def_tristate"):
            self.current.type = word.removeprefix("def_")
        elif word == "prompt":
            self.current.prompt = _quoted(rest)
        elif word == "select":
            target, _, condition = rest.partition(" if ")
            self.current.selects.append((target.strip(), _expression(condition)))

    def depend(self, text: str) -> None:
        expr = _conditional(text)
        if self.current is not None:
            self.current.depends = all_of(self.current.depends, expr)
        elif self.stack:
            word, condition, number = self.stack[-1]
            self.stack[-1] = (word, all_of(condition, expr), number)

    def finish(self) -> Index:
        for definitions in self.index.definitions.values():
            for definition in definitions:
                for target, condition in definition.selects:
                    self.index.selectors.setdefault(target, []).append(Selector(definition.symbol, condition))
        return self.index


def _quoted(text: str) -> str:
    match = re.match(r'"((?:[^"\\]|\\.)*)"', text)
    return match[1] if match else ""


def _expression(text: str) -> Expr | None:
    stripped = text.strip()
    return parse_expression(stripped) if stripped else None


def _conditional(text: str) -> Expr | None:
    """``A if B`` (since 7.0) means ``A || !B``."""
    head, _, condition = text.partition(" if ")
    expr = _expression(head)
    if not condition or expr is None:
        return expr
    return Expr("or", (expr, Expr("not", (parse_expression(condition),))))


def _without_comment(line: str) -> str:
    quote = ""
    for at, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "#":
            return line[:at]
    return line


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


def _logical_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, statement, help text): continuation lines joined, comments dropped, help texts handed out whole."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        at += 1
        while line.endswith("\\") and at < len(lines):
            line, at = line[:-1] + " " + lines[at].strip(), at + 1
        statement = " ".join(_without_comment(line).split())
        if statement == "help":
            at, body = _help_text(lines, at)
            yield start + 1, "", body or " "
        elif statement and not re.match(r"^[\w-]+\s*:?=", statement) and not statement.startswith("$("):
            yield start + 1, statement, ""


def _help_text(lines: list[str], at: int) -> tuple[int, str]:
    """The help that begins in ``lines[at]``: it ends before the first line that is indented less than its first."""
    body: list[str] = []
    indent = -1
    while at < len(lines):
        if lines[at].strip():
            here = _indent(lines[at])
            if indent < 0:
                indent = here
            if here < indent or indent == 0:
                break
        body.append(lines[at].strip())
        at += 1
    return at, "\n".join(body).strip()


def read_index(tree: Path, arch: str = "x86_64") -> Index:
    """Read every Kconfig file of an architecture, from the top. Raises StageError if the tree is not whole."""
    reader = _Reader(tree, arch)
    try:
        reader.read("Kconfig")
    except ValueError as error:
        raise StageError(f"the Kconfig files of {tree} can't be read: {error}") from error
    return reader.finish()
