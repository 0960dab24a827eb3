"""Tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import click

from recvirt.nestedcloud.statuses import ExitStatus

Column = tuple[str, str]


def human_bytes(count: int | None) -> str:
    """Binary units, as memory and disks are asked for."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_bytes(text: str) -> int:
    """``512M``, ``2G``, ``2GiB`` or plain bytes. ValueError otherwise."""
    units = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
    lowered = text.strip().lower().removesuffix("b").removesuffix("i")
    number = lowered.rstrip("kmgt")
    unit = lowered[len(number) :]
    if unit not in units or not number.replace(".", "", 1).isdecimal():
        raise ValueError(f"{text!r} is no size: 512M, 2G, ...")
    return int(float(number) * units[unit])


def cell(value: Any, name: str) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return human_bytes(int(value))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], *, as_json: bool) -> None:
    """Print rows; ``columns`` are (title, field)."""
    found = list(rows)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    lines = [[title for title, _ in columns], *([cell(row.get(name), name) for _, name in columns] for row in found)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def fields(row: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one thing."""
    if as_json:
        click.echo(json.dumps(row, indent=1))
        return
    width = max(len(name) for name in row)
    for name, value in row.items():
        text = json.dumps(value) if isinstance(value, dict) else cell(value, name)
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {text}")


def fail(message: str, hint: str, status: ExitStatus) -> NoReturn:
    """An error as one line, what to do about it, and the end."""
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(status)
