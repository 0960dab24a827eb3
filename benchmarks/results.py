"""What a benchmark found: rows of a table, and the facts behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True)
class Row:
    """One line: ``mine`` and ``other`` are figures with their unit; ``met`` is None when there is no target."""

    what: str
    mine: str
    other: str
    relation: str
    target: str
    met: bool | None
    note: str = ""

    @classmethod
    def ratio(cls, what: str, mine: float, other: float, unit: str, limit: float | None, note: str = "") -> Row:
        """``mine`` against ``other``, at most ``limit`` times it."""
        value = mine / other
        target = "" if limit is None else f"at most {limit * 100:.0f} %"
        met = None if limit is None else value <= limit
        return cls(what, figure(mine, unit), figure(other, unit), f"{value * 100:.1f} %", target, met, note)

    @classmethod
    def limit(cls, what: str, mine: float, unit: str, limit: float, note: str = "") -> Row:
        """A figure that has to stay below ``limit``."""
        return cls(what, figure(mine, unit), "", "", f"below {limit:g} {unit}", mine < limit, note)

    @classmethod
    def figure(cls, what: str, mine: float, unit: str, note: str = "") -> Row:
        """A figure without a target."""
        return cls(what, figure(mine, unit), "", "", "", None, note)


def figure(value: float, unit: str) -> str:
    """A figure with three digits or so, and its unit."""
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


@dataclass(frozen=True)
class Result:
    """One benchmark's rows, and everything that was measured for them."""

    name: str
    rows: Sequence[Row]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return {"name": self.name, "rows": [asdict(row) for row in self.rows], "facts": self.facts}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Result:
        """Back from results.json."""
        return cls(data["name"], [Row(**row) for row in data["rows"]], data.get("facts", {}))


def markdown(results: Sequence[Result], machine: str) -> str:
    """The table. A missed target is said in words, not hidden."""
    lines = ["| | recvirt | compared with | ratio | target | |", "|---|---:|---:|---:|---|---|"]
    for row in (row for result in results for row in result.rows):
        verdict = {True: "met", False: "**missed**", None: ""}[row.met]
        last = "; ".join(part for part in (verdict, row.note) if part)
        lines.append(f"| {row.what} | {row.mine} | {row.other} | {row.relation} | {row.target} | {last} |")
    return "\n".join([*lines, "", machine]) + "\n"


def insert(text: str, table: str) -> str:
    """``text`` with ``table`` between the two marks. ValueError when a mark is missing, double or out of order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"there must be one {BEGIN} and after it one {END}")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}{END}{tail}"
