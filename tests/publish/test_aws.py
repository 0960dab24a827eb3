"""AWS: requests checked against botocore's service model, and what EC2 may say that moto does not."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.amazon import code_of, linear_checksum, refusal
from recvirt.publish.errors import DeniedError, TransientError
from recvirt.publish.providers.aws import Aws
from recvirt.publish.snapshot import BLOCK
from tests.publish.servers import ROOT
from tests.publish.support import Place

stub = pytest.importorskip("botocore.stub")


@pytest.fixture
def aws(place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    found = place.provider("aws", image, ["region=eu-central-1", "deprecate_days=90"])
    assert isinstance(found, Aws)
    return found


def answer(code: str, status: int = 400, message: str = "said") -> dict[str, Any]:
    return {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


def test_register_images_request_fits_the_service(aws: Aws) -> None:
    with stub.Stubber(aws._ec2) as ec2:
        ec2.add_response("register_image", {"ImageId": "ami-1"}, aws.register_request("snap-1"))
        assert aws._register("snap-1") == "ami-1"
    request = aws.register_request("snap-1")
    assert (request["BootMode"], request["ImdsSupport"], request["EnaSupport"]) == ("uefi-preferred", "v2.0", True)
    assert 3 <= len(request["Name"]) <= 128
    assert len(request["Description"]) <= 255


def test_the_date_of_deprecation_is_set_once(aws: Aws) -> None:
    made = datetime(2026, 11, 27, 10, 20, 30, tzinfo=UTC)
    wanted = (made + timedelta(days=90)).replace(second=0)
    there = {"ImageId": "ami-1", "CreationDate": "2026-11-27T10:20:30.000Z"}
    with stub.Stubber(aws._ec2) as ec2:
        ec2.add_response("describe_images", {"Images": [there]})
        ec2.add_response("enable_image_deprecation", {"Return": True}, {"ImageId": "ami-1", "DeprecateAt": wanted})
        aws._let_use(aws._ec2, "ami-1")
        ec2.add_response("describe_images", {"Images": [{**there, "DeprecationTime": "2027-02-25T10:20:00.000Z"}]})
        aws._let_use(aws._ec2, "ami-1")
        ec2.assert_no_pending_responses()


def test_a_name_that_another_publisher_took_first_is_found(aws: Aws) -> None:
    digest = aws.job.image.sha256
    with stub.Stubber(aws._ec2) as ec2:
        ec2.add_client_error("register_image", "InvalidAMIName.Duplicate")
        ours = {"ImageId": "ami-2", "Tags": [{"Key": "recvirt-digest", "Value": digest}]}
        ec2.add_response("describe_images", {"Images": [ours]})
        assert aws._register("snap-1") == "ami-2"


def test_a_name_that_somebody_else_has_is_told(aws: Aws) -> None:
    with stub.Stubber(aws._ec2) as ec2:
        ec2.add_response("describe_images", {"Images": [{"ImageId": "ami-9", "Description": "mine"}]})
        with pytest.raises(PublishError, match="is taken by ami-9"):
            aws._image(aws._ec2)


@pytest.mark.parametrize(
    ("code", "status", "kind", "words"),
    [
        ("UnauthorizedOperation", 403, DeniedError, "get-caller-identity"),
        ("ExpiredToken", 400, DeniedError, "get-caller-identity"),
        ("AuthFailure", 401, DeniedError, "rights"),
        ("AccessDeniedException", 403, DeniedError, "rights"),
        ("SnapshotLimitExceeded", 400, PublishError, "quota"),
        ("ServiceQuotaExceededException", 402, PublishError, "quota"),
        ("InvalidParameterValue", 400, PublishError, ""),
        ("RequestLimitExceeded", 503, TransientError, ""),
        ("InternalError", 500, TransientError, ""),
        ("ThrottlingException", 400, TransientError, ""),
    ],
)
def test_what_amazon_refuses_is_told_apart(code: str, status: int, kind: type[PublishError], words: str) -> None:
    error = refusal("register the AMI", answer(code, status))
    assert type(error) is kind
    assert words in error.hint
    assert code in error.message
    assert "said" in error.message


def test_a_snapshot_that_is_not_seen_yet_is_waited_for() -> None:
    waited = refusal("send block 0", answer("ResourceNotFoundException", 404), settling=True)
    assert isinstance(waited, TransientError)
    gone = refusal("look", answer("InvalidSnapshot.NotFound", 400))
    assert not isinstance(gone, TransientError)
    assert code_of(gone) == "InvalidSnapshot.NotFound"


def test_no_credentials_is_an_error_with_a_hint(place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DeniedError, match="credentials"):
        place.provider("aws", image, ["region=eu-central-1"]).plan()


def test_a_region_that_is_not_there_is_given_up_with_a_hint(aws: Aws, place: Place, image: Path) -> None:
    far = place.provider("aws", image, ["region=eu-central-1", "endpoint=http://127.0.0.1:1"])
    with pytest.raises(PublishError, match="given up") as caught:
        far.plan()
    assert "region" in caught.value.hint
    with pytest.raises(ConfigError, match="region"):
        place.provider("aws", image, ["region=moon"])


def test_no_region_is_told(place: Place, image: Path) -> None:
    with pytest.raises(ConfigError, match="region"):
        place.provider("aws", image, []).check()
        place.provider("aws", image, []).plan()


def test_tags_that_ec2_refuses_are_refused_here(place: Place, image: Path) -> None:
    for tag in ("aws:x", "recvirt-digest"):
        with pytest.raises(ConfigError, match="tags"):
            place.provider("aws", image, ["region=eu-central-1", f"tags={{'{tag}': x}}"]).check()


def test_the_linear_checksum_is_over_the_blocks_own() -> None:
    parts = [hashlib.sha256(bytes([n]) * 512).digest() for n in range(3)]
    told = linear_checksum([base64.b64encode(part).decode() for part in parts])
    assert base64.b64decode(told) == hashlib.sha256(b"".join(parts)).digest()


class Ebs:
    """The service as its documentation has it: stricter than any stand-in."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.completed: dict[str, Any] = {}

    def put_snapshot_block(self, **said: Any) -> dict[str, Any]:
        assert len(said["BlockData"]) == said["DataLength"] == BLOCK
        assert base64.b64decode(said["Checksum"]) == hashlib.sha256(said["BlockData"]).digest()
        assert said["ChecksumAlgorithm"] == "SHA256"
        assert any(said["BlockData"])
        self.blocks[said["BlockIndex"]] = said["BlockData"]
        return {}

    def complete_snapshot(self, **said: Any) -> dict[str, Any]:
        digests = b"".join(hashlib.sha256(self.blocks[n]).digest() for n in sorted(self.blocks))
        assert said["ChangedBlocksCount"] == len(self.blocks)
        assert base64.b64decode(said["Checksum"]) == hashlib.sha256(digests).digest()
        assert said["ChecksumAggregationMethod"] == "LINEAR"
        self.completed = said
        return {}


