"""Why a worker could not do what it was told."""

from __future__ import annotations

from recvirt.nestedcloud.model import Fault


class ActionError(Exception):
    """``fault`` is for programs, the text for people."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
