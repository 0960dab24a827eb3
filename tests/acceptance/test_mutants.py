"""For every check an image that it rejects: none of them passes whatever it is shown.

Many faults go into one image, so that a few boots show all of them; each check must name its own.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from recvirt.accept import Options, run_acceptance, select
from recvirt.accept.context import Acceptance
from recvirt.accept.promise import promises_of
from recvirt.accept.registry import all_checks
from recvirt.accept.results import CheckResult
from recvirt.cli import App
from recvirt.cli.vm import for_upgrade
from recvirt.errors import AcceptanceError
from recvirt.model import Profile
from recvirt.profile import load_profile
from recvirt.qemu import make_overlay
from recvirt.sandbox import ToolsRoot
from tests.acceptance.spoilt import (
    BROKEN_PROMISES,
    CLOUD,
    CLOUD_ALONE,
    DEEP,
    ELSEWHERE,
    FEW,
    KERNELS,
    MANY,
    MATRIX,
    UPGRADE,
    VMX,
    WORKERS_CENTRAL,
    WORKERS_WORKER,
    Mutant,
    spoil,
)
from tests.support.namespace import Namespace
from tests.support.spoil import SpoiltImage

Results = dict[str, CheckResult]

#: More than any step of a sound cloud took under emulation.
HASTY_SECONDS = 400.0


def results_of(
    path: Path, profile: Profile, tools: ToolsRoot, out: Path, names: tuple[str, ...], **promised: Any
) -> Results:
    """Run checks on an image that must be rejected; the results by name."""
    promises = promised.pop("promises")
    with pytest.raises(AcceptanceError):
        run_acceptance(path, profile, tools, out, promises=promises, options=Options(checks=names), **promised)
    data = json.loads((out / "report.json").read_text())
    return {item["name"]: CheckResult(**item) for item in data["results"]}


def rejected(results: Results, name: str, words: str) -> None:
    result = results[name]
    if result.outcome == "skipped":
        pytest.skip(f"{name}: {result.detail}")
    assert result.outcome == "failed", f"{name} {result.outcome}: {result.detail}"
    assert re.search(words, result.detail, re.DOTALL), result.detail


@pytest.fixture(scope="session")
def few(image: Path, profile: Profile, tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One image with the faults that one boot finds."""
    folder = tmp_path_factory.mktemp("few")
    path = spoil(SpoiltImage(tools, image, folder), FEW)
    names = ("boots-on-bios", *(mutant.check for mutant in FEW))
    return results_of(path, profile, tools, folder / "out", names, promises=promises_of(profile, image.parent))


