"""The first rows of a cloud, and the first key to it."""

from __future__ import annotations

from django.contrib.auth import get_user_model
from django.db import transaction

from recvirt.nestedcloud.central.models import ApiToken, Project, Worker

ADMINISTRATOR = "admin"
PROJECT = "default"


def ensure_first_rows(worker_uuid: str | None, worker_name: str) -> None:
    """A project, an administrator without a password, and the worker on the same machine, if there is one. Again
    changes nothing.
    """
    with transaction.atomic():
        user, made = get_user_model().objects.get_or_create(username=ADMINISTRATOR, defaults={"is_superuser": True})
        if made:
            user.set_unusable_password()
            user.save()
        Project.objects.get_or_create(name=PROJECT)
        if worker_uuid is not None:
            Worker.objects.get_or_create(uuid=worker_uuid, defaults={"name": worker_name})


def issue_token(username: str, name: str) -> str:
    """A new token's secret. LookupError when there is no such user."""
    user = get_user_model().objects.filter(username=username, is_active=True).first()
    if user is None:
        raise LookupError(f"there is no user called {username}")
    _, secret = ApiToken.issue(user, name[:63])
    return secret
