"""Whether an image proved itself: its acceptance report, whole, unchanged, passed, and of exactly this image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.accept.registry import OPTIONAL_SCENES, all_checks
from recvirt.accept.results import seal_of
from recvirt.errors import AcceptanceError
from recvirt.store import sha256_of

#: Where ``recvirt test`` leaves it, below the folder of the image.
PLACES = ("acceptance/report.json", "report.json")


@dataclass(frozen=True)
class Acceptance:
    """What a receipt says about an image's proof."""

    report: Path
    sha256: str
    started: str
    accelerator: str
    passed: int
    skipped: int

    def as_json(self) -> dict[str, Any]:
        """For the receipt: no paths of this machine."""
        return {
            "report_sha256": self.sha256, "started": self.started, "accelerator": self.accelerator,
            "passed": self.passed, "skipped": self.skipped,
        }  # fmt: skip


def find_report(image: Path) -> Path | None:
    """The report beside an image, if there is one."""
    return next((path for place in PLACES if (path := image.parent / place).is_file()), None)


def check_report(report: Path | None, image: Path, image_sha256: str, profile: str) -> Acceptance:
    """What the report proves about the image. AcceptanceError, with the reason, when it proves nothing."""
    if report is None:
        raise _refused(image, "it has no acceptance report", profile)
    try:
        text = report.read_text()
        data = json.loads(text)
        image_facts, results, counts = data["image"], data["results"], data["counts"]
        names = {result["name"]: result["outcome"] for result in results}
        ok, proved, sha256, seal = data["ok"], data["profile"], image_facts["sha256"], data["seal"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(image, f"{report} is no whole acceptance report ({error!r})", profile) from None
    # The same text again: one changed byte anywhere shows, in blanks too.
    if seal != seal_of(data) or text != json.dumps(data, indent=1, sort_keys=True) + "\n":
        raise _refused(image, f"{report} was changed after the run that wrote it", profile)
    if sha256 != image_sha256:
        raise _refused(image, f"{report} is about another image (SHA-256 {str(sha256)[:12]}...)", profile)
    if proved != profile:
        raise _refused(image, f"{report} proves another profile ({proved})", profile)
    bad = sorted(name for name, outcome in names.items() if outcome not in ("passed", "skipped"))
    if ok is not True or bad:
        raise _refused(image, f"it did not pass: {', '.join(bad) or 'see the report'} ({report})", profile)
    wanted = {check.name for check in all_checks() if check.scene not in OPTIONAL_SCENES}
    absent = sorted(wanted - set(names))
    if absent:
        few = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        raise _refused(image, f"the run was not whole: {len(absent)} checks are missing ({few})", profile)
    return Acceptance(
        report, sha256_of(report), str(data["started"]), str(data["accelerator"]), counts["passed"], counts["skipped"]
    )


def _refused(image: Path, why: str, profile: str) -> AcceptanceError:
    return AcceptanceError(
        f"{image} did not prove itself: {why}",
        hint=f"prove it: recvirt test {profile}   (or publish it as it is: --unaccepted, which the receipt records)",
    )
