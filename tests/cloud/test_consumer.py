"""Whose word the central node's consumer takes."""

from __future__ import annotations

from typing import Any

import pytest

from recvirt.nestedcloud.central.consumer import is_of
from recvirt.nestedcloud.queue import REPORT, Sender

ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
BROKER = "amqp://central:secret@127.0.0.1:5672//"


@pytest.mark.parametrize(
    ("properties", "taken"),
    [({"user_id": ONE}, True), ({"user_id": TWO}, False), ({"user_id": "central"}, True), ({}, False), (None, False),
     ({"user_id": ""}, False), ({"user_id": None}, False)],
)  # fmt: skip
def test_a_worker_speaks_for_itself_alone(properties: Any, taken: bool) -> None:
    assert is_of(ONE, properties, BROKER) is taken
    assert is_of(ONE, properties, "filesystem:/somewhere")
    assert is_of(ONE, {"user_id": ""}, "amqp://127.0.0.1") is False


def test_a_worker_says_whose_account_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(f"amqp://{ONE}:secret@[fd00::1]:5672//")
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(sender._app, "send_task", lambda name, **words: sent.append({"name": name, **words}))
    sender._send(REPORT, sender._central(), "x", **sender._to_central)
    assert (sent[0]["exchange"], sent[0]["routing_key"], sent[0]["user_id"]) == ("central", "central", ONE)
