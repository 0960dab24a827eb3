"""What was published, from its receipts: a list, and whether each still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.errors import VerificationError
from recvirt.publish.config import Targets
from recvirt.publish.engine import Options
from recvirt.publish.receipt import Receipt, all_receipts, load_receipt, verify_receipt
from recvirt.publish.signing import Signer
from recvirt.store import sha256_of


@dataclass(frozen=True)
class Listed:
    """One receipt. ``problem`` is what is wrong with it; nothing is found without looking (``verified``)."""

    path: Path
    receipt: Receipt | None
    verified: bool = False
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        said = dict(self.receipt.data) if self.receipt else None
        return {"path": str(self.path), "verified": self.verified, "problem": self.problem, "receipt": said}


def list_receipts(options: Options, *, image: Path | None = None, verify: bool = False) -> list[Listed]:
    """The receipts, newest last; of ``image`` only, when one is given."""
    targets = Targets(options.config, options.overrides)
    signer = Signer(targets.signing(), options.state_dir)
    targets.done()
    digest = sha256_of(image) if image else None
    found = []
    for path in all_receipts(options.receipts):
        receipt: Receipt | None = None
        try:
            receipt = load_receipt(path)
            if digest is not None and receipt.data["image"]["sha256"] != digest:
                continue
            if verify:
                verify_receipt(receipt, signer)
            found.append(Listed(path, receipt, verified=verify))
        except VerificationError as error:
            found.append(Listed(path, receipt, problem=error.message))
    return sorted(found, key=lambda item: str(item.receipt.data["published"]) if item.receipt else "")


def as_text(found: Sequence[Listed]) -> str:
    """The list as people read it."""
    lines = []
    for item in found:
        if item.receipt is None:
            lines.append(f"BAD  {item.problem}")
            continue
        data = item.receipt.data
        proof = f"proved under {data['acceptance'].get('accelerator')}"
        if data["acceptance"].get("unaccepted"):
            proof = "UNACCEPTED"
        state = "BAD " if item.problem else "ok  " if item.verified else ""
        ids = ", ".join(f"{name}={value}" for name, value in sorted(data["ids"].items()))
        lines.append(f"{state}{data['published']}  {data['target']:<14} {data['image']['name']}  {proof}  {ids}")
        if item.problem:
            lines.append(f"     {item.problem}")
    return "\n".join(lines) if lines else "nothing was published from here yet"
