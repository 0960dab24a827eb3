"""What differs between the Django of Debian (4.2) and the newest one."""

from __future__ import annotations

from typing import Any

import django
from django.db.models import CheckConstraint, Q


def check_constraint(condition: Q, name: str) -> CheckConstraint:
    """A CheckConstraint; its argument was renamed in Django 5.1."""
    words: dict[str, Any] = {"condition" if django.VERSION >= (5, 1) else "check": condition}
    return CheckConstraint(name=name, **words)
