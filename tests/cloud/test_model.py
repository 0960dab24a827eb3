"""What crosses the broker: it comes back as it was, and what does not fit is refused with its place."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.nestedcloud.model import (
    GIB,
    MIB,
    Command,
    DiskSpec,
    InstanceSpec,
    Kind,
    ModelError,
    NicSpec,
    Phase,
    Report,
    decode,
    encode,
)
from tests.cloud.support import instance


def sent(value: Any) -> Any:
    return json.loads(json.dumps(encode(value)))


def test_a_command_comes_back_as_it_was() -> None:
    spec = instance(nics=(NicSpec(str(uuid.uuid4()), "52:54:00:00:00:01", 512),), ssh_keys=("ssh-ed25519 AAAA x",))
    command = Command(str(uuid.uuid4()), 3, Kind.LAUNCH, spec.generation, spec, args={"networks": []})
    assert decode(Command, sent(command)) == command


@given(st.text(max_size=200))
def test_user_data_are_never_changed(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # half a surrogate pair is no text
    assert decode(InstanceSpec, sent(instance(user_data=text))).user_data == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vcpus": "2"}, "InstanceSpec.vcpus: want int, not str"),
        ({"vcpus": True}, "InstanceSpec.vcpus: want int, not bool"),
        ({"vcpus": 9}, "InstanceSpec: 9 vCPUs of at most 4"),
        ({"nics": {}}, "InstanceSpec.nics: want a list"),
        ({"nics": [{"network": "x", "mac": "y"}]}, r"InstanceSpec.nics\[0\]: 'x' is no UUID"),
        ({"name": "../etc"}, "'../etc' is no name"),
        ({"name": "a" * 64}, "is no name"),
        ({"name": "web\n"}, "is no name"),
        ({"uuid": "../../etc/passwd"}, "is no UUID"),
        ({"root": None}, "InstanceSpec.root: want an object"),
        ({"extra": 1}, "InstanceSpec: unknown extra"),
        ({"priority": 0}, "priority 0"),
        ({"memory_bytes": MIB + 1}, "memory"),
        ({"ssh_keys": ["a\nb"]}, "an SSH key is one line"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        decode(InstanceSpec, {**sent(instance()), **change})


def test_what_is_missing_is_named() -> None:
    data = sent(instance())
    del data["name"]
    with pytest.raises(ModelError, match="InstanceSpec: name is missing"):
        decode(InstanceSpec, data)


@pytest.mark.parametrize("data", [None, 7, "x", []])
def test_something_else_altogether_is_refused(data: Any) -> None:
    with pytest.raises(ModelError, match="Report: want an object"):
        decode(Report, data)


def test_a_newer_protocol_is_refused() -> None:
    data = sent(Command(str(uuid.uuid4()), 1, Kind.START, 1)) | {"protocol": 99}
    with pytest.raises(ModelError, match="newer"):
        decode(Command, data)


@pytest.mark.parametrize("mac", ["52:54:00:00:00", "52:54:00:00:00:0G", "01:00:00:00:00:00", "52:54:00:00:00:01\n", ""])
def test_a_mac_that_is_none_is_refused(mac: str) -> None:
    with pytest.raises(ModelError):
        NicSpec(str(uuid.uuid4()), mac)


@pytest.mark.parametrize(("size", "kind"), [(0, "raw"), (513, "raw"), (-512, "qcow2"), (GIB, "vmdk")])
def test_a_disk_that_is_none_is_refused(size: int, kind: str) -> None:
    with pytest.raises(ModelError):
        DiskSpec(str(uuid.uuid4()), size, kind)


def test_only_the_last_phases_are_final() -> None:
    assert [phase for phase in Phase if phase.is_final] == [Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED]
