"""The receipt of a published image: what it is, that it was proved, where it is now; signed, and free of secrets.

One JSON file an image and target below ``build/receipts``, its signature beside it. The bytes are canonical (sorted
keys, one form), so a changed byte shows even where the meaning stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recvirt import __version__
from recvirt.errors import VerificationError
from recvirt.publish.provider import Published
from recvirt.publish.signing import RECEIPT, Signer
from recvirt.publish.source import Source

SCHEMA = 1
_SIGNATURE = ".sig"
#: What a later run may say otherwise about the same image at the same place.
_OF_A_RUN = {"published": "", "checked": ""}
#: No provider's identity has such a word in it; a mistake in a provider must not end in a file that people pass on.
_SECRETS = ("password", "secret", "token=", "sig=", "x-amz-signature", "private key", "authorization", "bearer ")


@dataclass(frozen=True)
class Receipt:
    """One receipt on the disk."""

    path: Path
    data: Mapping[str, Any]

    @property
    def signature_path(self) -> Path:
        """Where its signature is."""
        return self.path.with_name(self.path.name + _SIGNATURE)


def canonical_bytes(data: Mapping[str, Any]) -> bytes:
    """The one way in which a receipt is written."""
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def receipt_data(target: str, provider: str, image: Source, published: Published, now: datetime) -> dict[str, Any]:
    """What a receipt says."""
    proof = {"unaccepted": True} if image.acceptance is None else image.acceptance.as_json()
    data = {
        "schema": SCHEMA,
        "recvirt": __version__,
        "target": target,
        "provider": provider,
        "image": {
            "name": image.name, "sha256": image.sha256, "format": image.format, "bytes": image.file_bytes,
            "virtual_bytes": image.virtual_bytes, "created": image.created,
        },
        "profile": image.profile,
        "kernel": image.kernel,
        "suite": image.suite,
        "acceptance": proof,
        "ids": dict(published.ids),
        "locations": list(published.locations),
        "checked": published.checked,
        "published": now.astimezone(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    text = json.dumps([data["ids"], data["locations"], data["checked"]]).lower()
    found = [word for word in _SECRETS if word in text]
    if found:
        raise VerificationError(f"the receipt for {target} would hold what looks like a secret ({found[0]!r})")
    return data


def receipt_path(folder: Path, target: str, image: Source) -> Path:
    """Where the receipt of an image and target lies."""
    return folder / f"{target}-{image.name}.json"


def write_receipt(folder: Path, data: Mapping[str, Any], path: Path, signer: Signer) -> tuple[Receipt, bool]:
    """Write and sign; or keep the one that is there, if it holds and says the same but for when and how.

    Returns the receipt, and whether it is new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            old = load_receipt(path)
            verify_receipt(old, signer)
            if {**old.data, **_OF_A_RUN} == {**data, **_OF_A_RUN}:
                return old, False
        except VerificationError:
            pass  # a damaged one, or another key's: written anew
    text = canonical_bytes(data)
    receipt = Receipt(path, data)
    _replace(receipt.signature_path, signer.sign(text, RECEIPT))
    _replace(path, text)
    return receipt, True


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)


def load_receipt(path: Path) -> Receipt:
    """Read one. VerificationError when it is none, or not in its one form."""
    raw = path.read_bytes()
    try:
        data = json.loads(raw)
        texts = (data["target"], data["published"], data["image"]["name"], data["image"]["sha256"])
        whole = data["schema"] == SCHEMA and all(isinstance(text, str) for text in texts)
        whole = whole and isinstance(data["ids"], dict) and isinstance(data["acceptance"], dict)
    except (ValueError, KeyError, TypeError):
        whole, data = False, {}
    if not whole or canonical_bytes(data) != raw:
        raise VerificationError(f"{path} is no whole receipt, or was changed", hint="publish the image again")
    return Receipt(path, data)


def verify_receipt(receipt: Receipt, signer: Signer, *, image_sha256: str | None = None) -> None:
    """VerificationError unless its signature holds, it lies under its own name, and it is of the image asked about."""
    image = receipt.data["image"]
    try:
        signature = receipt.signature_path.read_bytes()
    except OSError:
        raise VerificationError(f"{receipt.path} has no signature", hint="publish the image again") from None
    try:
        signer.verify(receipt.path.read_bytes(), signature, RECEIPT)
    except VerificationError as error:
        raise VerificationError(f"{receipt.path}: {error.message}", hint=error.hint) from None
    if receipt.path.name != f"{receipt.data['target']}-{image['name']}.json":
        raise VerificationError(f"{receipt.path} is the receipt of {image['name']} at {receipt.data['target']}")
    if image_sha256 is not None and image["sha256"] != image_sha256:
        raise VerificationError(f"{receipt.path} is of another image (SHA-256 {image['sha256'][:12]}...)")


def all_receipts(folder: Path) -> list[Path]:
    """The receipts in a folder, by name."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
