"""What a run would do, told before anything is sent: a table for people, JSON for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from recvirt.ui import format_bytes

#: ``exists``: is there and stays. ``print``: a recipe is written, nothing is sent. The rest changes something.
Action = Literal["exists", "convert", "upload", "create", "replicate", "share", "retire", "print"]
_IDLE: tuple[Action, ...] = ("exists", "print")


@dataclass(frozen=True)
class Step:
    """One thing that is there or would be done. ``bytes`` is what would go over the line, ``at_most`` if estimated."""

    action: Action
    what: str
    bytes: int = 0
    at_most: bool = False
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "action": self.action, "what": self.what, "bytes": self.bytes, "at_most": self.at_most, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All steps of one target."""

    target: str
    provider: str
    image: str
    steps: tuple[Step, ...] = field(default=())

    @property
    def idle(self) -> bool:
        """Whether all is there already."""
        return all(step.action in _IDLE for step in self.steps)

    @property
    def bytes(self) -> int:
        """What would be sent."""
        return sum(step.bytes for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "target": self.target, "provider": self.provider, "image": self.image, "idle": self.idle,
            "bytes": self.bytes, "steps": [step.as_json() for step in self.steps],
        }  # fmt: skip


def as_table(plans: Sequence[Plan]) -> str:
    """The plans as lines under each other."""
    lines = []
    for plan in plans:
        for number, step in enumerate(plan.steps):
            size = ("<= " if step.at_most else "") + format_bytes(step.bytes) if step.bytes else ""
            note = f"  ({step.note})" if step.note else ""
            head = plan.target if number == 0 else ""
            lines.append(f"{head:<14} {step.action:<9} {size:>12}  {step.what}{note}")
    total = sum(plan.bytes for plan in plans)
    idle = all(plan.idle for plan in plans)
    lines.append("nothing to send: all is there" if idle else f"{format_bytes(total)} to send")
    return "\n".join(lines)
