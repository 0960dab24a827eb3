"""Many fragments into one set of wanted values; two that contradict each other are a fault, not a matter of order.

Does not own: whether the kernel can give what is wanted (:mod:`recvirt.kconfig.resolve`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recvirt.errors import ConfigError, Problem
from recvirt.kconfig.fragment import Fragment, Request, Version


@dataclass(frozen=True)
class Wanted:
    """One symbol's wanted value and every line that asked. ``overridden``: the profile decided, not the fragments."""

    symbol: str
    value: str
    requests: tuple[Request, ...]
    overridden: bool = False

    @property
    def source(self) -> str:
        """Who decided: the first fragment that asked, or the profile."""
        if self.overridden or not self.requests:
            return "profile"
        return self.requests[0].fragment

    @property
    def reason(self) -> str:
        """Why, in the fragment's own words."""
        if self.overridden:
            return "an override of the profile"
        return self.requests[0].reason


@dataclass(frozen=True)
class Merged:
    """What is wanted of one kernel. ``skipped`` are lines meant for other versions or architectures."""

    wanted: Mapping[str, Wanted]
    skipped: tuple[Request, ...]


def spelled(value: str) -> str:
    """A profile's value as ``.config`` spells it: words that are no tristate or number become strings."""
    digits = value.removeprefix("-")
    if value in ("y", "m", "n") or digits.isdigit() or value.startswith('"'):
        return value
    if value[:2].lower() == "0x":
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def merge(
    fragments: Sequence[Fragment], overrides: Mapping[str, str], version: Version, arch: str = "x86_64"
) -> Merged:
    """Merge for one kernel. The same value twice is fine; two values are a fault unless ``overrides`` decides.

    Raises ConfigError with every conflict, each naming both places.
    """
    asked: dict[str, list[Request]] = {}
    skipped: list[Request] = []
    for fragment in fragments:
        for request in fragment.requests:
            if request.gate.admits(version, arch):
                asked.setdefault(request.symbol, []).append(request)
            else:
                skipped.append(request)
    problems: list[Problem] = []
    wanted: dict[str, Wanted] = {}
    for symbol, requests in asked.items():
        if symbol in overrides:
            continue
        problems += _conflicts(symbol, requests)
        wanted[symbol] = Wanted(symbol, requests[0].value, tuple(requests))
    for symbol, value in overrides.items():
        wanted[symbol] = Wanted(symbol, spelled(value), tuple(asked.get(symbol, ())), overridden=True)
    if problems:
        raise ConfigError(
            problems, hint="leave one of the fragments out, or decide in the profile: kernel.overrides: {SYMBOL: value}"
        )
    return Merged(dict(sorted(wanted.items())), tuple(skipped))


def _conflicts(symbol: str, requests: Sequence[Request]) -> list[Problem]:
    first = requests[0]
    return [
        Problem(
            f"{other.fragment}.config", other.line, f"CONFIG_{symbol}",
            f"={other.value} contradicts ={first.value} in {first.fragment}.config:{first.line}",
        )
        for other in requests[1:]
        if other.value != first.value
    ]  # fmt: skip


def allconfig_text(merged: Merged) -> str:
    """The wanted values as a ``KCONFIG_ALLCONFIG`` file (Documentation/kbuild/kconfig.rst)."""
    lines = [
        f"# CONFIG_{w.symbol} is not set" if w.value == "n" else f"CONFIG_{w.symbol}={w.value}"
        for w in merged.wanted.values()
    ]
    return "\n".join(lines) + "\n"
