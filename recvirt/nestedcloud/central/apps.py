"""The Django application."""

from __future__ import annotations

from django.apps import AppConfig


class Cloud(AppConfig):
    """All of the central node's tables."""

    name = "recvirt.nestedcloud.central"
    label = "cloud"
    default_auto_field = "django.db.models.BigAutoField"
