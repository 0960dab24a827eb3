"""The command line against a real server: logging in, people, time, and the cloud as a whole."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from recvirt.nestedcloud.central import health
from recvirt.nestedcloud.central.models import ApiToken, Image, ImageState, Instance, InstanceState, Schedule
from recvirt.nestedcloud.central.people import make_administrator
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client.api import VARIABLE, ApiError
from recvirt.nestedcloud.model import GIB
from tests.cloud.conftest import make_worker
from tests.cloud.test_stream import Server, server

__all__ = ["server"]


class Shell:
    """Commands of an administrator, whose access is in a file of the test's."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server, self.path = server, path
        self.token = make_administrator("root")

    def run(self, *words: str, text: str | None = None) -> Result:
        return CliRunner().invoke(main_group, words, input=text)

    def out(self, *words: str) -> str:
        result = self.run(*words)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output

    def refusal(self, *words: str) -> ApiError:
        error = self.run(*words).exception
        assert isinstance(error, ApiError), error
        return error


@pytest.fixture
def shell(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    path = tmp_path / "config" / "client.toml"
    monkeypatch.setenv(VARIABLE, str(path))
    found = Shell(server, path)
    result = found.run("login", server.url, "--project", "lab", text=found.token + "\n")
    assert result.exit_code == 0, result.output
    assert found.token not in result.output
    return found


def test_logging_in_keeps_the_token_for_its_user_alone(shell: Shell) -> None:
    assert stat.S_IMODE(shell.path.stat().st_mode) == 0o600
    assert "root" in shell.out("whoami") and "lab" in shell.out("whoami")


@pytest.mark.parametrize("text", ["rvc_wrong\n", "\n", "a b\n", "a\x1bb\n"])
def test_a_wrong_token_is_not_kept(shell: Shell, text: str) -> None:
    before = shell.path.read_text()
    assert shell.run("login", shell.server.url, text=text).exit_code != 0
    assert shell.path.read_text() == before


def test_a_token_is_not_sent_in_the_clear(shell: Shell) -> None:
    result = shell.run("login", "http://cloud.example.org", text="rvc_x\n")
    assert result.exit_code == 1 and "want https://" in result.output


def test_people(shell: Shell) -> None:
    shell.out("project", "create", "shop", "--vcpus", "4", "--memory", "8G")
    shell.out("project", "set", "shop", "--instances", "3")
    assert re.search(r"shop +3 +4 +8 GiB", shell.out("project", "list"))
    assert "token create" in shell.out("user", "create", "bob")
    shell.out("--project", "shop", "project", "member", "add", "bob", "--role", "reader")
    shell.out("--project", "shop", "project", "member", "set", "bob", "--role", "admin")
    assert re.search(r"bob +admin", shell.out("--project", "shop", "project", "member", "list"))
    issued = json.loads(shell.out("token", "create", "ci", "--user", "bob", "--for-project", "shop", "--json"))
    assert issued["secret"].startswith("rvc_") and issued["project"] == "shop"
    assert issued["secret"] not in shell.out("token", "list")
    shell.out("token", "revoke", issued["uuid"])
    assert shell.refusal("token", "revoke", issued["uuid"]).kind in ("not-found", "not_found")
    shell.out("user", "lock", "bob")
    assert re.search(r"bob +no", shell.out("user", "list"))
    shell.out("user", "unlock", "bob")
    shell.out("--project", "shop", "project", "member", "remove", "bob")
    told = shell.out("audit", "--user", "root")
    for kind in ("project.made", "member.changed", "token.revoked", "user.locked"):
        assert kind in told
    assert issued["secret"] not in told


def test_time(shell: Shell) -> None:
    Image.objects.create(name="tiny", state=ImageState.READY, virtual_bytes=GIB)
    worker = make_worker()
    Instance.objects.create(
        project=shell.server.project, worker=worker, name="web", state=InstanceState.OFF, vcpus=1, vcpus_max=1,
        memory_bytes=GIB, memory_max_bytes=GIB, disk_bytes=GIB, promised_vcpus=1, promised_memory_bytes=GIB,
        promised_disk_bytes=GIB,
    )  # fmt: skip
    said = shell.out(
        "schedule", "add", "office", "start", "web", "--at", "2090-01-02 08:00", "--to", "2090-01-02 18:00", "--rule",
        "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR", "--zone", "Europe/Budapest",
    )  # fmt: skip
    assert said == "office is due 2090-01-02T07:00:00Z\n"
    assert Schedule.objects.get().window_seconds == 36000
    assert "office" in shell.out("schedule", "list")
    shell.out("schedule", "pause", "office")
    shell.out("schedule", "resume", "office")
    assert "OUTCOME" in shell.out("schedule", "show", "office")
    shell.out("schedule", "add", "more", "rescale", "web", "--at", "2090-01-02T08:00+01:00", "--set", "vcpus_max=1",
              "--set", "restart=true")  # fmt: skip
    shell.out("schedule", "remove", "office")
    assert shell.run("schedule", "add", "x", "stop", "web", "--at", "tomorrow").exit_code == 2
    assert shell.run("schedule", "add", "x", "stop", "web", "--at", "2090-01-01", "--zone", "X/Y").exit_code == 2
    assert "args" in shell.refusal("schedule", "add", "x", "stop", "web", "--at", "2090-01-01", "--set", "a=1").message
    far = shell.refusal(
        "schedule", "add", "x", "launch", "--at", "2090-01-01", "--set", "name=x", "--set", "image=tiny"
    )  # fmt: skip
    assert "days ahead" in far.message


def test_the_cloud_as_a_whole(shell: Shell) -> None:
    result = shell.run("status")
    assert result.exit_code == 1 and "NOT HEALTHY" in result.output and "none is up" in result.output
    make_worker()
    health.beat(health.DISPATCHER)
    said = shell.out("status")
    assert "healthy" in said and "1 of 1 up" in said and "15.5 GiB free" in said
    assert json.loads(shell.out("status", "--json"))["workers"]["up"] == 1


def test_what_happened(shell: Shell) -> None:
    shell.server.note("one", name="web")
    assert "one  -  name=web" in shell.out("events")


def test_an_administrator_is_made_once_and_gets_a_token_each_time(shell: Shell) -> None:
    assert make_administrator("root") != shell.token
    assert ApiToken.objects.filter(user__username="root").count() == 2
