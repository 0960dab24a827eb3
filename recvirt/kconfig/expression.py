"""Kconfig expressions: parsing, tristate evaluation, and the parts of a conjunction that do not hold.

Grammar: Documentation/kbuild/kconfig-language.rst. Macros (``$(...)``) ask the compiler; they count as true here,
because this module only explains what the tree's own tool decided.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

N, M, Y = 0, 1, 2
_LEVELS = {"n": N, "m": M, "y": Y}
_NAMES = "nmy"
_TOKEN = re.compile(r'\s*(&&|\|\||!=|<=|>=|[()!=<>]|"(?:[^"\\]|\\.)*"|\'[^\']*\'|[A-Za-z0-9_./-]+)')


@dataclass(frozen=True)
class Expr:
    """A node: ``op`` is ``and``, ``or``, ``not``, ``cmp`` or ``atom``. ``text`` holds an atom, or a comparison's
    sign."""

    op: str
    args: tuple[Expr, ...] = ()
    text: str = ""

    def __str__(self) -> str:
        if self.op == "atom":
            return self.text
        if self.op == "cmp":
            return f"{self.args[0]}{self.text}{self.args[1]}"
        if self.op == "not":
            return f"!{_wrapped(self.args[0], 'or', 'and')}"
        if self.op == "and":
            return " && ".join(_wrapped(arg, "or") for arg in self.args)
        return " || ".join(str(arg) for arg in self.args)


def _wrapped(expr: Expr, *ops: str) -> str:
    return f"({expr})" if expr.op in ops else str(expr)


def level_of(value: str) -> int:
    """A tristate as a number (0, 1, 2); anything that is not one counts as 0, as Kconfig does."""
    return _LEVELS.get(value, N)


def name_of(level: int) -> str:
    """A number as ``n``, ``m`` or ``y``."""
    return _NAMES[level]


def all_of(*parts: Expr | None) -> Expr | None:
    """The conjunction of what is there; None if nothing is."""
    present = tuple(part for part in parts if part is not None)
    if len(present) <= 1:
        return present[0] if present else None
    return Expr("and", present)


def split_macros(text: str) -> list[str]:
    """Tokens of an expression; a macro with its nested parentheses is one token."""
    tokens: list[str] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text.startswith("$(", at):
            end = _macro_end(text, at)
            tokens.append(text[at:end])
            at = end
        elif match := _TOKEN.match(text, at):
            tokens.append(match[1])
            at = match.end()
        else:
            raise ValueError(f"{text[at:]!r} is not understood in the expression {text!r}")
    return tokens


def _macro_end(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0 and at > start:
            return at + 1
    raise ValueError(f"{text!r}: a macro does not end")


def parse_expression(text: str) -> Expr:
    """Parse an expression; ValueError if it is none."""
    tokens = split_macros(text)
    expr, rest = _or(tokens)
    if rest:
        raise ValueError(f"{' '.join(rest)!r} is left over in the expression {text!r}")
    return expr


def _or(tokens: list[str]) -> tuple[Expr, list[str]]:
    first, rest = _and(tokens)
    parts = [first]
    while rest and rest[0] == "||":
        part, rest = _and(rest[1:])
        parts.append(part)
    return (Expr("or", tuple(parts)) if len(parts) > 1 else first), rest


def _and(tokens: list[str]) -> tuple[Expr, list[str]]:
    first, rest = _not(tokens)
    parts = [first]
    while rest and rest[0] == "&&":
        part, rest = _not(rest[1:])
        parts.append(part)
    return (Expr("and", tuple(parts)) if len(parts) > 1 else first), rest


def _not(tokens: list[str]) -> tuple[Expr, list[str]]:
    if tokens and tokens[0] == "!":
        inner, rest = _not(tokens[1:])
        return Expr("not", (inner,)), rest
    if tokens and tokens[0] == "(":
        inner, rest = _or(tokens[1:])
        if not rest or rest[0] != ")":
            raise ValueError("a parenthesis is not closed")
        return inner, rest[1:]
    return _comparison(tokens)


def _comparison(tokens: list[str]) -> tuple[Expr, list[str]]:
    if not tokens or tokens[0] in ("&&", "||", ")", "=", "!="):
        raise ValueError("an operand is missing")
    left = Expr("atom", text=tokens[0])
    if len(tokens) >= 3 and tokens[1] in ("=", "!=", "<", ">", "<=", ">="):
        return Expr("cmp", (left, Expr("atom", text=tokens[2])), tokens[1]), tokens[3:]
    return left, tokens[1:]


def evaluate(expr: Expr, config: Mapping[str, str]) -> int:
    """The tristate value under a whole configuration."""
    if expr.op == "and":
        return min(evaluate(arg, config) for arg in expr.args)
    if expr.op == "or":
        return max(evaluate(arg, config) for arg in expr.args)
    if expr.op == "not":
        return Y - evaluate(expr.args[0], config)
    if expr.op == "cmp":
        return Y if _compare(expr, config) else N
    if expr.text.startswith("$("):
        return Y
    return level_of(_text_of(expr.text, config))


def _text_of(atom: str, config: Mapping[str, str]) -> str:
    if atom[0] in "\"'":
        return atom[1:-1]
    if atom in _LEVELS:
        return atom
    # A name that no configuration sets is "n"; a bare number stands for itself.
    return config.get(atom, atom if atom.lstrip("-").isdigit() else "n").strip('"')


def _compare(expr: Expr, config: Mapping[str, str]) -> bool:
    if any(arg.text.startswith("$(") for arg in expr.args):
        return True
    left, right = (_text_of(arg.text, config) for arg in expr.args)
    if expr.text == "=":
        return left == right
    if expr.text == "!=":
        return left != right
    try:
        one, two = int(left, 0), int(right, 0)
    except ValueError:
        return False
    return {"<": one < two, ">": one > two, "<=": one <= two, ">=": one >= two}[expr.text]


def unmet(expr: Expr | None, config: Mapping[str, str], wanted: int) -> Iterator[Expr]:
    """The conjuncts whose value is below ``wanted``: what keeps a symbol from it."""
    if expr is None:
        return
    if expr.op == "and":
        for arg in expr.args:
            yield from unmet(arg, config, wanted)
    elif evaluate(expr, config) < wanted:
        yield expr


def names_in(expr: Expr | None) -> Iterator[str]:
    """Every symbol that an expression mentions, in order."""
    if expr is None:
        return
    if expr.op == "atom":
        if expr.text[0] not in "\"'$" and expr.text not in _LEVELS and not expr.text.isdigit():
            yield expr.text
        return
    for arg in expr.args:
        yield from names_in(arg)