def test_blocks_and_checksums_are_what_ebs_wants(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots, ebs = aws._snapshots, Ebs()
    monkeypatch.setattr(snapshots, "_ebs", ebs)
    monkeypatch.setattr(snapshots, "state", lambda _snapshot: "completed")
    with aws.job.journal() as journal:
        journal.begin({"snapshot": "snap-1"})
        assert snapshots._send("snap-1", aws._blocks, journal) == len(aws._blocks) * BLOCK
        snapshots._complete("snap-1", aws._blocks, journal)
    with aws.job.image.disk() as disk:
        for number, data in ebs.blocks.items():
            assert data == disk.read(number * BLOCK, BLOCK).ljust(BLOCK, b"\0")


class Tokens:
    """What StartSnapshot says to the tokens it gets, one after the other."""

    def __init__(self, *states: str) -> None:
        self._states = states
        self.tokens: list[str] = []

    def start_snapshot(self, **said: Any) -> dict[str, Any]:
        self.tokens.append(said["ClientToken"])
        number = len(self.tokens)
        return {"SnapshotId": f"snap-{number}", "Status": self._states[number - 1]}


def test_a_snapshot_that_another_publisher_has_just_completed_is_shared(
    aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws._snapshots, "_ebs", Tokens("completed"))
    monkeypatch.setattr(aws._snapshots, "_find", lambda *_: None)
    monkeypatch.setattr(aws._snapshots, "state", lambda _snapshot: "completed")
    assert aws._snapshots.make(aws._blocks) == ("snap-1", 0)


def test_all_publishers_go_on_to_the_same_token_where_a_snapshot_was_deleted(
    aws: Aws, place: Place, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for folder in ("a", "b"):
        other = Place(place.folder / folder).provider("aws", image, ["region=eu-central-1"])
        assert isinstance(other, Aws)
        ebs = Tokens("completed", "error", "pending")
        monkeypatch.setattr(other._snapshots, "_ebs", ebs)
        monkeypatch.setattr(other._snapshots, "_find", lambda *_: None)
        monkeypatch.setattr(other._snapshots, "_appears", lambda snapshot: snapshot == "snap-3")
        with other.job.journal() as journal:
            assert other._snapshots._begin(journal) == ("snap-3", False)
        said.append(ebs.tokens)
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def test_a_snapshot_with_other_blocks_is_found_out(aws: Aws) -> None:
    snapshots = aws._snapshots
    listed = [{"BlockIndex": n, "BlockToken": "t"} for n in aws._blocks[:-1]]
    with stub.Stubber(snapshots._ebs) as ebs:
        ebs.add_response("list_snapshot_blocks", {"Blocks": listed, "VolumeSize": 1, "BlockSize": BLOCK})
        with pytest.raises(VerificationError, match="is not what was sent"):
            snapshots.compare("snap-1", aws._blocks, whole=True)


def test_the_policy_allows_each_call_and_no_other(aws: Aws) -> None:
    import re

    text = "".join((ROOT / "recvirt/publish" / name).read_text() for name in ("snapshot.py", "providers/aws.py"))
    calls = {"".join(w.title() for w in name.split("_")) for name in re.findall(r"(?:ebs|ec2)\.([a-z]+_[a-z_]+)", text)}
    policy = json.loads((ROOT / "docs/policies/aws.json").read_text())
    actions = {action.partition(":")[2] for said in policy["Statement"] for action in said["Action"]}
    assert calls == actions
