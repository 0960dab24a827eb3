"""A small cloud in a database: a project with a member, a worker that is up, an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone
from rest_framework.test import APIClient

from recvirt.nestedcloud.central.models import ApiToken, Image, ImageState, Membership, Project, Role, Worker
from recvirt.nestedcloud.model import GIB

pytestmark = pytest.mark.django_db


@dataclass
class Cloud:
    """What most tests need."""

    project: Project
    user: Any
    worker: Worker
    image: Image
    client: APIClient

    def url(self, path: str) -> str:
        return f"/api/v1/projects/{self.project.name}/{path}"


def client_of(user: Any) -> APIClient:
    """A client that sends the user's token."""
    _, secret = ApiToken.issue(user, "test")
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
    return client


def make_user(name: str, project: Project | None = None, role: Role = Role.OPERATOR) -> Any:
    """A user without a password, perhaps a member."""
    user = get_user_model().objects.create(username=name)
    if project is not None:
        Membership.objects.create(project=project, user=user, role=role)
    return user


def make_worker(name: str = "w1", **values: Any) -> Worker:
    """A worker that was heard of just now."""
    fields = {"vcpus": 8, "memory_bytes": 16 * GIB, "disk_bytes": 100 * GIB, "last_seen": timezone.now()}
    return Worker.objects.create(name=name, **{**fields, **values})


@pytest.fixture
def cloud(db: None) -> Cloud:
    project = Project.objects.create(name="lab")
    user = make_user("ada", project)
    image = Image.objects.create(name="tiny", state=ImageState.READY, virtual_bytes=GIB)
    return Cloud(project, user, make_worker(), image, client_of(user))
