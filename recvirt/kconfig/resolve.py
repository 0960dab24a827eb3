"""Resolving what is wanted with the kernel tree's own tool, and saying what became of each wish.

The base is ``allnoconfig``: what no fragment asks for is off. The result is read back and every symbol compared; a
difference is classified (unknown symbol, unmet dependency, forced by a select, another choice) and fatal unless the
profile allows it by name with a reason. An allowance that nothing needed is a fault too, so that the list never rots.
Does not own: where the tree comes from, and the order of stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recvirt.errors import ConfigError, Problem, StageError
from recvirt.kconfig.dotconfig import parse_dotconfig, same_value
from recvirt.kconfig.expression import Y, level_of, name_of, unmet
from recvirt.kconfig.fragment import Version, parse_version
from recvirt.kconfig.merge import Merged, Wanted, allconfig_text
from recvirt.kconfig.symbols import Index
from recvirt.sandbox import ToolsRoot

#: A kernel's bytes must not depend on where it was built: these are its paths inside the sandbox, everywhere.
INSIDE_SOURCE = Path("/kernel/source")
INSIDE_BUILD = Path("/kernel/build")
WANTED_FILE = "wanted.config"

UNKNOWN = "unknown symbol"
UNMET = "unmet dependency"
FORCED = "forced by a select"
RIVAL = "another choice"
RANGE = "out of range or not settable"

_UNKNOWN_LINE = re.compile(r"unknown symbol: (\w+)")
_WARNING = re.compile(r"warning: (?!unknown symbol)(.*)")


@dataclass(frozen=True)
class Allowed:
    """A profile's allowance: this symbol may differ, for this reason, on these versions."""

    symbol: str
    reason: str
    since: str | None = None
    until: str | None = None

    def applies_to(self, version: Version) -> bool:
        """Whether the kernel's version is meant. Raises ValueError for a bound that is no version."""
        if self.since and version < parse_version(self.since):
            return False
        return not (self.until and version >= parse_version(self.until))


@dataclass(frozen=True)
class Loss:
    """A wish that did not come true."""

    wanted: Wanted
    value: str
    kind: str
    detail: str
    allowed: str = ""  # the allowance's reason

    @property
    def symbol(self) -> str:
        """The symbol's name."""
        return self.wanted.symbol


@dataclass(frozen=True)
class Resolved:
    """The tool's answer: the text of ``.config``, its values, and the symbols that it does not know."""

    text: str
    values: Mapping[str, str]
    unknown: frozenset[str]


def make_argv(arch: str, *words: str, jobs: int | None = None) -> list[str]:
    """``make`` in the fixed paths of the sandbox."""
    parallel = [f"-j{jobs}"] if jobs else []
    return ["make", "-C", str(INSIDE_SOURCE), f"O={INSIDE_BUILD}", f"ARCH={arch}", *parallel, *words]


def resolve(tree: Path, merged: Merged, tools: ToolsRoot, build_dir: Path, log: Path, arch: str = "x86_64") -> Resolved:
    """Let the tree's own tool resolve, in the empty folder ``build_dir``. Raises CommandError, StageError."""
    (build_dir / WANTED_FILE).write_text(allconfig_text(merged))
    said: list[str] = []
    wishes = f"KCONFIG_ALLCONFIG={INSIDE_BUILD / WANTED_FILE}"
    argv = make_argv(arch, "-s", wishes, "KCONFIG_WARN_UNKNOWN_SYMBOLS=1", "allnoconfig")
    run_make(tools, tree, build_dir, log, said.append, argv)
    strange = [match[1] for line in said if (match := _WARNING.search(line))]
    if strange:
        raise StageError("the kernel's configuration tool warns:\n  " + "\n  ".join(strange), hint=f"the log: {log}")
    unknown = frozenset(match[1] for line in said if (match := _UNKNOWN_LINE.search(line)))
    text = (build_dir / ".config").read_text(encoding="utf-8")
    return Resolved(text, parse_dotconfig(text), unknown)


def run_make(
    tools: ToolsRoot, tree: Path, build_dir: Path, log: Path, on_line: Callable[[str], None], argv: Sequence[str]
) -> None:
    """Run a ``make`` of :func:`make_argv`: the tree read-only, ``build_dir`` writable, at the fixed paths."""
    tools.run(
        argv, writable_at={INSIDE_BUILD: build_dir}, cover={INSIDE_SOURCE: tree}, cwd=INSIDE_BUILD,
        log_path=log, on_line=on_line,
    )  # fmt: skip


