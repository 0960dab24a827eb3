"""What differs between the Django of Debian (4.2) and the newest one."""

from __future__ import annotations

from typing import Any

import django
from django.db.models import CheckConstraint, Q


class PortableCheck(CheckConstraint):
    """A CheckConstraint whose migration both understand; its argument was renamed in Django 5.1."""

    def __init__(self, rule: Q, name: str) -> None:
        words: dict[str, Any] = {"condition" if django.VERSION >= (5, 1) else "check": rule}
        super().__init__(name=name, **words)
        self._rule = rule

    def deconstruct(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """As this class, not as Django's."""
        return f"{PortableCheck.__module__}.PortableCheck", (), {"rule": self._rule, "name": self.name}


def check_constraint(condition: Q, name: str) -> PortableCheck:
    """A constraint of a table."""
    return PortableCheck(condition, name)
