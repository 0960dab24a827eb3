"""The image stage for real on a made-up root: bytes that repeat, dpkg's database, every format and filesystem."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from recvirt.disk import xfs
from recvirt.disk.layout import MIB
from recvirt.disk.sparse import copy_range
from recvirt.errors import CommandError, ConfigError, SpaceError, StageError
from recvirt.imagefile.contents import Contents, open_image
from recvirt.model import Image, Kernel, Profile
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.image import ImageStage
from recvirt.store import sha256_of
from tests.support.images import CAPABILITY, EPOCH, make_kernel, make_root

RELEASE = "6.12.1-test"
UPSTREAM = {"root": "rootkey", "kernel_build": "kernelkey"}
SMALL = {"size": "512M", "esp_size": "34M"}


@pytest.fixture(scope="module")
def parts(tools: ToolsRoot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root and a kernel."""
    base = tmp_path_factory.mktemp("parts")
    make_root(base / "root", filler_bytes=3 * MIB)
    (base / "kernel").mkdir()
    # The tools root may have hooks of its own; the postinst tells what it sees of them.
    seen = 'ls -A /etc/kernel/postinst.d >"$DPKG_ROOT/hooks-seen" 2>/dev/null || :'
    make_kernel(base / "kernel", tools, RELEASE, postinst=seen)
    return {"root": base / "root", "kernel_build": base / "kernel"}


def build(context: Context, folder: Path, parts: dict[str, Path], **image: Any) -> Path:
    """Run the stage with the image's settings; the folder of its outputs."""
    settings = Image.model_validate({**SMALL, **image})
    profile = Profile(name="test", kernel=Kernel(cmdline=("mitigations=auto",)), image=settings)
    stage = ImageStage()
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    work = Work(folder / "out", folder / "scratch", folder / "log", context, parts)
    stage.build(stage.inputs(profile, UPSTREAM, context), work)
    return work.out


