"""Bytes and texts of the formats: VHD footer, VMDK identifier, OVA; and the command lines."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from recvirt.disk import filesystem, formats, ova, xfs
from recvirt.disk.layout import MIB, derived_uuid, plan_layout
from recvirt.disk.sparse import copy_range, copy_sparse
from recvirt.errors import StageError

OVF = {"o": "http://schemas.dmtf.org/ovf/envelope/1", "v": "http://www.vmware.com/schema/ovf"}


@pytest.mark.parametrize("epoch", [1_700_000_000, 1_700_000_001])
def test_a_vhd_footer_adds_up_and_says_fixed(epoch: int) -> None:
    footer = formats.vhd_footer(3 * MIB, derived_uuid("s", "vhd"), epoch)
    assert len(footer) == 512
    assert footer.startswith(b"conectix")
    assert struct.unpack_from(">QQ", footer, 40) == (3 * MIB, 3 * MIB)
    assert struct.unpack_from(">I", footer, 60) == (2,)
    stored = struct.unpack_from(">I", footer, 64)[0]
    assert stored == ~sum(footer[:64] + bytes(4) + footer[68:]) & 0xFFFFFFFF
    assert struct.unpack_from(">I", footer, 24) == (epoch - 946_684_800,)
    assert footer[68:84] == derived_uuid("s", "vhd").bytes


def test_a_vhd_of_odd_size_is_refused() -> None:
    with pytest.raises(StageError, match="MiB"):
        formats.vhd_footer(3 * MIB + 512, derived_uuid("s", "vhd"), 0)


def test_the_vmdk_identifier_is_replaced_in_place() -> None:
    text = b'version=1\nCID=deadbeef\nparentCID=ffffffff\ncreateType="x"\n'
    stream = io.BytesIO(b"KDMV" + bytes(508) + text + bytes(99))
    size = len(stream.getvalue())
    formats.patch_vmdk(stream, derived_uuid("s", "vmdk"))
    data = stream.getvalue()
    assert len(data) == size
    assert b"CID=deadbeef" not in data
    assert b"\nparentCID=ffffffff\n" in data
    again = io.BytesIO(data)
    formats.patch_vmdk(again, derived_uuid("s", "vmdk"))
    assert again.getvalue() == data


def test_a_vmdk_without_an_identifier_is_refused() -> None:
    with pytest.raises(StageError, match="content identifier"):
        formats.patch_vmdk(io.BytesIO(bytes(1000)), derived_uuid("s", "vmdk"))


def test_qcow2_clusters_are_written_in_order() -> None:
    argv = formats.qcow2_argv(Path("/a"), Path("/b"))
    assert "compression_type=zstd" in argv
    assert "-W" not in argv, "out-of-order writes would change the bytes from build to build"


def test_more_formats_need_more_room() -> None:
    one = formats.needed_bytes(1000, ("qcow2",))
    assert one < formats.needed_bytes(1000, ("qcow2", "raw"))
    assert one > 1000
    assert formats.needed_bytes(1000, tuple(formats.FILE_NAMES)) > 4000


def machine() -> ova.Machine:
    return ova.Machine("recvirt-<x>", "Debian & more", 4 * 1024 * MIB, 1234)


def test_the_ovf_turns_nesting_on_and_names_the_disk() -> None:
    root = ET.fromstring(ova.descriptor(machine(), "d.vmdk"))
    extra = root.find(".//v:ExtraConfig", OVF)
    assert extra is not None
    assert extra.attrib[f"{{{OVF['v']}}}key"] == "vhv.enable"
    assert extra.attrib[f"{{{OVF['v']}}}value"] == "TRUE"
    disk = root.find(".//o:Disk", OVF)
    assert disk is not None and disk.attrib[f"{{{OVF['o']}}}capacity"] == "4096"
    file = root.find(".//o:File", OVF)
    assert file is not None and file.attrib[f"{{{OVF['o']}}}size"] == "1234"
    name = root.find(".//o:Name", OVF)
    assert name is not None and name.text == "recvirt-<x>", "names are escaped"


def test_items_of_the_ovf_are_in_the_schema_s_order() -> None:
    root = ET.fromstring(ova.descriptor(machine(), "d.vmdk"))
    for item in root.iterfind(".//o:Item", OVF):
        names = [child.tag.split("}")[1] for child in item]
        assert names == sorted(names)


def test_an_ova_begins_with_its_descriptor_and_its_manifest_holds(tmp_path: Path) -> None:
    vmdk = tmp_path / "disk.vmdk"
    vmdk.write_bytes(b"disk")
    for name in ("one", "two"):
        ova.write_ova(tmp_path / name, "vm", "<ovf/>", vmdk, 1000)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(tmp_path / "one") as archive:
        assert archive.getnames() == ["vm.ovf", "vm.mf", "vm-disk1.vmdk"]
        stream = archive.extractfile("vm.mf")
        assert stream is not None
        manifest = stream.read().decode()
    assert f"SHA256(vm-disk1.vmdk)= {hashlib.sha256(b'disk').hexdigest()}\n" in manifest
    assert f"SHA256(vm.ovf)= {hashlib.sha256(b'<ovf/>').hexdigest()}\n" in manifest


def test_holes_are_copied_as_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as stream:
        stream.truncate(64 * MIB)
        stream.seek(32 * MIB)
        stream.write(b"data")
    copy_sparse(source, target)
    assert target.stat().st_size == 64 * MIB
    assert target.stat().st_blocks * 512 < MIB
    with target.open("rb") as stream:
        stream.seek(32 * MIB)
        assert stream.read(5) == b"data\0"


def test_a_copy_lands_at_its_offset_and_leaves_the_rest(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"mid")
    target.write_bytes(b"0123456789")
    copy_sparse(source, target, target_offset=4, truncate=False)
    assert target.read_bytes() == b"0123mid789"
    copy_range(target, 4, 3, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"mid"


def test_a_range_ends_before_data_that_lies_behind_it(tmp_path: Path) -> None:
    source = tmp_path / "a"
    with source.open("wb") as stream:
        stream.truncate(8 * MIB)
        stream.seek(6 * MIB)
        stream.write(b"behind")
    copy_range(source, MIB, 2 * MIB, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(2 * MIB)


@pytest.mark.parametrize(("esp", "bits"), [(64, "32"), (16, "16")])
def test_the_esp_is_as_wide_as_its_size_allows(esp: int, bits: str) -> None:
    layout = plan_layout(512 * MIB, esp * MIB, "s")
    argv = filesystem.mkfs_esp_argv(Path("/disk"), layout)
    assert argv[argv.index("-F") + 1] == bits
    assert argv[argv.index("--offset") + 1] == str(2 * MIB // 512)
    assert argv[-1] == str(esp * 1024)


def test_ext4_is_written_at_the_root_s_place_with_fixed_identifiers() -> None:
    layout = plan_layout(512 * MIB, 64 * MIB, "s")
    argv = filesystem.mkfs_ext4_argv(Path("/disk"), layout, "-")
    options = argv[argv.index("-E") + 1].split(",")
    assert f"offset={layout.root.offset_bytes}" in options
    assert f"hash_seed={layout.hash_seed}" in options
    assert argv[argv.index("-U") + 1] == str(layout.root_fs_uuid)
    assert argv[-1] == f"{layout.root.size_bytes // 1024}k"


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **changes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, mode, 1_000_000_000
    for field, value in changes.items():
        setattr(info, field, value)
    return info


def test_an_xfs_list_holds_every_kind_of_file_in_its_folder() -> None:
    infos = {
        "": member("", tarfile.DIRTYPE, 0o755),
        "a b": member("a b", tarfile.DIRTYPE, 0o1777),
        "a b/f": member("f", tarfile.SYMTYPE, 0o777, linkname="../x"),
        "dev": member("dev", tarfile.DIRTYPE, 0o755),
        "dev/null": member("dev/null", tarfile.CHRTYPE, 0o666, devmajor=1, devminor=3),
        "tool": member("tool", mode=0o4755, uid=5, gid=6),
        "same": member("same", tarfile.LNKTYPE, 0o4755, linkname="tool"),
    }
    assert xfs.protofile(infos, "/t").splitlines() == [
        "/", "0 0", "d--755 0 0", "a/b d--777 0 0", "f l--777 0 0 ../x", "$", "dev d--755 0 0",
        "null c--666 0 0 1 3", "$", "same ---755 0 0 /t/same", "tool ---755 5 6 /t/tool", "$",
    ]  # fmt: skip


def test_names_that_an_xfs_list_can_not_hold_are_refused() -> None:
    with pytest.raises(StageError, match="a b"):
        xfs.protofile({"a b": member("a b")}, "/t")


def test_xfs_gets_the_modes_and_times_that_a_list_can_not_say() -> None:
    infos = {"tmp": member("tmp", tarfile.DIRTYPE, 0o1777), "su": member("su", mode=0o4755)}
    stored = (1_000_000_000 + 2**31) * 10**9
    assert xfs.repair_commands({131: "tmp", 132: "su", 133: "other"}, infos, 500).splitlines() == [
        "inode 131", f"write core.mtime.sec {stored}", "write core.mode 041777",
        "inode 132", f"write core.mtime.sec {stored}", "write core.mode 0104755",
        "inode 133", f"write core.mtime.sec {(500 + 2**31) * 10**9}", "quit",
    ]  # fmt: skip


def test_a_tree_needs_more_than_its_data() -> None:
    for kind in ("ext4", "xfs", "btrfs"):
        assert filesystem.least_root_bytes(100 * MIB, 1000, kind) > 150 * MIB