def find_losses(merged: Merged, resolved: Resolved, read_index: Callable[[], Index]) -> list[Loss]:
    """Every wanted symbol whose final value differs. ``read_index`` is called only if there is one (it takes a
    second)."""
    missed = [
        wanted
        for wanted in merged.wanted.values()
        # An unknown symbol is a fault even when "n" was wanted: a renamed one may be on by another name.
        if wanted.symbol in resolved.unknown or not same_value(resolved.values.get(wanted.symbol, "n"), wanted.value)
    ]
    if not missed:
        return []
    index = read_index()
    return [_loss(wanted, resolved, index) for wanted in missed]


def _loss(wanted: Wanted, resolved: Resolved, index: Index) -> Loss:
    value = resolved.values.get(wanted.symbol, "n")
    kind, detail = classify(wanted.symbol, wanted.value, value, resolved, index)
    return Loss(wanted, value, kind, detail)


def classify(symbol: str, wanted: str, value: str, resolved: Resolved, index: Index) -> tuple[str, str]:
    """Why ``symbol`` is not what was wanted: the kind, and the words for a person."""
    if symbol in resolved.unknown or symbol not in index:
        return UNKNOWN, "this kernel has no such symbol (renamed, removed, or of another version: since, until)"
    tristate = wanted in ("y", "m", "n") and value in ("y", "m", "n")
    if tristate and level_of(value) > level_of(wanted):
        selectors = index.active_selectors(symbol, resolved.values)
        if selectors:
            return FORCED, f"selected by {', '.join(sorted(selectors))}"
    level = level_of(wanted) if tristate else Y
    broken = _unmet_text(symbol, level, resolved, index)
    if broken:
        return UNMET, broken
    chosen = [name for name in index.rivals(symbol) if resolved.values.get(name) == "y"]
    if chosen:
        return RIVAL, f"the choice fell on {', '.join(chosen)}"
    return RANGE, _settable_text(symbol, index)


def _unmet_text(symbol: str, level: int, resolved: Resolved, index: Index) -> str:
    """What keeps the symbol down, for the definition that comes nearest; empty if one definition's needs are met."""
    best: list[str] | None = None
    for definition in index.definitions[symbol]:
        broken = [str(part) for part in unmet(definition.depends, resolved.values, level)]
        if not broken:
            return ""
        if best is None or len(broken) < len(best):
            best = broken
    return f"needs {name_of(level)} from: {'; '.join(best)}" if best else ""


def _settable_text(symbol: str, index: Index) -> str:
    if not any(definition.prompt for definition in index.definitions[symbol]):
        return "it has no prompt: only other symbols set it (ask for those)"
    return "the tool chose another value: out of its range, or its prompt has a condition that does not hold"


def apply_allowances(losses: Sequence[Loss], allowed: Sequence[Allowed], version: Version) -> list[Loss]:
    """The losses, the allowed ones marked. Raises ConfigError with every loss that is not allowed and every allowance
    that nothing needed."""
    meant = {item.symbol: item for item in allowed if item.applies_to(version)}
    result: list[Loss] = []
    problems: list[Problem] = []
    for loss in losses:
        if loss.symbol in meant:
            result.append(Loss(loss.wanted, loss.value, loss.kind, loss.detail, meant[loss.symbol].reason))
            continue
        result.append(loss)
        request = loss.wanted.requests[0] if loss.wanted.requests else None
        file = f"{request.fragment}.config" if request and not loss.wanted.overridden else "profile: kernel.overrides"
        problems.append(
            Problem(
                file, request.line if request and not loss.wanted.overridden else 0, f"CONFIG_{loss.symbol}",
                f"wanted {loss.wanted.value}, got {loss.value}: {loss.kind}: {loss.detail}",
            )
        )  # fmt: skip
    needed = {loss.symbol for loss in losses}
    for item in allowed:
        if item.symbol in meant and item.symbol not in needed:
            problems.append(
                Problem("profile: kernel.allow", 0, f"CONFIG_{item.symbol}", "nothing needed this allowance: remove it")
            )
    if problems:
        raise ConfigError(
            problems,
            hint="correct the fragment (since/until for a version), or allow the loss by name: "
            "kernel.allow: [{symbol: X, reason: ...}]",
        )
    return result
