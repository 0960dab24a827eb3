"""What is made of an image's contents: parsers of the tools' outputs, boot checks, differences, texts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from recvirt.disk.layout import MIB, plan_layout
from recvirt.disk.packages import Package
from recvirt.disk.xfs import parse_inodes
from recvirt.errors import VerificationError
from recvirt.imagefile import diff
from recvirt.imagefile.contents import loader_problem, menu_problem, package_sizes, parse_config
from recvirt.imagefile.files import Entry, bounded, detect_filesystem, parse_debugfs_ls, printable
from recvirt.imagefile.foreign import parse_btrfs_tree, parse_grub_ls, parse_xfs_entries

FILE, FOLDER = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def test_debugfs_listings_are_told_apart_by_folder() -> None:
    text = (
        'debugfs: ls -p "/boot"\n/29/040755/0/0/.//\n/2/040755/0/0/..//\n/33/100644/0/0/vmlinuz-6/1174/\n'
        '/34/120777/0/0/link/6/\n/35/040755/0/0/grub//\n\ndebugfs: ls -p "/none"\n/none: File not found\n'
    )
    assert parse_debugfs_ls(text) == {
        "/boot": {
            "vmlinuz-6": Entry(FILE, 1174),
            "link": Entry(stat.S_IFLNK | 0o777, 0),
            "grub": Entry(FOLDER, 0),
        },
        "/none": {},
    }


def test_grub_listings() -> None:
    text = "83           20261112093020 System.map-6\nDIR          20261120164115 efi/\n\nerror: x\n"
    assert parse_grub_ls(text) == {"System.map-6": Entry(stat.S_IFREG, 83), "efi": Entry(stat.S_IFDIR, 0)}


def test_xfs_inodes() -> None:
    paths = parse_inodes("       131 etc/.\n       132 etc/pass wd\nnoise\n")
    assert paths == {131: "etc", 132: "etc/pass wd"}
    told = "core.mode = 040755\ncore.size = 18\ncore.mode = 0100644\ncore.size = 983\n"
    assert dict(parse_xfs_entries(paths, told)) == {"/etc": Entry(FOLDER, 0), "/etc/pass wd": Entry(FILE, 983)}
    with pytest.raises(VerificationError, match="damaged"):
        parse_xfs_entries(paths, "core.mode = 040755\n")


BTRFS = """fs tree key (FS_TREE ROOT_ITEM 0)
\titem 0 key (256 INODE_ITEM 0) itemoff 16123 itemsize 160
\t\tgeneration 6 transid 6 size 150 nbytes 0
\t\tblock group 0 mode 40755 links 1 uid 0 gid 0 rdev 0
\titem 2 key (256 DIR_ITEM 99) itemoff 1 itemsize 1
\t\tlocation key (999 INODE_ITEM 0) type FILE
\t\tname: counted-once
\titem 3 key (256 DIR_INDEX 2) itemoff 1 itemsize 1
\t\tlocation key (257 INODE_ITEM 0) type DIR
\t\ttransid 6 data_len 0 name_len 3
\t\tname: etc
\titem 4 key (257 INODE_ITEM 0) itemoff 1 itemsize 160
\t\tgeneration 6 transid 6 size 12 nbytes 0
\t\tblock group 0 mode 40755 links 1 uid 0 gid 0 rdev 0
\titem 5 key (257 DIR_INDEX 2) itemoff 1 itemsize 1
\t\tlocation key (258 INODE_ITEM 0) type FILE
\t\tname: pass\\ w\\303\\244\\\\d
\titem 6 key (257 DIR_INDEX 3) itemoff 1 itemsize 1
\t\tlocation key (257 INODE_ITEM 0) type DIR
\t\tname: loop
\titem 7 key (258 INODE_ITEM 0) itemoff 1 itemsize 160
\t\tgeneration 6 transid 6 size 983 nbytes 4096
\t\tblock group 0 mode 100644 links 1 uid 0 gid 0 rdev 0
"""


def test_btrfs_trees_end_even_when_a_folder_holds_itself() -> None:
    assert parse_btrfs_tree(BTRFS) == {
        "/etc": Entry(FOLDER, 0),
        "/etc/pass w\u00e4\\d": Entry(FILE, 983),
        "/etc/loop": Entry(FOLDER, 0),
    }


def test_filesystems_are_known_by_their_magic(tmp_path: Path) -> None:
    part = plan_layout(96 * MIB, 8 * MIB, "s").root
    disk = tmp_path / "disk"
    for kind, offset, magic in (("ext4", 1080, b"\x53\xef"), ("xfs", 0, b"XFSB"), ("btrfs", 0x10040, b"_BHRfS_M")):
        with disk.open("wb") as stream:
            stream.seek(part.offset_bytes + offset)
            stream.write(magic)
            stream.truncate(96 * MIB)
        assert detect_filesystem(disk, part) == kind
    disk.write_bytes(b"")
    assert detect_filesystem(disk, part) == ""


def test_tools_may_not_write_more_than_the_bound() -> None:
    assert bounded(["tool", "a b"])[-2:] == ["tool", "a b"]
    assert "ulimit -f" in bounded(["tool"])[2]


def program(machine: int = 0x8664) -> bytes:
    return b"MZ".ljust(0x3C, b"\0") + (0x40).to_bytes(4, "little") + b"PE\0\0" + machine.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("data", "why"),
    [(program(), ""), (b"", "missing"), (b"MZ" + bytes(200), "no UEFI program"), (program(0xAA64), "architecture")],
)
def test_a_uefi_loader_is_a_program_for_this_architecture(data: bytes, why: str) -> None:
    found = loader_problem(data)
    assert (found == "") if not why else (why in found)


def test_a_menu_must_name_a_kernel_that_is_there() -> None:
    menu = "menuentry 'x' {\n    linux /boot/vmlinuz-6.12 root=x\n}\n"
    assert menu_problem(menu, ["6.12"]) == ""
    assert "names no kernel" in menu_problem(menu, ["7.0"])
    assert "missing" in menu_problem("", ["6.12"])


def test_kernel_configurations_are_parsed() -> None:
    assert parse_config('# comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x=y"\n') == {
        "A": "y",
        "B": "n",
        "C": '"x=y"',
    }


def package(name: str, version: str = "1") -> Package:
    return Package(name, "amd64", version, name, 10)


def test_sizes_count_each_file_once_and_follow_the_merged_usr() -> None:
    tree = {
        "/usr/lib/a": Entry(FILE, 5),
        "/usr/lib": Entry(FOLDER, 0),
        "/usr/bin/b": Entry(FILE, 7),
        "/own": Entry(FILE, 1),
    }
    lists = {"one": ["/.", "/lib/a", "/usr/lib/a", "/left/out"], "two": ["/usr/bin/b", "/usr/lib/a"]}
    assert package_sizes([package("one"), package("two")], tree, lists) == {"one": 5, "two": 7, "": 1}


def test_differences_of_packages() -> None:
    found = diff.package_changes([package("a"), package("b")], [package("b", "2"), package("c")])
    assert [item["name"] for item in found["added"]] == ["c"]
    assert [item["name"] for item in found["removed"]] == ["a"]
    assert found["changed"] == [{"name": "b", "arch": "amd64", "old": "1", "new": "2"}]


def test_an_absent_symbol_is_as_good_as_n() -> None:
    assert diff.config_changes({"A": "y", "B": "n"}, {"A": "m"}) == [{"symbol": "A", "old": "y", "new": "m"}]


def test_differences_of_files_begin_with_the_largest() -> None:
    old = {"/a": Entry(FILE, 1), "/b": Entry(FILE, 100), "/d": Entry(FOLDER, 0), "/same": Entry(FILE, 3)}
    new = {"/a": Entry(FILE, 2), "/c": Entry(FILE, 50), "/same": Entry(FILE, 3)}
    assert [(item["path"], item["old"], item["new"]) for item in diff.file_changes(old, new)] == [
        ("/b", 100, None),
        ("/c", None, 50),
        ("/a", 1, 2),
    ]


def test_equal_images_are_told_so() -> None:
    found = {
        "old": "a", "new": "b", "bytes": {"old": 1, "new": 1}, "kernel": {"old": "6", "new": "6"},
        "packages": diff.package_changes([], []), "kernel_config": [], "files": [],
    }  # fmt: skip
    assert diff.is_equal(found)
    assert "no difference" in diff.as_text(found)
    assert not diff.is_equal({**found, "kernel": {"old": "6", "new": "7"}})


def test_an_image_can_not_speak_to_the_terminal() -> None:
    assert printable("a\x1b[31m\tb\nc\x9b") == "a?[31m?b\nc?"
