"""Why a worker could not do what it was told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recvirt.nestedcloud.model import Fault


class ActionError(Exception):
    """``fault`` is for programs, the text for people. ``facts`` are what is then there, where that is known."""

    def __init__(self, fault: Fault, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.facts = dict(facts or {})


class UnreachableError(ActionError):
    """Who was asked is away: the same thing may work in a moment."""
