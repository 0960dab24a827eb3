"""Projects, members, users and tokens: who may change them, and that all of it is written down."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from django.core.cache import cache
from rest_framework.test import APIClient

from recvirt.nestedcloud.central.models import ApiToken, Event, Membership, Project, Role
from tests.cloud.conftest import Cloud, client_of, make_user

V1 = "/api/v1/"


@pytest.fixture(autouse=True)
def _no_failures() -> None:
    cache.clear()


@pytest.fixture
def root(cloud: Cloud) -> APIClient:
    user = make_user("root")
    user.is_superuser = True
    user.save()
    return client_of(user)


def with_token(secret: str) -> APIClient:
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
    return client


def scoped(cloud: Cloud, **scope: Any) -> APIClient:
    _, secret = ApiToken.issue(cloud.user, "scoped", **scope)
    return with_token(secret)


def post(client: APIClient, path: str, **body: Any) -> Any:
    return client.post(f"{V1}{path}", body, format="json")


def test_an_administrator_makes_a_project_with_a_user_who_then_gets_in(cloud: Cloud, root: APIClient) -> None:
    assert post(root, "projects", name="shop", vcpus_max=4).status_code == 201
    assert post(root, "users", name="bob").status_code == 201
    assert post(root, "projects/shop/members", user="bob", role="admin").status_code == 201
    issued = post(root, "tokens", name="laptop", user="bob", days=30)
    assert issued.status_code == 201 and issued["Cache-Control"] == "no-store"
    bob = with_token(issued.data["secret"])
    who = bob.get(f"{V1}whoami").data
    assert (who["name"], who["administrator"], who["projects"]) == ("bob", False, {"shop": "admin"})
    assert bob.get(f"{V1}projects/shop").data["vcpus_max"] == 4
    # An admin of the project takes others in, and an operator does not.
    assert post(bob, "projects/shop/members", user="ada", role="operator").status_code == 201
    assert cloud.client.patch(f"{V1}projects/shop/members/ada", {"role": "admin"}, format="json").status_code == 403
    assert cloud.client.delete(f"{V1}projects/shop/members/bob").status_code == 403
    assert bob.delete(f"{V1}projects/shop/members/ada").status_code == 204
    kinds = list(root.get(f"{V1}audit", {"project": "shop"}).data["results"])
    assert [event["kind"] for event in kinds] == ["member.removed", "member.added", "member.added", "project.made"]
    assert kinds[0]["user"] == "bob" and kinds[0]["data"]["member"] == "ada"


def test_quotas_are_set_by_administrators(cloud: Cloud, root: APIClient) -> None:
    path = f"{V1}projects/lab"
    Membership.objects.update(role=Role.ADMIN)
    assert cloud.client.patch(path, {"vcpus_max": 999}, format="json").status_code == 403
    assert root.patch(path, {"vcpus_max": 6}, format="json").data["vcpus_max"] == 6
    assert root.patch(path, {}, format="json").status_code == 400
    assert root.patch(path, {"name": "x"}, format="json").status_code == 400
    assert Event.objects.get(kind="project.changed").data == {"name": "lab", "vcpus_max": 6}


@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "projects"), ("patch", "projects/lab"), ("get", "users"), ("post", "users"), ("patch", "users/ada"),
     ("get", "audit")],
)  # fmt: skip
def test_what_is_the_administrators_is_no_project_admin_s(cloud: Cloud, method: str, path: str) -> None:
    Membership.objects.update(role=Role.ADMIN)
    answer = getattr(cloud.client, method)(f"{V1}{path}", format="json")
    assert answer.status_code == 403


def test_a_user_who_is_locked_out_is_out_at_once(cloud: Cloud, root: APIClient) -> None:
    assert root.patch(f"{V1}users/ada", {"active": False}, format="json").data["active"] is False
    assert cloud.client.get(f"{V1}whoami").status_code == 401
    root.patch(f"{V1}users/ada", {"active": True}, format="json")
    assert cloud.client.get(f"{V1}whoami").status_code == 200
    assert root.patch(f"{V1}users/root", {"active": False}, format="json").status_code == 409


@pytest.mark.parametrize("name", ["", "Bob", "../x", "a b", "<x>", "-x", "x" * 64, "bob\n"])
def test_user_names_are_plain(root: APIClient, name: str) -> None:
    assert post(root, "users", name=name).status_code == 400


def test_a_user_or_project_of_a_name_is_made_once(cloud: Cloud, root: APIClient) -> None:
    assert post(root, "users", name="ada").status_code == 409
    assert post(root, "projects", name="lab", vcpus_max=1).status_code == 409
    assert Project.objects.get(name="lab").vcpus_max == 32
    assert post(root, "projects/lab/members", user="ada").status_code == 409
    assert post(root, "projects/lab/members", user="nobody").status_code == 400


def test_one_s_own_tokens_are_listed_without_secrets_and_revoked(cloud: Cloud) -> None:
    issued = post(cloud.client, "tokens", name="ci", read_only=True).data
    listed = cloud.client.get(f"{V1}tokens").data["results"]
    assert issued["uuid"] in [row["uuid"] for row in listed]
    assert issued["secret"] not in str(listed) and "digest" not in str(listed)
    assert cloud.client.delete(f"{V1}tokens/{issued['uuid']}").status_code == 204
    assert with_token(issued["secret"]).get(f"{V1}whoami").status_code == 401


def test_others_tokens_are_not_there(cloud: Cloud) -> None:
    other = ApiToken.issue(make_user("eve"), "x")[0]
    assert cloud.client.delete(f"{V1}tokens/{other.uuid}").status_code == 404
    assert cloud.client.delete(f"{V1}tokens/------------------------------------").status_code == 404
    assert post(cloud.client, "tokens", name="x", user="eve").status_code == 403
    assert post(cloud.client, "tokens", name="x", project="absent").status_code == 400
    assert ApiToken.objects.filter(pk=other.pk).exists()


def test_a_read_only_token_reads(cloud: Cloud) -> None:
    client = scoped(cloud, read_only=True)
    assert client.get(cloud.url("instances")).status_code == 200
    for answer in (
        post(client, "projects/lab/instances", name="web", image="tiny"), post(client, "tokens", name="more"),
        client.delete(cloud.url("instances/web")),
    ):  # fmt: skip
        assert answer.status_code == 403 and answer.data["title"] == "this token only reads"


def test_a_project_s_token_opens_that_project_alone(cloud: Cloud) -> None:
    other = Project.objects.create(name="other")
    Membership.objects.create(project=other, user=cloud.user, role=Role.ADMIN)
    client = scoped(cloud, project=cloud.project)
    assert client.get(cloud.url("instances")).status_code == 200
    assert client.get(f"{V1}projects/other/instances").status_code == 404
    assert client.get(f"{V1}projects/other").status_code == 404
    assert [row["name"] for row in client.get(f"{V1}projects").data["results"]] == ["lab"]
    assert client.get(f"{V1}whoami").data["projects"] == {"lab": "operator"}
    # It does not make itself a token for more.
    assert post(client, "tokens", name="all").status_code == 403


def test_an_administrator_s_token_for_a_project_is_no_administrator(cloud: Cloud, root: APIClient) -> None:
    user = ApiToken.objects.get(user__username="root").user
    client = with_token(ApiToken.issue(user, "x", project=cloud.project)[1])
    assert client.get(cloud.url("instances")).status_code == 200
    assert post(client, "projects", name="mine").status_code == 403
    assert client.get("/metrics").status_code == 403 and client.get(f"{V1}audit").status_code == 403
    assert client.patch(f"{V1}projects/lab", {"vcpus_max": 999}, format="json").status_code == 403


def test_secrets_are_in_no_event_and_no_log(cloud: Cloud, root: APIClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = post(root, "tokens", name="ci", user="ada").data["secret"]
    client = with_token(secret)
    client.get(f"{V1}whoami")
    post(client, "projects/lab/instances", name="web", image="tiny", user_data="#cloud-config\npassword: hunter2\n")
    post(client, "projects", name="no")
    client.delete(f"{V1}tokens/{ApiToken.objects.get(name='ci').uuid}")
    client.get(f"{V1}whoami")
    told = caplog.text + str(list(Event.objects.values_list("data", flat=True)))
    assert Event.objects.filter(kind="token.issued").exists() and "Forbidden" in caplog.text
    for hidden in (secret, ApiToken.digest_of(secret), "hunter2"):
        assert hidden not in told


def test_wrong_tokens_from_one_address_wait_and_others_do_not(cloud: Cloud) -> None:
    wrong = with_token("rvc_wrong")
    answers = [wrong.get(f"{V1}whoami", REMOTE_ADDR="192.0.2.1").status_code for _ in range(22)]
    assert answers == [401] * 20 + [429] * 2
    # Not even a right one gets in from there, so that a guess is not told from a miss.
    assert cloud.client.get(f"{V1}whoami", REMOTE_ADDR="192.0.2.1").status_code == 429
    assert cloud.client.get(f"{V1}whoami", REMOTE_ADDR="192.0.2.2").status_code == 200


def test_a_token_is_looked_up_by_its_digest_alone(cloud: Cloud, django_assert_num_queries: Any) -> None:
    """What a comparison byte by byte would tell by its time is a digest's: nothing that leads to a secret."""
    _, secret = ApiToken.issue(cloud.user, "x")
    for guess in (secret[:-1], secret[:-1] + "!", "rvc_", secret.upper()):
        with django_assert_num_queries(1):
            assert with_token(guess).get(f"{V1}whoami").status_code == 401


def test_another_user_s_idempotency_key_shows_nothing_of_the_request(cloud: Cloud) -> None:
    bob = client_of(make_user("bob", cloud.project))
    body = {"name": "web", "image": "tiny"}
    headers = {"Idempotency-Key": "k"}
    first = cloud.client.post(cloud.url("instances"), body, format="json", headers=headers)
    assert first.status_code == 202
    # Not even with the same request: an answer would say that somebody else has asked for it.
    replay = bob.post(cloud.url("instances"), body, format="json", headers=headers)
    assert (replay.status_code, replay.data["type"]) == (422, "idempotency-key-reused")
    assert "operation" not in replay.data


def test_a_key_in_another_project_is_another_key(cloud: Cloud) -> None:
    other = Project.objects.create(name="other")
    eve = client_of(make_user("eve", other))
    body, headers = {"name": "web", "image": "tiny"}, {"Idempotency-Key": "k"}
    one = cloud.client.post(cloud.url("instances"), body, format="json", headers=headers)
    two = eve.post(f"{V1}projects/other/instances", body, format="json", headers=headers)
    assert two.status_code == 202 and one.data["uuid"] != two.data["uuid"]
