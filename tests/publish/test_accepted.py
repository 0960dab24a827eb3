"""Only what proved itself is published: a report that is whole, passed, unchanged and of this very image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recvirt.accept.results import CheckResult
from recvirt.errors import AcceptanceError
from recvirt.publish.accepted import check_report, find_report
from recvirt.store import sha256_of
from tests.publish.support import Place, make_image, report_of, write_report


def accept(image: Path, profile: str = "default") -> object:
    return check_report(find_report(image), image, sha256_of(image), profile)


@pytest.fixture
def own(image: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(image.parent, tmp_path / "own")
    return tmp_path / "own/disk.qcow2"


def refused(image: Path, words: str) -> None:
    with pytest.raises(AcceptanceError, match=words) as caught:
        accept(image)
    assert "recvirt test default" in caught.value.hint
    assert caught.value.exit_code == 7


def test_a_whole_report_is_taken(image: Path) -> None:
    found = check_report(find_report(image), image, sha256_of(image), "default")
    assert found.accelerator == "tcg"
    assert found.passed > 50
    assert found.sha256 == sha256_of(image.parent / "acceptance/report.json")


def test_no_report_no_publishing(tmp_path: Path) -> None:
    refused(make_image(tmp_path, accepted=False), "no acceptance report")


def test_a_report_of_another_image_is_refused(own: Path) -> None:
    with own.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"!")
    refused(own, "another image")


def test_a_report_of_another_profile_is_refused(own: Path) -> None:
    write_report(own, report_of(own, profile="minimal"))
    refused(own, "another profile")


@pytest.mark.parametrize("outcome", ["failed", "not-run"])
def test_a_failed_check_is_refused_by_name(own: Path, outcome: str) -> None:
    report = report_of(own)
    first = report.results[0]
    bad = CheckResult(first.name, first.scene, first.title, outcome, 0.1, "no")  # type: ignore[arg-type]
    write_report(own, report_of(own, results=(bad, *report.results[1:])))
    refused(own, f"did not pass: {first.name}")


def test_a_run_of_a_few_checks_is_not_whole(own: Path) -> None:
    report = report_of(own)
    write_report(own, report_of(own, results=report.results[:-3]))
    refused(own, "not whole: 3 checks are missing")


def test_every_changed_byte_is_seen(own: Path) -> None:
    path = own.parent / "acceptance/report.json"
    text = path.read_bytes()
    step = max(1, len(text) // 200)
    for place in range(0, len(text), step):
        changed = bytearray(text)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(AcceptanceError):
            accept(own)
    path.write_bytes(text + b"\n")
    refused(own, "was changed")
    data = json.loads(text)
    data["ok"] = True
    path.write_text(json.dumps(data))  # the same meaning in another form
    refused(own, "was changed")
    path.write_bytes(text[: len(text) // 2])
    refused(own, "no whole acceptance report")


def test_unaccepted_is_a_wish_that_the_receipt_records(place: Place, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", accepted=False)
    settings = [f"path={tmp_path / 'mirror'}"]
    with pytest.raises(AcceptanceError):
        place.publish("mirror", image, settings)
    assert not (tmp_path / "mirror").exists()
    (done,) = place.publish("mirror", image, settings, "--unaccepted")
    assert json.loads(Path(done["receipt"]).read_text())["acceptance"] == {"unaccepted": True}


def test_a_good_report_counts_with_unaccepted_too(place: Place, image: Path, tmp_path: Path) -> None:
    (done,) = place.publish("mirror", image, [f"path={tmp_path / 'mirror'}"], "--unaccepted")
    assert json.loads(Path(done["receipt"]).read_text())["acceptance"]["passed"] > 50
