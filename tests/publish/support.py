"""Images, reports and runs for the tests: small, and of the same bytes each time."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from recvirt.accept.registry import OPTIONAL_SCENES, all_checks
from recvirt.accept.results import CheckResult, ImageFacts, Report
from recvirt.cli import cli
from recvirt.publish.budget import Budget
from recvirt.publish.engine import Options, judge, open_targets
from recvirt.publish.provider import AnyProvider, Job
from recvirt.publish.source import Source
from recvirt.store import sha256_of

MIB = 1 << 20
FACTS = {"profile": "default", "suite": "trixie", "epoch": 1_795_000_000, "kernel": {"release": "6.12.1-recvirt"}}


def make_raw(path: Path, *, size: int = 48 * MIB, seed: int = 1, pieces: int = 4) -> Path:
    """A sparse raw disk: a GPT's mark, some random MiBs, a block of written zeros, a last sector that counts."""
    chance = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(size)
        stream.seek(510)
        stream.write(b"\x55\xaaEFI PART")
        for _ in range(pieces):
            stream.seek(chance.randrange(2, size // MIB - 4) * MIB + 4096)
            stream.write(chance.randbytes(MIB))
        stream.seek(size - 3 * MIB)
        stream.write(bytes(MIB))
        stream.seek(size - 512)
        stream.write(b"end!" * 128)
    return path


def make_image(folder: Path, kind: str = "qcow2", *, accepted: bool = True, **more: Any) -> Path:
    """An image as a build leaves it: the file, image.json and, if ``accepted``, its report."""
    raw = make_raw(folder / "disk.raw", **more)
    path = raw
    if kind == "qcow2":
        path = folder / "disk.qcow2"
        convert(raw, path, "-c", "-o", "compression_type=zstd")
        raw.unlink()
    (folder / "image.json").write_text(json.dumps(FACTS))
    if accepted:
        write_report(path)
    return path


def convert(source: Path, target: Path, *options: str, kind: str = "qcow2") -> Path:
    """qemu-img convert from raw."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, *options, source, target], check=True)
    return target


def report_of(image: Path, **changed: Any) -> Report:
    """A report of a whole run that passed."""
    results = tuple(
        CheckResult(check.name, check.scene, check.title, "passed", 0.1, "fine")
        for check in all_checks()
        if check.scene not in OPTIONAL_SCENES
    )
    facts = ImageFacts(str(image), sha256_of(image), "qcow2", image.stat().st_size, 48 * MIB)
    said: dict[str, Any] = {
        "profile": "default", "image": facts, "accelerator": "tcg", "accelerator_reason": "no /dev/kvm",
        "qemu_version": "10.0", "started": "2026-11-27T20:00:00+00:00", "seconds": 100.0, "results": results, **changed,
    }  # fmt: skip
    return Report(**said)


def write_report(image: Path, report: Report | None = None) -> Path:
    """The report where ``recvirt test`` leaves it."""
    path = image.parent / "acceptance/report.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((report or report_of(image)).as_json(), indent=1, sort_keys=True) + "\n")
    return path


@dataclass
class Place:
    """Folders of one test, and the command line in them."""

    folder: Path

    @property
    def options(self) -> list[str]:
        return ["--state-dir", str(self.folder / "state"), "--receipts", str(self.receipts)]

    @property
    def receipts(self) -> Path:
        return self.folder / "receipts"

    def run(self, *words: str | Path) -> Result:
        """``recvirt`` with these words; an error is raised as it is, for the test to look at."""
        return CliRunner().invoke(cli, ["--progress", "plain", *map(str, words)], catch_exceptions=False)

    def publish(self, target: str, image: Path, settings: Sequence[str], *more: str) -> list[dict[str, Any]]:
        """Publish; what the command line says in JSON."""
        sets = [word for setting in settings for word in ("--set", f"{target}.{setting}")]
        result = self.run("publish", target, image, *sets, *self.options, "--json", *more)
        found: list[dict[str, Any]] = json.loads(result.stdout)
        return found

    def plan(self, target: str, image: Path, settings: Sequence[str]) -> dict[str, Any]:
        """What a run would do."""
        (plan,) = self.publish(target, image, settings, "--dry-run")
        return plan

    def provider(self, target: str, image: Path | None, settings: Sequence[str], workers: int = 4) -> AnyProvider:
        """The provider itself, with a budget that does not wait."""
        options = Options(
            overrides=tuple(f"{target}.{setting}" for setting in settings), state_dir=self.folder / "state",
            receipts=self.receipts, unaccepted=True, workers=workers,
        )  # fmt: skip
        source: Source | None = judge(image, options) if image else None
        (provider,) = open_targets([target], source, options)
        quick(provider.job)
        return provider


def quick(job: Job) -> Budget:
    """Waits between tries are not what a test is about."""
    job.budget.sleep = lambda _seconds: None
    return job.budget
