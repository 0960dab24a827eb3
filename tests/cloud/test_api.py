"""The API: who may do what, what is refused how, and that documents are strict."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.core.cache import cache
from django.utils import timezone
from rest_framework.test import APIClient

from recvirt.nestedcloud.central.auth import FAILURES_MAX
from recvirt.nestedcloud.central.models import ApiToken, Image, ImageState, Instance, Operation, Project, Role
from recvirt.nestedcloud.model import GIB, MIB
from tests.cloud.conftest import Cloud, client_of, make_user
from tests.cloud.test_operations import launched


@pytest.fixture(autouse=True)
def _no_failures() -> None:
    cache.clear()


def launch(cloud: Cloud, client: APIClient | None = None, headers: dict[str, str] | None = None, **body: Any) -> Any:
    data = {"name": "web", "image": "tiny", **body}
    return (client or cloud.client).post(cloud.url("instances"), data, format="json", headers=headers)


def test_a_launch_is_accepted_with_its_operation(cloud: Cloud) -> None:
    answer = launch(cloud)
    assert answer.status_code == 202, answer.data
    assert (answer.data["kind"], answer.data["phase"], answer.data["instance_name"]) == ("launch", "queued", "web")
    shown = cloud.client.get(cloud.url("instances/web")).data
    assert (shown["state"], shown["vcpus"], shown["vcpus_max"], shown["memory_bytes"]) == ("new", 1, 2, 512 * MIB)
    assert shown["operation"]["uuid"] == answer.data["uuid"]
    assert shown["nics"][0]["network"] == "default"


def test_the_same_key_gives_the_same_operation(cloud: Cloud) -> None:
    one, two = (launch(cloud, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert one.data["uuid"] == two.data["uuid"]
    other = launch(cloud, name="other", headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.data["type"]) == (422, "idempotency-key-reused")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "Web"}, "name"),
        ({"name": "web;reboot"}, "name"),
        ({"name": "<web>"}, "name"),
        ({"name": "../web"}, "name"),
        ({"name": "web\n"}, "name"),
        ({"name": ""}, "name"),
        ({"image": "absent"}, "image"),
        ({"vcpus": 0}, "vcpus"),
        ({"vcpus": "many"}, "vcpus"),
        ({"memory_bytes": 1}, "memory_bytes"),
        ({"priority": 101}, "priority"),
        ({"networks": ["absent"]}, "networks"),
        ({"ssh_keys": ["a\nb"]}, "ssh_keys"),
        ({"user_data": "x" * 70000}, "user_data"),
        ({"vcpu": 2}, "vcpu"),
    ],
)
def test_a_document_that_is_not_valid_is_refused_by_field(cloud: Cloud, body: dict[str, Any], field: str) -> None:
    answer = launch(cloud, **body)
    assert answer.status_code == 400 and answer["Content-Type"] == "application/problem+json"
    assert list(answer.data["errors"]) == [field]
    assert not Instance.objects.exists() and not Operation.objects.exists()


def test_memory_in_odd_bytes_is_refused(cloud: Cloud) -> None:
    answer = launch(cloud, memory_bytes=512 * MIB + 1)
    assert answer.status_code == 409 and "MiB" in answer.data["title"]


def test_a_busy_instance_is_a_conflict_that_names_the_operation(cloud: Cloud) -> None:
    first = launch(cloud).data
    answer = cloud.client.post(cloud.url("instances/web/stop"), {}, format="json")
    assert (answer.status_code, answer.data["type"]) == (409, "operation-active")
    assert answer.data["operation"] == first["uuid"]


def test_without_a_token_nothing_is_told(cloud: Cloud) -> None:
    for path in ("/api/v1/projects", "/api/v1/workers", cloud.url("instances"), cloud.url("instances/web/start")):
        answer = APIClient().get(path)
        assert answer.status_code == 401 and answer["WWW-Authenticate"] == "Bearer", path
        assert answer.data["type"] == "not_authenticated"


def test_a_wrong_token_is_refused_and_soon_has_to_wait(cloud: Cloud) -> None:
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION="Bearer rvc_wrong")
    for _ in range(FAILURES_MAX):
        assert client.get("/api/v1/projects").status_code == 401
    assert client.get("/api/v1/projects").status_code == 429


@pytest.mark.parametrize("words", ["Bearer", "Bearer a b", "Bearer \xff"])
def test_a_header_that_is_no_token_is_refused(cloud: Cloud, words: str) -> None:
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=words)
    assert client.get("/api/v1/projects").status_code == 401


def test_an_expired_token_and_a_locked_user_are_refused(cloud: Cloud) -> None:
    ApiToken.objects.update(expires=timezone.now())
    assert cloud.client.get("/api/v1/projects").status_code == 401
    ApiToken.objects.update(expires=None)
    assert cloud.client.get("/api/v1/projects").status_code == 200
    cloud.user.is_active = False
    cloud.user.save()
    assert cloud.client.get("/api/v1/projects").status_code == 401


def test_a_token_is_not_kept(cloud: Cloud) -> None:
    row, secret = ApiToken.issue(cloud.user, "x")
    kept = [str(value) for value in ApiToken.objects.values_list()[0]]
    assert secret not in " ".join(kept) and len(secret) > 40
    assert row.digest != secret


def test_a_stranger_does_not_learn_that_a_project_exists(cloud: Cloud) -> None:
    launched(cloud)
    stranger = client_of(make_user("eve", Project.objects.create(name="other")))
    for path in ("instances", "instances/web", "operations", "images", "networks", "events"):
        mine, absent = stranger.get(cloud.url(path)), stranger.get(f"/api/v1/projects/absent/{path}")
        assert mine.status_code == absent.status_code == 404 and mine.data == absent.data
    assert stranger.post(cloud.url("instances/web/stop"), {}, format="json").status_code == 404
    assert stranger.delete(cloud.url("instances/web")).status_code == 404
    names = [project["name"] for project in stranger.get("/api/v1/projects").data["results"]]
    assert names == ["other"]


def test_one_project_s_things_are_not_found_through_another(cloud: Cloud) -> None:
    instance = launched(cloud)
    other = Project.objects.create(name="other")
    client = client_of(make_user("eve", other))
    operation = instance.operations.get()
    assert client.get(f"/api/v1/projects/other/operations/{operation.uuid}").status_code == 404
    assert client.get("/api/v1/projects/other/instances/web").status_code == 404


def test_another_project_s_image_can_t_be_started(cloud: Cloud) -> None:
    other = Project.objects.create(name="other")
    Image.objects.create(name="secret", project=other, state=ImageState.READY, virtual_bytes=GIB)
    answer = launch(cloud, image="secret")
    assert answer.status_code == 400 and "no image called secret" in str(answer.data)


def test_a_reader_reads(cloud: Cloud) -> None:
    launched(cloud)
    reader = client_of(make_user("bob", cloud.project, Role.READER))
    assert reader.get(cloud.url("instances/web")).status_code == 200
    for answer in (launch(cloud, reader, name="two"), reader.delete(cloud.url("instances/web"))):
        assert answer.status_code == 403


def test_a_deleted_instance_is_not_shown(cloud: Cloud) -> None:
    instance = launched(cloud)
    instance.state = "deleted"
    instance.save()
    assert cloud.client.get(cloud.url("instances/web")).status_code == 404
    assert cloud.client.get(cloud.url("instances")).data["results"] == []


def test_events_go_on_after_an_id(cloud: Cloud) -> None:
    launched(cloud)
    found = cloud.client.get(cloud.url("events")).data["results"]
    assert [event["kind"] for event in found] == ["operation.queued", "operation.succeeded"]
    rest = cloud.client.get(cloud.url("events"), {"after": found[0]["id"]}).data["results"]
    assert rest == found[1:]
    assert cloud.client.get(cloud.url("events"), {"after": "x"}).status_code == 400


def test_an_unknown_operation_is_not_found(cloud: Cloud) -> None:
    assert cloud.client.get(cloud.url(f"operations/{uuid.uuid4()}")).status_code == 404
    assert cloud.client.get(cloud.url("operations/------------------------------------")).status_code == 404


def test_the_browsable_page_is_there(cloud: Cloud) -> None:
    answer = cloud.client.get(cloud.url("instances"), HTTP_ACCEPT="text/html")
    assert answer.status_code == 200 and "text/html" in answer["Content-Type"]
