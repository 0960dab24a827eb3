"""Machines that come in at one moment, on connections of their own: one an invitation, each at its own address."""

from __future__ import annotations

import uuid
from typing import Any

from rest_framework.test import APIClient

from recvirt.nestedcloud import tunnel
from recvirt.nestedcloud.central.models import Invitation, Peer
from tests.cloud.conftest import Cloud
from tests.cloud.test_peers import CLOUD, Machine, _tunnel, invited, key_of, root
from tests.cloud.test_races import ROUNDS, THREADS, cloud, together

__all__ = ["_tunnel", "cloud", "root"]


def test_one_invitation_lets_in_one(cloud: Cloud, root: APIClient) -> None:
    for number in range(ROUNDS):
        token = invited(root)
        machines = [Machine(f"w{number}-{index}") for index in range(THREADS)]
        found = together(
            *(lambda machine=machine, token=token: machine.join(token).status_code for machine in machines)
        )
        assert sorted(found) == [200] + [403] * (THREADS - 1)
        assert Peer.objects.count() == number + 1


def test_each_gets_an_address_of_its_own(cloud: Cloud, root: APIClient) -> None:
    for number in range(ROUNDS):
        tokens = [invited(root) for _ in range(THREADS)]
        machines = [Machine(f"w{number}-{index}") for index in range(THREADS)]
        pairs = zip(machines, tokens, strict=True)
        found = together(*(lambda machine=machine, token=token: machine.join(token) for machine, token in pairs))
        assert [answer.status_code for answer in found] == [200] * THREADS
    addresses = {str(tunnel.peer_address(CLOUD, index)) for index in Peer.objects.values_list("index", flat=True)}
    assert len(addresses) == ROUNDS * THREADS == Invitation.objects.exclude(used=None).count()


def test_one_name_is_given_once(cloud: Cloud, root: APIClient) -> None:
    tokens = [invited(root) for _ in range(THREADS)]

    def come(index: int) -> Any:
        machine = Machine("shelf")
        machine.uuid, machine.key = str(uuid.uuid4()), key_of(str(index))
        return machine.join(tokens[index]).status_code

    found = together(*(lambda index=index: come(index) for index in range(THREADS)))
    assert sorted(found) == [200] + [409] * (THREADS - 1)
    # Who was refused has used up nothing.
    assert Invitation.objects.filter(used=None).count() == THREADS - 1
