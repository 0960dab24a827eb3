"""The Intel side on Bochs for real, with Debian's cloud kernel; and what it says when something is wrong.

Needs a tools root with the ``bochs`` set: ``$RECVIRT_BOCHS_ROOT``, or made in the ordinary cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.accept.bochs import run_vmx_check
from recvirt.archive import Archive
from recvirt.errors import AcceptanceError, GuestError, MissingToolError
from recvirt.model import Profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_debs import GuestDebs
from recvirt.store import Store
from recvirt.toolsroot import ensure_tools

pytestmark = pytest.mark.slow

_BOCHS_DIR = os.environ.get("RECVIRT_BOCHS_ROOT", "")


@pytest.fixture(scope="module")
def bochs(shared_cache: Path) -> ToolsRoot:
    return ToolsRoot(Path(_BOCHS_DIR)) if _BOCHS_DIR else ensure_tools(Store(shared_cache), extra="bochs")


@pytest.fixture(scope="module")
def kernel_deb(tools: ToolsRoot, shared_cache: Path) -> Path:
    archive = Archive(tools, shared_cache, suite="trixie")
    packages = archive.resolve(["linux-image-cloud-amd64"])
    return archive.download(next(p for p in packages if p.name.startswith("linux-image-6")))


@pytest.fixture(scope="module")
def check_deb(tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("debs")
    for name in ("out", "scratch"):
        (base / name).mkdir()
    context = Context(tools=tools, cache_dir=base / "cache")
    stage = GuestDebs()
    stage.build(
        stage.inputs(Profile(name="p"), {}, context), Work(base / "out", base / "scratch", base / "log", context)
    )
    return base / "out/recvirt-nested-check.deb"


@pytest.fixture(autouse=True)
def _no_bochs_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = [
        p
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if _command(p).startswith("bochs-bin") and str(tmp_path) in _command(p)
    ]
    assert left == []


def _command(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def repack(tools: ToolsRoot, deb: Path, work: Path, *, without: str = "", spoil: str = "") -> Path:
    """The same package without some files, or with the content of others spoiled."""
    tree = work / "tree"
    tools.run(["dpkg-deb", "--raw-extract", str(deb), str(tree)], readable=[deb], writable=[work])
    for path in sorted(tree.glob(without)) if without else []:
        path.unlink()
    for path in sorted(tree.glob(spoil)) if spoil else []:
        path.write_bytes(b"\0" * path.stat().st_size)
    tools.run(["dpkg-deb", "-Znone", "--build", str(tree), str(work / "spoiled.deb")], writable=[work])
    shutil.rmtree(tree)
    return work / "spoiled.deb"


def test_kvm_intel_runs_an_l2(bochs: ToolsRoot, kernel_deb: Path, check_deb: Path, tmp_path: Path) -> None:
    result = run_vmx_check(bochs, kernel_deb, check_deb, tmp_path, timeout_seconds=900)
    assert result.problems == ()
    assert result.ok
    assert f"linux-image-{result.kernel_release}_" in kernel_deb.name
    assert result.report["features"]["ept"] is True
    assert result.report["modules"]["kvm_intel"]["parameters"]["nested"] == "Y"
    assert result.report["hypervisor"]["present"] is False
    assert result.console_path is not None
    assert "RECVIRT-L2 end" in result.console_path.read_text()
    assert sorted(path.suffix for path in (tmp_path / "bochs").iterdir() if path.stat().st_size > 10**6) == []


def test_machine_that_is_not_done_in_time(bochs: ToolsRoot, kernel_deb: Path, check_deb: Path, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"was not done after \d+ s; its last lines:\n  \| ") as caught:
        run_vmx_check(bochs, kernel_deb, check_deb, tmp_path, timeout_seconds=3)
    assert "console.txt" in caught.value.hint


def test_kernel_that_grub_refuses(
    bochs: ToolsRoot, tools: ToolsRoot, kernel_deb: Path, check_deb: Path, tmp_path: Path
) -> None:
    deb = repack(tools, kernel_deb, tmp_path, spoil="boot/vmlinuz-*")
    with pytest.raises(GuestError, match="stopped: error: "):
        run_vmx_check(bochs, deb, check_deb, tmp_path, timeout_seconds=300)


def test_kernel_without_kvm_intel(
    bochs: ToolsRoot, tools: ToolsRoot, kernel_deb: Path, check_deb: Path, tmp_path: Path
) -> None:
    deb = repack(tools, kernel_deb, tmp_path, without="**/kvm-intel.ko*")
    with pytest.raises(AcceptanceError, match="no kvm_intel module"):
        run_vmx_check(bochs, deb, check_deb, tmp_path, timeout_seconds=300)


def test_missing_package_and_missing_bochs(bochs: ToolsRoot, kernel_deb: Path, check_deb: Path, tmp_path: Path) -> None:
    with pytest.raises(AcceptanceError, match="there is no "):
        run_vmx_check(bochs, tmp_path / "none.deb", check_deb, tmp_path, timeout_seconds=1)
    (tmp_path / "empty/rootfs").mkdir(parents=True)
    with pytest.raises(MissingToolError, match="bochs is not installed"):
        run_vmx_check(ToolsRoot(tmp_path / "empty"), kernel_deb, check_deb, tmp_path, timeout_seconds=1)
