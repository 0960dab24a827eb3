"""Proves an image by booting it and by booting VMs inside it.

Owns: the checks, the boots they share, the report. Does not own: how a VM is started (:mod:`recvirt.qemu`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from recvirt.accept.context import Acceptance, Options, Promises
from recvirt.accept.registry import Check, select
from recvirt.accept.reports import REPORTS, write_reports
from recvirt.accept.results import ImageFacts, Report
from recvirt.accept.runner import play
from recvirt.errors import AcceptanceError
from recvirt.model import Profile
from recvirt.qemu import find_accelerator, image_info, make_key
from recvirt.qemu.vm import STATE_LOG, clean_console
from recvirt.sandbox import ToolsRoot
from recvirt.store import check_room, remove_tree, sha256_of
from recvirt.ui import format_seconds, reporter

__all__ = ["Options", "Promises", "run_acceptance", "select"]

#: An image that has one of them carries the Nested Cloud, or a part of it.
CLOUD_PACKAGES = {"recvirt-cloud", "recvirt-cloud-central", "recvirt-cloud-worker"}
#: Kept after a run, below the output folder.
CONSOLES = "consoles"
#: What the overlays of an ordinary run grow to, and some more.
_SPACE_BYTES = 2_000_000_000


def run_acceptance(
    image: Path,
    profile: Profile,
    tools: ToolsRoot,
    out_dir: Path,
    *,
    promises: Promises,
    options: Options,
    extra_tools: Mapping[str, ToolsRoot] | None = None,
    debs: Mapping[str, Path] | None = None,
    worker_image: Path | None = None,
    older_disk: Path | None = None,
) -> Report:
    """Boot ``image`` on overlays, run the checks, and write report.json, junit.xml, report.html and the console logs.

    Raises AcceptanceError, after the reports are written, unless every check passed or was skipped for a reason.
    """
    # The cloud is proved wherever it is promised; it needs no asking for.
    scenes = (*options.scenes, "cloud") if CLOUD_PACKAGES & set(promises.packages) else options.scenes
    checks = select(options.checks, scenes)
    started, clock = datetime.now(UTC), time.monotonic()
    image = image.resolve()
    out_dir = out_dir.resolve()
    work = out_dir / "work"
    for old in (work, out_dir / CONSOLES):
        if old.exists():
            remove_tree(old)
    for name in REPORTS:
        (out_dir / name).unlink(missing_ok=True)  # an earlier run's would pass for this one's
    check_room(out_dir, _SPACE_BYTES)
    work.mkdir(parents=True)
    acceptance = Acceptance(
        image=image, image_facts=_facts(tools, image), profile=profile, promises=promises, tools=tools,
        accelerator=find_accelerator(tools), work_dir=work, key=make_key(work), options=options,
        extra_tools=dict(extra_tools or {}), debs=dict(debs or {}), worker_image=worker_image,
        older_disk=older_disk,
    )  # fmt: skip
    try:
        play(acceptance, checks)
        for overlay in work.rglob("*.qcow2"):
            overlay.unlink()  # the reports may need their room
        report = _report(acceptance, checks, started, time.monotonic() - clock)
        paths = write_reports(report, out_dir)
        _keep_consoles(report, work, out_dir / CONSOLES)
    finally:
        remove_tree(work)
    if not report.ok:
        names = ", ".join(result.name for result in report.bad) or "no check could be run"
        raise AcceptanceError(
            f"{profile.name} did not prove itself: {names}", hint=f"the report with the console logs: {paths[2]}"
        )
    reporter.info(
        f"{profile.name}: {report.count('passed')} checks passed, {report.count('skipped')} skipped, "
        f"in {format_seconds(report.seconds)} under {report.accelerator}; report: {paths[2]}"
    )
    return report


def _facts(tools: ToolsRoot, image: Path) -> ImageFacts:
    info = image_info(tools, image)
    return ImageFacts(
        path=str(image), sha256=sha256_of(image), format=str(info["format"]), bytes=image.stat().st_size,
        virtual_bytes=int(info["virtual-size"]),
    )  # fmt: skip


def _report(acceptance: Acceptance, checks: Sequence[Check], started: datetime, seconds: float) -> Report:
    order = {check.name: number for number, check in enumerate(checks)}
    results = tuple(sorted(acceptance.results, key=lambda result: order[result.name]))
    consoles = {
        str(path.parent.relative_to(acceptance.work_dir)): clean_console(path.read_bytes())
        for path in sorted(acceptance.work_dir.rglob("console.log"))
    }
    return Report(
        profile=acceptance.profile.name, image=acceptance.image_facts, accelerator=acceptance.accelerator.name,
        accelerator_reason=acceptance.accelerator.reason, qemu_version=acceptance.qemu_version,
        started=started.isoformat(timespec="seconds"), seconds=round(seconds, 1), results=results,
        measures=dict(acceptance.measures), consoles=consoles,
    )  # fmt: skip


def _keep_consoles(report: Report, work_dir: Path, folder: Path) -> None:
    if folder.exists():
        remove_tree(folder)
    folder.mkdir(parents=True)
    for name, text in report.consoles.items():
        (folder / f"{name.replace('/', '-')}.log").write_text(text, errors="replace")
    for state in work_dir.rglob(STATE_LOG):
        name = str(state.parent.relative_to(work_dir)).replace("/", "-")
        state.rename(folder / f"{name}-{STATE_LOG}")
