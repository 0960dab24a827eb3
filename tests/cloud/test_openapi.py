"""The API's description: valid, whole, and every endpoint in it closed to strangers."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.core.cache import cache
from django.urls import get_resolver
from rest_framework.test import APIClient

from recvirt.nestedcloud.central.models import ApiToken, Project
from recvirt.nestedcloud.central.openapi import Endpoint, document, endpoints
from recvirt.nestedcloud.central.urls import router
from tests.cloud.conftest import Cloud, client_of, make_user
from tests.cloud.test_operations import launched

ENDPOINTS = sorted(endpoints(), key=lambda endpoint: (endpoint.path, endpoint.method))
#: These are asynchronous, and have tests of their own (test_stream.py, test_console.py).
ANSWERING = [endpoint for endpoint in ENDPOINTS if endpoint.action not in ("stream", "console_socket")]
#: Machines come in here, who are no users; what opens them is looked at in test_peers.py.
DOORS = ("/api/v1/join", "/api/v1/peer")
CLOSED = [endpoint for endpoint in ANSWERING if endpoint.path not in DOORS]
BELOW = [endpoint for endpoint in ANSWERING if "project" in endpoint.parameters]


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.path}"


#: Open to everybody who has a token.
EVERYBODY = {
    "/api/v1/projects", "/api/v1/workers", "/api/v1/workers/{name}", "/api/v1/whoami", "/api/v1/status",
    "/api/v1/openapi.json", "/api/v1/tokens",
}  # fmt: skip
#: Reached by name, and there only for members.


@pytest.fixture(autouse=True)
def _no_failures() -> None:
    cache.clear()


def path_of(endpoint: Endpoint, project: str = "lab", name: str = "web") -> str:
    path = endpoint.path
    for parameter in endpoint.parameters:
        value = {"project": project, "uuid": str(uuid.uuid4())}.get(parameter, name)
        path = path.replace(f"{{{parameter}}}", value)
    return path


def ask(client: Any, endpoint: Endpoint, **where: str) -> Any:
    return getattr(client, endpoint.method)(path_of(endpoint, **where), format="json")


def test_it_is_valid() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document())
    assert document()["openapi"].startswith("3.1")


def test_every_route_is_in_it() -> None:
    """Against the router itself, which knows nothing of the description."""
    found = {(endpoint.view, endpoint.action) for endpoint in ENDPOINTS}
    expected = set()
    for prefix, view, _ in router.registry:
        for route in router.get_routes(view):
            for action in router.get_method_map(view, route.mapping).values():
                expected.add((view, action))
        assert any(prefix.split("/")[-1] in endpoint.path for endpoint in ENDPOINTS)
    assert expected <= found
    assert len(get_resolver().url_patterns) >= 6
    assert not [endpoint.path for endpoint in ENDPOINTS if "(" in endpoint.path or "?" in endpoint.path]


def test_every_request_with_a_body_says_what_is_in_it() -> None:
    for endpoint in ENDPOINTS:
        if endpoint.method in ("post", "put", "patch"):
            told = {*endpoint.view.bodies, *getattr(endpoint.view, "raw", ())}
            assert endpoint.action in told, f"{endpoint.view.__name__}.bodies lacks {endpoint.action}"


def test_what_is_known_of_a_field_is_said() -> None:
    launch = document()["components"]["schemas"]["Launch"]
    assert launch["properties"]["vcpus"] == {"type": "integer", "minimum": 1, "maximum": 512}
    assert set(launch["required"]) == {"name"}
    assert launch["properties"]["ssh_keys"]["items"] == {"type": "string", "maxLength": 16384}
    stop = document()["paths"]["/api/v1/projects/{project}/instances/{name}/stop"]["post"]
    assert stop["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Stop"}
    assert list(stop["responses"]) == ["202", "default"]
    assert [parameter["name"] for parameter in stop["parameters"]] == ["project", "name", "Idempotency-Key"]


def test_what_is_open_to_machines_says_so_and_nothing_else_is() -> None:
    open_paths = {path for path, words in document()["paths"].items() for word in words.values() if "security" in word}
    assert open_paths == set(DOORS)


def test_it_is_served(cloud: Cloud) -> None:
    answer = cloud.client.get("/api/v1/openapi.json")
    assert answer.status_code == 200 and answer.json()["paths"] == document()["paths"]


@pytest.mark.django_db
@pytest.mark.parametrize("endpoint", CLOSED, ids=_name)
def test_no_endpoint_answers_without_a_token(endpoint: Endpoint) -> None:
    answer = ask(APIClient(), endpoint)
    assert answer.status_code == 401, answer.content


@pytest.mark.parametrize("endpoint", ANSWERING, ids=_name)
def test_a_stranger_gets_nothing_from_any_endpoint(cloud: Cloud, endpoint: Endpoint) -> None:
    launched(cloud)
    stranger = client_of(make_user("eve", Project.objects.create(name="other")))
    answer = ask(stranger, endpoint)
    if endpoint in BELOW or (endpoint.path == "/api/v1/projects/{name}" and endpoint.method == "get"):
        assert answer.status_code == 404
    elif endpoint.path in EVERYBODY and endpoint.method == "get":
        assert answer.status_code in (200, 404)
        assert "lab" not in str(getattr(answer, "data", ""))
    else:
        assert answer.status_code in (400, 403, 404), answer.content


@pytest.mark.parametrize("endpoint", BELOW, ids=_name)
def test_a_token_of_another_project_gets_nothing_though_its_owner_is_a_member(cloud: Cloud, endpoint: Endpoint) -> None:
    other = Project.objects.create(name="other")
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {ApiToken.issue(cloud.user, 'x', project=other)[1]}")
    assert ask(client, endpoint).status_code == 404


@pytest.mark.parametrize(
    "endpoint", [item for item in ENDPOINTS if item.method != "get" and item.path not in DOORS], ids=_name
)
def test_a_read_only_token_changes_nothing_anywhere(cloud: Cloud, endpoint: Endpoint) -> None:
    cloud.user.is_superuser = True
    cloud.user.save()
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {ApiToken.issue(cloud.user, 'x', read_only=True)[1]}")
    assert ask(client, endpoint).status_code == 403