@pytest.fixture(scope="module")
def everything(tools: ToolsRoot, parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in every format."""
    base = tmp_path_factory.mktemp("everything")
    context = Context(tools, base / "cache", 2)
    return build(context, base / "work", parts, formats=("qcow2", "raw", "vhd", "vmdk", "ova"))


def shell(tools: ToolsRoot, script: str, folder: Path) -> str:
    """Run a shell script of the tools root on a folder, which it may read."""
    return tools.run(["sh", "-euc", script], readable=[folder], cwd=folder).stdout


def test_the_same_inputs_give_the_same_bytes(
    everything: Path, parts: dict[str, Path], context: Context, tmp_path: Path
) -> None:
    again = build(context, tmp_path / "again", parts, formats=("ova", "vmdk", "vhd", "raw", "qcow2"))
    names = sorted(path.name for path in everything.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert {n: sha256_of(everything / n) for n in names} == {n: sha256_of(again / n) for n in names}


def test_every_filesystem_on_the_disk_is_clean(everything: Path, tools: ToolsRoot) -> None:
    script = """
    dd if=disk.raw of=/tmp/root bs=1M skip=36 status=none conv=sparse; truncate -s 475M /tmp/root
    e2fsck -fn /tmp/root
    dd if=disk.raw of=/tmp/esp bs=1M skip=2 count=34 status=none; fsck.fat -n /tmp/esp
    sfdisk --verify disk.raw 2>&1
    """
    said = shell(tools, script, everything)
    assert "No errors detected" in said
    assert "FILE SYSTEM WAS MODIFIED" not in said


def test_all_formats_hold_the_same_disk(everything: Path, tools: ToolsRoot) -> None:
    for name, kind in (("disk.qcow2", "qcow2"), ("disk.vmdk", "vmdk"), ("disk.vhd", "vpc")):
        said = shell(tools, f"qemu-img compare -f raw -F {kind} disk.raw {name}", everything)
        assert "Images are identical" in said
    shell(tools, "qemu-img check -f qcow2 disk.qcow2; qemu-img check -f vmdk disk.vmdk", everything)
    info = json.loads(shell(tools, "qemu-img info --output=json disk.qcow2", everything))
    assert info["format-specific"]["data"]["compression-type"] == "zstd"
    assert "backing-filename" not in info


def test_the_vhd_is_what_qemu_would_write(everything: Path, tools: ToolsRoot) -> None:
    script = """qemu-img convert -f raw -O vpc -o subformat=fixed,force_size=on disk.raw /tmp/theirs
    tail -c 512 /tmp/theirs | od -An -v -tx1 -w1; echo ours; tail -c 512 disk.vhd | od -An -v -tx1 -w1"""
    theirs, ours = ([int(x, 16) for x in part.split()] for part in shell(tools, script, everything).split("ours"))
    # Time (24-28), checksum (64-68) and identifier (68-84) are qemu-img's own.
    differing = {i for i in range(512) if theirs[i] != ours[i]}
    assert differing <= {*range(24, 28), *range(64, 84)}


def test_the_facts_hold(everything: Path) -> None:
    told = json.loads((everything / "image.json").read_text())
    assert told["kernel"]["release"] == RELEASE
    assert told["kernel"]["package"] == f"linux-image-{RELEASE}"
    assert told["kernel"]["cmdline"].endswith(" mitigations=auto")
    assert told["stages"] == UPSTREAM
    for name, file in told["files"].items():
        assert (everything / name).stat().st_size == file["bytes"]
        assert sha256_of(everything / name) == file["sha256"]
    listed = json.loads((everything / "packages.json").read_text())
    assert [p["name"] for p in listed] == ["base", f"linux-image-{RELEASE}", "recvirt-boot"]
    assert len(json.loads((everything / "sbom.json").read_text())["packages"]) == 4
    assert f"linux-image-{RELEASE} 1 linux-upstream" in (everything / "sources.txt").read_text()


@pytest.fixture(scope="module")
def opened(everything: Path, tools: ToolsRoot) -> Any:
    with open_image(everything / "disk.qcow2", tools) as contents:
        yield contents


def test_dpkg_in_the_image_truly_knows_the_kernel(opened: Contents) -> None:
    status = opened.text("/var/lib/dpkg/status")
    block = next(b for b in status.split("\n\n") if f"Package: linux-image-{RELEASE}" in b)
    assert "Status: install ok installed" in block
    files = opened.text(f"/var/lib/dpkg/info/linux-image-{RELEASE}.list").splitlines()
    assert f"/boot/vmlinuz-{RELEASE}" in files
    assert f"/var/lib/dpkg/info/linux-image-{RELEASE}.postinst" in opened.tree()
    assert status.count("Package: base\nStatus: install ok installed") == 1
    leftovers = [path for path in opened.tree() if path.endswith(("-old", "/lock", "/Lock", "lock-frontend"))]
    assert leftovers == []


def test_the_kernel_s_files_are_where_they_belong(opened: Contents) -> None:
    tree = opened.tree()
    assert f"/usr/lib/modules/{RELEASE}/kernel/kvm.ko" in tree, "below the merged /usr"
    assert not tree["/lib"].is_dir, "the link stays a link"
    assert f"/usr/share/doc/linux-image-{RELEASE}/changelog" not in tree, "the image's own exclusions hold"


def test_hooks_of_the_tools_never_run(opened: Contents) -> None:
    assert "/hooks-seen" in opened.tree()
    assert opened.text("/hooks-seen") == ""


def test_owners_modes_capabilities_and_hard_links_survive(everything: Path, tools: ToolsRoot) -> None:
    script = r"""for path in /usr/bin/tool /usr/bin/same-tool /home/someone/file /home/someone/näme; do
        debugfs -R "stat $path" 'disk.raw?offset=37748736' 2>/dev/null | grep -E '^(Inode:|User)'; done
    debugfs -R 'ea_get -x /usr/bin/ping security.capability' 'disk.raw?offset=37748736' 2>/dev/null
    debugfs -R 'stat /home/someone/file' 'disk.raw?offset=37748736' 2>/dev/null | grep mtime"""
    said = shell(tools, script, everything)
    inodes = re.findall(r"^Inode: (\d+) .*Mode: +(\d+)", said, re.MULTILINE)
    assert inodes[0] == inodes[1], "one inode for both names"
    assert [mode for _, mode in inodes] == ["04755", "04755", "0600", "0644"]
    assert "User:  1000   Group:  1000" in said
    assert "User: 100000" in said
    assert " ".join(f"{byte:02x}" for byte in CAPABILITY[:8]) in said
    assert f"{EPOCH - 1000:08x}" in said


def test_the_menu_is_one_that_grub_understands(opened: Contents, tools: ToolsRoot) -> None:
    tools.run(["grub-script-check"], input_text=opened.text("/boot/grub/grub.cfg"))
    assert f"linux /boot/vmlinuz-{RELEASE} root=PARTUUID={opened.root.part_uuid} " in opened.text("/boot/grub/grub.cfg")
    assert opened.remembered_kernel() == RELEASE


def test_both_boot_methods_are_found_and_missed_when_they_are_gone(
    opened: Contents, everything: Path, tools: ToolsRoot, tmp_path: Path
) -> None:
    assert opened.boot_methods() == {"bios": "", "uefi": ""}
    broken = tmp_path / "broken.raw"
    shutil.copyfile(everything / "disk.raw", broken)
    with broken.open("r+b") as stream:
        stream.write(bytes(440))
    tools.run(["mdel", "-i", f"{broken}@@2M", "::/EFI/BOOT/BOOTX64.EFI"], writable=[tmp_path])
    with open_image(broken, tools) as contents:
        found = contents.boot_methods()
    assert "boot code" in found["bios"]
    assert "missing" in found["uefi"]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_other_filesystems_hold_the_same_tree(
    kind: str, opened: Contents, parts: dict[str, Path], context: Context, tmp_path: Path
) -> None:
    out = build(context, tmp_path / "work", parts, filesystem=kind, size="768M")
    with open_image(out / "disk.qcow2", context.tools) as other:
        assert other.filesystem == kind
        assert other.boot_methods() == {"bios": "", "uefi": ""}
        differing = {path for path in opened.tree().keys() | other.tree().keys()
                     if opened.tree().get(path) != other.tree().get(path)}  # fmt: skip
        named = {"/boot/grub/grub.cfg", "/etc/recvirt/boot.conf", "/usr/lib/recvirt/image.json"}
        assert differing - {"/lost+found"} <= named, "only what names the filesystem differs"
        assert [package.name for package in other.packages()] == [package.name for package in opened.packages()]
        if kind == "xfs":
            assert_xfs_keeps_owners_and_times(other, tmp_path)


def assert_xfs_keeps_owners_and_times(image: Contents, folder: Path) -> None:
    """mkfs.xfs knows no times; they are set afterwards."""
    device = folder / "device"
    copy_range(image.disk, image.root.offset_bytes, image.root.size_bytes, device)
    listing = image.tools.run(xfs.inodes_argv(device), readable=[folder]).stdout
    number = next(number for number, name in xfs.parse_inodes(listing).items() if name == "home/someone/file")
    told = image.tools.run(
        ["xfs_db", "-r", "-c", f"inode {number}", "-c", "print core.uid core.mtime.sec core.mode", str(device)],
        readable=[folder], env={"TZ": "UTC"},
    ).stdout  # fmt: skip
    assert "core.uid = 1000" in told and "core.mode = 0100600" in told
    assert "2026" in told.split("core.mtime.sec")[1]
    image.tools.run(["xfs_repair", "-n", str(device)], writable=[folder])


def test_a_tree_that_does_not_fit_is_refused_with_the_size_that_would_do(
    context: Context, parts: dict[str, Path], tmp_path: Path
) -> None:
    make_root(tmp_path / "big", filler_bytes=300 * MIB)
    with pytest.raises(StageError, match="needs a root partition") as caught:
        build(context, tmp_path / "work", {**parts, "root": tmp_path / "big"}, size="256M")
    assert caught.value.hint == "set image.size to 512M or more"


def test_too_little_room_is_told_before_the_work(
    context: Context, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000_000))
    with pytest.raises(SpaceError, match=r"about \d.* MB, .* has 1\.0 MB free"):
        build(context, tmp_path / "work", parts)
    assert not (tmp_path / "work/scratch/disk.raw").exists()


def test_a_root_without_the_boot_package_is_refused(context: Context, parts: dict[str, Path], tmp_path: Path) -> None:
    make_root(tmp_path / "bare", boot_package=False)
    with pytest.raises(StageError, match="recvirt-update-boot"):
        build(context, tmp_path / "work", {**parts, "root": tmp_path / "bare"})


def test_a_kernel_whose_script_fails_fails_the_stage(
    context: Context, parts: dict[str, Path], tools: ToolsRoot, tmp_path: Path
) -> None:
    (tmp_path / "kernel").mkdir()
    make_kernel(tmp_path / "kernel", tools, RELEASE, postinst="echo this is why >&2; exit 3")
    with pytest.raises(CommandError, match="this is why"):
        build(context, tmp_path / "work", {**parts, "kernel_build": tmp_path / "kernel"})


def test_an_initramfs_without_its_tools_is_refused(context: Context, parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="update-initramfs"):
        build(context, tmp_path / "work", parts, initramfs="small")


def test_a_debian_kernel_is_found_in_the_root(context: Context, tools: ToolsRoot, tmp_path: Path) -> None:
    make_root(tmp_path / "root")
    tree = tmp_path / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "boot/vmlinuz-6.12.9+deb13-cloud-amd64").write_text("kernel")
    (tree / "boot/initrd.img-6.12.9+deb13-cloud-amd64").write_text("initrd")
    tools.run(["tar", "-rf", str(tmp_path / "root/root.tar"), "-C", str(tree), "./boot"], writable=[tmp_path])
    stage, folder = ImageStage(), tmp_path / "work"
    profile = Profile(name="test", kernel=Kernel(source="debian"), image=Image.model_validate(SMALL))
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    work = Work(folder / "out", folder / "scratch", folder / "log", context, {"root": tmp_path / "root"})
    stage.build(stage.inputs(profile, {"root": "rootkey"}, context), work)
    told = json.loads((work.out / "image.json").read_text())
    assert told["kernel"]["release"] == "6.12.9+deb13-cloud-amd64"
    with open_image(work.out / "disk.qcow2", tools) as contents:
        assert "initrd /boot/initrd.img-6.12.9+deb13-cloud-amd64" in contents.text("/boot/grub/grub.cfg")


def test_another_kernel_changes_nothing_but_the_kernel(
    opened: Contents, parts: dict[str, Path], context: Context, tools: ToolsRoot, tmp_path: Path
) -> None:
    (tmp_path / "kernel").mkdir()
    make_kernel(tmp_path / "kernel", tools, "6.12.2-test", vmlinuz=b"another")
    out = build(context, tmp_path / "work", {**parts, "kernel_build": tmp_path / "kernel"})
    with open_image(out / "disk.qcow2", tools) as other:
        changed = opened.tree().keys() ^ other.tree().keys()
    assert changed
    assert all("6.12." in path or path == "/hooks-seen" for path in changed)


def test_sizes_that_can_not_be_are_refused_before_anything_runs(context: Context) -> None:
    profile = Profile(name="test", image=Image(size="64M"))
    with pytest.raises(ConfigError, match="no room for the root"):
        ImageStage().inputs(profile, UPSTREAM, context)


def test_formats_do_not_change_the_disk_s_identifiers(context: Context) -> None:
    def seed(*formats: Any, **image: Any) -> str:
        profile = Profile(name="test", image=Image(formats=formats, **image))
        return ImageStage().inputs(profile, UPSTREAM, context).seed

    assert seed("qcow2") == seed("raw", "vhd")
    assert seed("qcow2") != seed("qcow2", boot_timeout=9)
