"""Receipts: signed, canonical, free of secrets; one changed byte, another image or another key is found."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from recvirt.errors import VerificationError
from recvirt.publish.provider import Published
from recvirt.publish.receipt import canonical_bytes, receipt_data
from recvirt.publish.source import load_source
from tests.publish.support import Place, make_image


@pytest.fixture
def receipt(place: Place, image: Path, tmp_path: Path) -> Path:
    (done,) = place.publish("mirror", image, [f"path={tmp_path / 'mirror'}"])
    return Path(done["receipt"])


def verify(place: Place, *words: str) -> tuple[int, list[dict[str, object]]]:
    result = place.run("published", "--verify", "--json", *place.options, *words)
    return result.return_value if hasattr(result, "return_value") else result.exit_code, json.loads(result.stdout)


def problems(place: Place) -> list[str]:
    return [str(item["problem"]) for item in verify(place)[1]]


def test_a_receipt_says_what_and_where_and_holds(place: Place, receipt: Path, image: Path) -> None:
    data = json.loads(receipt.read_text())
    assert data["image"]["sha256"] == load_source(image, lambda _d, _p: None).sha256
    assert (data["profile"], data["kernel"], data["provider"]) == ("default", "6.12.1-recvirt", "mirror")
    assert len(data["acceptance"]["report_sha256"]) == 64
    assert problems(place) == [""]
    assert [i["receipt"]["profile"] for i in verify(place, str(image))[1]] == ["default"]  # type: ignore[index]


def test_every_changed_byte_is_found(place: Place, receipt: Path) -> None:
    text = receipt.read_bytes()
    for at in range(0, len(text), max(1, len(text) // 25)):
        receipt.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert problems(place) != [""], at
    receipt.write_bytes(text.replace(b"\n", b"\n ", 1))
    assert problems(place) != [""]
    receipt.write_bytes(text)
    signature = receipt.with_name(receipt.name + ".sig")
    sealed = signature.read_bytes()
    at = sealed.index(b"\n") + 30  # in the first line of what is encoded
    signature.write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
    assert problems(place) != [""]
    signature.unlink()
    assert "no signature" in problems(place)[0]


@pytest.mark.parametrize("key", ["schema", "target", "image", "acceptance", "ids", "published"])
def test_a_receipt_that_lacks_what_is_read_of_it_is_told(place: Place, receipt: Path, key: str) -> None:
    data = json.loads(receipt.read_text())
    for change in ({f"x{key}": data[key]}, {key: 7}):
        receipt.write_bytes(canonical_bytes({**{k: v for k, v in data.items() if k != key}, **change}))
        assert "is no whole receipt" in problems(place)[0]
        assert "is no whole receipt" in place.run("published", *place.options).output


def test_the_receipt_of_another_image_does_not_pass_under_this_name(place: Place, receipt: Path) -> None:
    other = receipt.with_name(receipt.name.replace("-default-", "-minimal-"))
    receipt.rename(other)
    receipt.with_name(receipt.name + ".sig").rename(other.with_name(other.name + ".sig"))
    assert "is the receipt of" in problems(place)[0]


def test_another_keys_signature_is_refused(place: Place, receipt: Path) -> None:
    for name in ("receipt-key", "receipt-key.pub"):
        (place.folder / "state" / name).unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place.folder / "state/receipt-key"], check=True
    )
    assert "nobody who may sign" in problems(place)[0]


def test_a_key_of_ones_own_and_a_list_of_signers(place: Place, image: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ci"], check=True)
    (tmp_path / "allowed").write_text(f"ci@example {(tmp_path / 'ci.pub').read_text()}")
    (tmp_path / "publish.yaml").write_text(
        f"signing: {{key: ci, allowed_signers: allowed}}\nmirror: {{path: {tmp_path / 'mirror'}}}\n"
    )
    place.publish("mirror", image, [])
    assert not (place.folder / "state/receipt-key").exists()
    assert problems(place) == [""]
    (tmp_path / "allowed").write_text("")
    assert problems(place) != [""]


def test_a_second_run_leaves_the_receipt_as_it_is(place: Place, receipt: Path, image: Path, tmp_path: Path) -> None:
    before = (receipt.read_bytes(), receipt.stat().st_mtime_ns)
    (done,) = place.publish("mirror", image, [f"path={tmp_path / 'mirror'}"])
    assert (receipt.read_bytes(), receipt.stat().st_mtime_ns) == before
    assert (done["sent_bytes"], done["new"]) == (0, False)


def test_a_damaged_receipt_is_written_anew(place: Place, receipt: Path, image: Path, tmp_path: Path) -> None:
    receipt.write_text("{}")
    place.publish("mirror", image, [f"path={tmp_path / 'mirror'}"])
    assert problems(place) == [""]


def test_what_looks_like_a_secret_does_not_get_into_a_receipt(image: Path) -> None:
    source = load_source(image, lambda _d, _p: None)
    from datetime import UTC, datetime

    published = Published({"blob": "https://a.example/b?sig=abc"}, "compared")
    with pytest.raises(VerificationError, match="secret"):
        receipt_data("azure", "azure", source, published, datetime.now(UTC))


def test_the_key_is_its_owners_alone(place: Place, receipt: Path) -> None:
    assert receipt.exists()
    assert (place.folder / "state/receipt-key").stat().st_mode & 0o077 == 0
    assert (place.folder / "state").stat().st_mode & 0o077 == 0


def test_canonical_bytes_are_ascii_and_sorted() -> None:
    assert canonical_bytes({"b": "\u00e9", "a": 1}) == b'{\n "a": 1,\n "b": "\\u00e9"\n}\n'


def test_an_image_that_changes_while_it_is_published_is_refused(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recvirt.publish.providers.mirror import Mirror

    own = make_image(tmp_path / "own")
    real = Mirror.publish

    def and_touch(self: Mirror) -> Published:
        found = real(self)
        os.utime(own, ns=(1, 1))
        return found

    monkeypatch.setattr(Mirror, "publish", and_touch)
    with pytest.raises(VerificationError, match="was changed while"):
        place.publish("mirror", own, [f"path={tmp_path / 'mirror'}"])
    assert not list(place.receipts.glob("*.json"))
