"""The verbs on workers: what they ask for, and what they print."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client import worker_commands
from recvirt.nestedcloud.client.api import Access

TOKEN = "rvj_" + "x" * 43


class Cloud:
    """Keeps what it is asked."""

    def __init__(self, url: str) -> None:
        self.access = Access(url, "rvc_x")
        self.asked: list[tuple[str, str, Any]] = []

    def call(self, method: str, path: str, body: Any = None) -> Any:
        self.asked.append((method, path, body))
        return {"token": TOKEN, "expires": "2027-01-31T12:00:00Z", "name": "shelf"}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    made = Cloud("https://cloud.example.org:8443")
    monkeypatch.setattr(worker_commands, "api", lambda: made)
    return made


def run(*words: str) -> Any:
    return CliRunner().invoke(main_group, ["worker", *words])


def test_an_invitation_is_the_command_to_run(cloud: Cloud) -> None:
    done = run("invite", "--name", "shelf", "--for", "2d")
    assert cloud.asked == [("POST", "workers/invitations", {"seconds": 172800, "name": "shelf"})]
    line = done.output.splitlines()[-1]
    assert line == f"sudo recvirt-cloud worker join https://cloud.example.org:8443 --token {TOKEN}"
    assert json.loads(run("invite", "--json").output)["command"] == line
    assert cloud.asked[-1][2] == {"seconds": 3600}


@pytest.mark.parametrize("text", ["", "1", "h", "1w", "-1h", "1 hour", "1000000000h"])
def test_times_that_are_none(cloud: Cloud, text: str) -> None:
    assert run("invite", "--for", text).exit_code == 2 and cloud.asked == []


@pytest.mark.parametrize(
    ("own", "address", "url"),
    [("https://127.0.0.1", "192.0.2.7", "https://192.0.2.7"),
     ("https://localhost:8780", "2001:db8::7", "https://[2001:db8::7]:8780"),
     ("https://127.0.0.1", "", "https://CENTRAL-NODE"), ("https://cloud", "192.0.2.7", "https://cloud")],
)  # fmt: skip
def test_the_address_is_one_for_others(monkeypatch: pytest.MonkeyPatch, own: str, address: str, url: str) -> None:
    monkeypatch.setattr(worker_commands, "own_address", lambda: address)
    assert worker_commands.url_for_others(own) == url


@pytest.mark.parametrize("verb", ["drain", "undrain", "revoke"])
def test_verbs(cloud: Cloud, verb: str) -> None:
    assert run(verb, "shelf").output.startswith("shelf ")
    assert cloud.asked == [("POST", f"workers/shelf/{verb}", {})]
    assert json.loads(run(verb, "shelf", "--json").output)["name"] == "shelf"


def test_an_invitation_is_taken_back(cloud: Cloud) -> None:
    assert run("uninvite", "7d3f").exit_code == 0
    assert cloud.asked == [("DELETE", "workers/invitations/7d3f", None)]
