"""``report.json`` of a configuration: per requested symbol its value, who asked and why, and what differs.

Written by the stage ``kernel_config``, read by ``recvirt kernel`` and by the acceptance checks of a running image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recvirt.kconfig.dotconfig import count_values, same_value
from recvirt.kconfig.fragment import Fragment, Request
from recvirt.kconfig.merge import Merged, Wanted
from recvirt.kconfig.resolve import Loss

#: Raised when the meaning of a field changes.
FORMAT = 1


def _asked_by(request: Request) -> dict[str, Any]:
    return {"fragment": request.fragment, "line": request.line, "reason": request.reason, "when": str(request.gate)}


def _entry(wanted: Wanted, values: Mapping[str, str], loss: Loss | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "wanted": wanted.value,
        "value": values.get(wanted.symbol, "n"),
        "fragment": wanted.source,
        "reason": wanted.reason,
        "asked_by": [_asked_by(request) for request in wanted.requests],
    }
    if loss is not None:
        entry["loss"] = {"kind": loss.kind, "detail": loss.detail, "allowed": loss.allowed}
    return entry


def report(
    *,
    mode: str,
    kernel_version: str,
    release: str,
    source: str,
    arch: str,
    fragments: Sequence[Fragment],
    merged: Merged,
    values: Mapping[str, str],
    losses: Sequence[Loss],
) -> dict[str, Any]:
    """The report as JSON-able data. ``mode``: ``resolved`` (our own kernel) or ``audited`` (a stock one)."""
    by_symbol = {loss.symbol: loss for loss in losses}
    return {
        "format": FORMAT,
        "mode": mode,
        "kernel_version": kernel_version,
        "release": release,
        "source": source,
        "arch": arch,
        "fragments": [{"name": f.name, "summary": f.summary, "requests": len(f.requests)} for f in fragments],
        "counts": {**count_values(values), "requested": len(merged.wanted), "lost": len(losses)},
        "symbols": {w.symbol: _entry(w, values, by_symbol.get(w.symbol)) for w in merged.wanted.values()},
        "skipped": [{"symbol": r.symbol, "value": r.value, **_asked_by(r)} for r in merged.skipped],
    }


def audit_losses(merged: Merged, values: Mapping[str, str]) -> list[Loss]:
    """What a stock configuration lacks of what the fragments ask. A module where ``y`` was wanted is told apart: it
    works with an initramfs."""
    found = []
    for wanted in merged.wanted.values():
        value = values.get(wanted.symbol, "n")
        if same_value(value, wanted.value):
            continue
        if wanted.value == "y" and value == "m":
            kind, detail = (
                "module instead of built in",
                "there once its module is loaded (from an initramfs, for a root disk)",
            )
        elif wanted.value == "m" and value == "y":
            kind, detail = "built in instead of module", "there, but its parameters are set on the kernel command line"
        elif wanted.value == "n":
            kind, detail = "on", "the stock kernel has what the fragments leave out"
        else:
            kind, detail = "missing", f"the stock kernel has {value}"
        found.append(Loss(wanted, value, kind, detail))
    return found