@pytest.fixture(scope="session")
def many(image: Path, profile: Profile, tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One image with all other faults, measured by a profile that promises too much."""
    folder = tmp_path_factory.mktemp("many")
    path = spoil(SpoiltImage(tools, image, folder), (*FEW, *MANY))
    promises = promises_of(profile, image.parent)
    config = (promises.kernel_config or "CONFIG_KVM=m\n").replace("CONFIG_KVM=m\n", "CONFIG_KVM=y\n")
    promises = type(promises)(promises.packages, config, {"kernel": {"release": "0.0.0-absent"}})
    more = {
        "users": [{"name": "eve", "groups": ["sudo"]}], "modules": ["pcspkr_absent"],
        "sysctl": {"vm.swappiness": "7"}, "services": ["absent.service"], "unattended_upgrades": True,
        "console_autologin": "eve",
    }  # fmt: skip
    root = profile.root.model_dump(mode="json") | more
    kernel = profile.kernel.model_dump(mode="json") | {"cmdline": ["recvirt_absent"]}
    data = profile.model_dump(mode="json") | {"root": root, "kernel": kernel}
    greedy = Profile.model_validate(data, strict=False)
    names = tuple(item.name for item in select((), ()) if item.name not in ELSEWHERE)
    return results_of(path, greedy, tools, folder / "out", names, promises=promises)


def test_every_check_has_a_spoilt_image() -> None:
    mutants = (
        *FEW, *MANY, *DEEP, *KERNELS, *MATRIX, *VMX, *CLOUD, *CLOUD_ALONE, *WORKERS_CENTRAL, *WORKERS_WORKER,
        *UPGRADE,
    )  # fmt: skip
    covered = {mutant.check for mutant in mutants} | set(BROKEN_PROMISES) | ELSEWHERE
    assert covered == {item.name for item in all_checks()}


@pytest.mark.few
@pytest.mark.parametrize("mutant", FEW, ids=lambda mutant: mutant.check)
def test_one_boot_rejects(few: Results, mutant: Any) -> None:
    assert few["boots-on-bios"].outcome == "passed", few["boots-on-bios"].detail
    rejected(few, mutant.check, mutant.words)


@pytest.mark.parametrize("mutant", MANY, ids=lambda mutant: mutant.check)
def test_all_scenes_reject(many: Results, mutant: Any) -> None:
    rejected(many, mutant.check, mutant.words)


@pytest.mark.parametrize(("name", "words"), BROKEN_PROMISES.items())
def test_a_promise_that_is_not_kept_is_found(many: Results, name: str, words: str) -> None:
    rejected(many, name, words)


def test_an_image_that_does_not_boot_is_rejected_on_each_firmware(
    image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path
) -> None:
    spoilt = SpoiltImage(tools, image, tmp_path)
    # The boot code of the BIOS (the partition table behind it stays), and the one program of the ESP.
    spoilt.zero(0, 440)
    esp = f"{spoilt.path}@@{spoilt.esp_offset}"
    tools.run(["mdel", "-i", esp, "::/EFI/BOOT/BOOTX64.EFI"], writable=[tmp_path])
    hasty = profile.model_copy(update={"accept": profile.accept.model_copy(update={"boot_seconds": 15})})
    names = ("boots-on-bios", "boots-on-uefi", "no-failed-unit", "hostname")
    found = results_of(spoilt.path, hasty, tools, tmp_path / "out", names, promises=promises_of(profile, image.parent))
    for name in ("boots-on-bios", "boots-on-uefi"):
        rejected(found, name, "an SSH login as rvtest did not come")
    assert {found[name].outcome for name in ("no-failed-unit", "hostname")} == {"not-run"}


@pytest.mark.few
def test_an_image_that_is_not_whole_is_rejected(
    image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path
) -> None:
    promises = promises_of(profile, image.parent)
    overlay = make_overlay(tools, image, image.parent / f"overlay-{tmp_path.name}.qcow2")
    try:
        # Beside its backing file, so that the sandbox shows both.
        found = results_of(overlay, profile, tools, tmp_path / "a", ("image-self-contained",), promises=promises)
    finally:
        overlay.unlink()
    rejected(found, "image-self-contained", "a backing file")
    damaged = tmp_path / "damaged.qcow2"
    shutil.copyfile(image, damaged)
    damaged.chmod(0o644)
    with damaged.open("r+b") as stream:
        # The first refcount block says how often each cluster is used (qcow2's specification): none, it says now.
        stream.seek(48)
        (table,) = struct.unpack(">Q", stream.read(8))
        stream.seek(table)
        (block,) = struct.unpack(">Q", stream.read(8))
        stream.seek(block)
        stream.write(b"\0" * 64)
    found = results_of(damaged, profile, tools, tmp_path / "b", ("image-clean",), promises=promises)
    rejected(found, "image-clean", "qemu-img check")


def spoilt_results(
    image: Path, profile: Profile, tools: ToolsRoot, folder: Path, mutants: tuple[Mutant, ...]
) -> Results:
    """One image with all these faults, and what the checks of these names say of it."""
    path = spoil(SpoiltImage(tools, image, folder), mutants)
    names = tuple(mutant.check for mutant in mutants)
    return results_of(path, profile, tools, folder / "out", names, promises=promises_of(profile, image.parent))


def test_one_level_down_rejects(image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path) -> None:
    found = spoilt_results(image, profile, tools, tmp_path, DEEP)
    for mutant in DEEP:
        rejected(found, mutant.check, mutant.words)


@pytest.fixture(scope="session")
def cloud_image(image: Path) -> Path:
    """An image with the Nested Cloud, built beside the other one."""
    path = image.parent.parent / "nested-cloud" / image.name
    if not path.exists():
        pytest.fail(f"{path} does not exist: recvirt build nested-cloud")
    return path


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that end while somebody still looks: emulated and beside other work, a cloud is given half an hour."""
    patience = Acceptance.patience
    monkeypatch.setattr(Acceptance, "patience", lambda self, seconds: min(patience(self, seconds), HASTY_SECONDS))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("mutants", [CLOUD, *((mutant,) for mutant in CLOUD_ALONE)], ids=lambda group: group[0].check)
def test_a_cloud_that_does_not_do_what_it_says_is_rejected(
    mutants: tuple[Mutant, ...], cloud_image: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    profile = load_profile("nested-cloud").model
    path = spoil(SpoiltImage(tools, cloud_image, tmp_path), mutants)
    # The others need the access and the instance that these make.
    names = ("cloud-is-set-up", "cloud-launches-under-kvm", *(mutant.check for mutant in mutants))
    promises = promises_of(profile, cloud_image.parent)
    found = results_of(path, profile, tools, tmp_path / "out", tuple(dict.fromkeys(names)), promises=promises)
    for mutant in mutants:
        rejected(found, mutant.check, mutant.words)


@pytest.mark.usefixtures("hasty")
def test_a_worker_that_reaches_too_much_or_too_little_is_rejected(
    cloud_image: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    worker_image = cloud_image.parent.parent / "nested-cloud-worker" / cloud_image.name
    if not worker_image.exists():
        pytest.fail(f"{worker_image} does not exist: recvirt build nested-cloud-worker")
    folders = [tmp_path / "central", tmp_path / "worker"]
    for folder in folders:
        folder.mkdir()
    central = spoil(SpoiltImage(tools, cloud_image, folders[0]), WORKERS_CENTRAL)
    worker = spoil(SpoiltImage(tools, worker_image, folders[1]), WORKERS_WORKER)
    found = results_of(
        central, load_profile("nested-cloud").model, tools, tmp_path / "out",
        (
            "worker-joins", "worker-runs-an-instance", "lost-worker-is-told", "worker-shares-volumes",
            "revoked-worker-is-shut-out",
        ),
        promises=promises_of(load_profile("nested-cloud").model, cloud_image.parent), worker_image=worker,
    )  # fmt: skip
    for mutant in (*WORKERS_CENTRAL, *WORKERS_WORKER):
        rejected(found, mutant.check, mutant.words)


@pytest.mark.usefixtures("hasty")
def test_a_disk_whose_instances_die_with_its_services_is_rejected(
    cloud_image: Path, tools: ToolsRoot, cache_dir: Path, tmp_path: Path
) -> None:
    profile = load_profile("nested-cloud").model
    older = spoil(SpoiltImage(tools, cloud_image, tmp_path), UPGRADE)
    app = App(cache_dir=cache_dir, build_dir=cloud_image.parent.parent)
    found = results_of(
        cloud_image, profile, tools, tmp_path / "out", tuple(mutant.check for mutant in UPGRADE),
        promises=promises_of(profile, cloud_image.parent), older_disk=older, debs=for_upgrade(app, profile),
    )  # fmt: skip
    for mutant in UPGRADE:
        rejected(found, mutant.check, mutant.words)


def test_a_menu_that_nobody_keeps_is_rejected(image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path) -> None:
    # Long enough for boots that come up.
    hasty = profile.model_copy(update={"accept": profile.accept.model_copy(update={"boot_seconds": 60})})
    found = spoilt_results(image, hasty, tools, tmp_path, KERNELS)
    for mutant in KERNELS:
        rejected(found, mutant.check, mutant.words)


def test_other_hardware_rejects(image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path) -> None:
    # Long enough for the boot that comes up; the others never will.
    hasty = profile.model_copy(update={"accept": profile.accept.model_copy(update={"boot_seconds": 40})})
    found = spoilt_results(image, hasty, tools, tmp_path, MATRIX)
    for mutant in MATRIX:
        rejected(found, mutant.check, mutant.words)


def test_the_intel_side_rejects(
    image: Path,
    profile: Profile,
    tools: ToolsRoot,
    intel_side: tuple[dict[str, ToolsRoot], dict[str, Path]],
    tmp_path: Path,
) -> None:
    (mutant,) = VMX
    extra_tools, debs = intel_side
    tree = tmp_path / "tree"
    tools.run(["dpkg-deb", "-R", str(debs["kernel"]), str(tree)], readable=[debs["kernel"]], writable=[tmp_path])
    (intel,) = tree.rglob("kvm-intel.ko*")
    (amd,) = tree.rglob("kvm-amd.ko*")
    shutil.copyfile(amd, intel)
    spoilt = tmp_path / "spoilt.deb"
    tools.run(["dpkg-deb", "-Znone", "-b", str(tree), str(spoilt)], writable=[tmp_path])
    found = results_of(
        image, profile, tools, tmp_path / "out", (mutant.check,), promises=promises_of(profile, image.parent),
        debs={**debs, "kernel": spoilt}, extra_tools=extra_tools,
    )  # fmt: skip
    rejected(found, mutant.check, mutant.words)


def test_an_image_that_is_written_meanwhile_is_rejected(
    image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path
) -> None:
    copy = tmp_path / "disk.qcow2"
    shutil.copyfile(image, copy)
    copy.chmod(0o644)

    def write_when_booted() -> None:
        while not any(tmp_path.rglob("console.log")):
            if done.wait(0.2):
                return
        with copy.open("ab") as stream:
            stream.write(b"\0")

    done = threading.Event()
    writer = threading.Thread(target=write_when_booted)
    writer.start()
    try:
        promises = promises_of(profile, image.parent)
        found = results_of(copy, profile, tools, tmp_path / "out", ("image-never-written",), promises=promises)
    finally:
        done.set()
        writer.join()
    rejected(found, "image-never-written", r"its SHA-256 was [0-9a-f]{64} and is")


def test_a_full_disk_under_a_guest_is_named(image: Path, cache_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # As much as a run wants to see free; once the guest runs, somebody else takes it.
    with Namespace('mount -t tmpfs -o size=2100m tmpfs "$1"', str(out)) as space:
        words = ["--cache-dir", str(cache_dir), "test", str(image), "--check", "boots-on-bios", "--out", str(out)]
        argv = [*space.prefix, sys.executable, "-m", "recvirt", *words]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        try:
            while not any(space.path(out).rglob("console.log")):
                assert process.poll() is None
                time.sleep(0.2)
            with pytest.raises(OSError, match="No space left"), (space.path(out) / "filler").open("wb") as stream:
                while True:
                    stream.write(b"\0" * 2**20)
                    stream.flush()
            said = process.communicate(timeout=900)[1]
        finally:
            process.kill()
            process.wait()
        assert process.returncode == AcceptanceError.exit_code, said
        assert "QEMU stopped the guest, for its disk could not be written: No space left on device" in said
        # The overlay went first, so there was room for the reports.
        report = json.loads((space.path(out) / "report.json").read_text())
    assert [item["outcome"] for item in report["results"]] == ["failed"]
