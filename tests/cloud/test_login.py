"""Who is root on the central node gets in, also while its set-up is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from django.db.utils import OperationalError

from recvirt.nestedcloud import login
from recvirt.nestedcloud.central import first
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client.api import ApiError
from recvirt.nestedcloud.machine import CENTRAL, WORKER, Machine, ProvisionError
from recvirt.nestedcloud.statuses import ExitStatus
from tests.cloud.test_provision import has_roles, machine, programs

__all__ = ["machine", "programs"]


class Systemd:
    """The set-up's unit in one state after another; the last one stays."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)

    def __call__(self, argv: Sequence[str], text: str, user: str | None) -> str:
        assert argv[-1] == login.SETUP_UNIT and user is None
        return (self.states.pop(0) if len(self.states) > 1 else self.states[0]) + "\n"


def waited(machine: Machine, *states: str) -> tuple[list[str], list[float]]:
    told: list[str] = []
    slept: list[float] = []
    login.wait_for_setup(replace(machine, run=Systemd(*states), tell=told.append), slept.append)
    return told, slept


def test_a_set_up_under_way_is_waited_for(machine: Machine) -> None:
    told, slept = waited(machine, "inactive", "activating", "activating", "active")
    assert len(told) == 1 and len(slept) == 3
    assert waited(machine, "active") == ([], [])


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (("activating", "failed"), "set-up failed; journalctl"), (("inactive",), "has not begun"),
        (("inactive", "activating"), "has not ended"),
    ],
)  # fmt: skip
def test_a_set_up_that_comes_to_nothing_is_told(machine: Machine, states: tuple[str, ...], words: str) -> None:
    with pytest.raises(ProvisionError, match=words):
        waited(machine, *states)


class Statuses:
    """The API's answers, one after another; the last one stays."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def call(self, method: str, path: str) -> Any:
        assert (method, path) == ("GET", "status")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"health": answer}


AWAY = ApiError("no answer", kind="unreachable")
ALONE = {"database": "ok", "broker": "ok", "workers": "none is up"}
ALL = {**ALONE, "workers": "ok"}


@pytest.mark.parametrize(
    ("roles", "answers", "rounds"),
    [
        ((CENTRAL, WORKER), (AWAY, ALONE, ALL), 2), ((CENTRAL,), (AWAY, ALONE), 1), ((CENTRAL,), (ALL,), 0),
    ],
)  # fmt: skip
def test_the_services_are_waited_for(
    machine: Machine, roles: tuple[str, ...], answers: tuple[Any, ...], rounds: int
) -> None:
    has_roles(machine, *roles)
    slept: list[float] = []
    api: Any = Statuses(*answers)
    assert login.wait_until_ready(replace(machine, tell=lambda _text: None), api, slept.append)
    assert len(slept) == rounds


def test_services_that_do_not_come_up_hold_nobody_for_ever(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    has_roles(machine, CENTRAL, WORKER)
    monkeypatch.setattr(login, "_READY_SECONDS", 0.0)
    api: Any = Statuses(ALONE)
    assert not login.wait_until_ready(machine, api, lambda _seconds: None)
    refused: Any = Statuses(ApiError("no", kind="denied"))
    with pytest.raises(ApiError, match="no"):
        login.wait_until_ready(machine, refused, lambda _seconds: None)


def test_a_token_without_a_database_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(user: str, name: str) -> str:
        raise OperationalError("connection to server on socket failed: No such file\n\tIs the server running?")

    monkeypatch.setattr(first, "issue_token", away)
    monkeypatch.setattr("recvirt.nestedcloud.cli._setup", lambda: None)
    result = CliRunner().invoke(main_group, ["central", "token"])
    assert result.exit_code == ExitStatus.UNREACHABLE
    assert "the database does not answer: connection to server on socket failed" in result.stderr
    assert "recvirt-cloud-setup" in result.stderr and "Is the server running?" not in result.stderr
