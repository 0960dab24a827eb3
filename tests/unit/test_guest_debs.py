"""Package folders: what is read, what decides about the key, and what is written into a package's control files."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
from pathlib import Path

import pytest

from recvirt.cpio import Entry, newc
from recvirt.data import data_path
from recvirt.errors import StageError
from recvirt.stages.guest_debs import (
    ARCHIVES,
    LINK_LINE,
    MODE_LINE,
    PROGRAMS,
    GuestDebsInputs,
    archive_entries,
    built_using,
    changelog_epoch,
    compile_argv,
    copy_sources,
    dpkg_deb_argv,
    installed_kib,
    parse_control,
    parse_pairs,
    read_package,
    read_packages,
    set_times,
    write_control,
)
from recvirt.store import key_of

CONTROL = """\
Package: thing
Version: 1.2
Architecture: all
Maintainer: Someone <someone@example.org>
Description: a thing
 It does
 .
 things.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "thing"
    for name, text in {
        "DEBIAN/control": CONTROL,
        "DEBIAN/postinst": "#!/bin/sh\n",
        "root/etc/thing.conf": "a=1\n",
        "root/usr/bin/thing": "#!/bin/sh\n",
    }.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (base / "root/usr/bin/thing").chmod(0o700)
    return base


def key(folder: Path, tools: tuple[str, ...] = ("gcc=14",)) -> str:
    return key_of("guest_debs", 1, GuestDebsInputs((read_package(folder),), tools))


def test_every_shipped_folder_is_a_package() -> None:
    names = [package.name for package in read_packages(data_path("packages"))]
    assert names == sorted(names)
    assert {"recvirt-boot", "recvirt-nested-check"} <= set(names)


def test_key_does_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/thing"
    shutil.copytree(folder, other)
    assert key(folder) == key(other)


@pytest.mark.parametrize("name", ["DEBIAN/control", "root/etc/thing.conf", "root/usr/bin/thing"])
def test_key_follows_content(folder: Path, name: str) -> None:
    before = key(folder)
    path = folder / name
    path.write_text(path.read_text() + "#\n")
    assert key(folder) != before


def test_key_follows_executable_bit_name_link_and_tools(folder: Path) -> None:
    keys = [key(folder)]
    (folder / "root/usr/bin/thing").chmod(0o600)
    keys.append(key(folder))
    (folder / "root/etc/thing.conf").rename(folder / "root/etc/thing2.conf")
    keys.append(key(folder))
    (folder / "root/usr/bin/alias").symlink_to("thing")
    keys.append(key(folder))
    (folder / "root/usr/bin/alias").unlink()
    (folder / "root/usr/bin/alias").symlink_to("other")
    keys.append(key(folder))
    keys.append(key(folder, ("gcc=15",)))
    assert len(set(keys)) == len(keys)


def test_unknown_entry_is_refused_not_left_out(folder: Path) -> None:
    (folder / "roots").mkdir()
    (folder / "roots/file").write_text("lost")
    with pytest.raises(StageError, match="no place in a package folder") as caught:
        read_package(folder)
    assert "root" in caught.value.hint


def test_folder_without_control_is_refused(folder: Path) -> None:
    (folder / "DEBIAN/control").unlink()
    with pytest.raises(StageError, match="no DEBIAN/control"):
        read_package(folder)


def test_copy_normalises_modes_and_makes_scripts_executable(folder: Path, tmp_path: Path) -> None:
    copy_sources(read_package(folder), tmp_path / "copy")
    modes = {
        path.relative_to(tmp_path / "copy").as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert modes == {
        "DEBIAN/control": 0o644,
        "DEBIAN/postinst": 0o755,
        "root/etc/thing.conf": 0o644,
        "root/usr/bin/thing": 0o755,
    }


def test_copy_refuses_a_file_that_changed_after_the_key(folder: Path, tmp_path: Path) -> None:
    package = read_package(folder)
    (folder / "root/etc/thing.conf").write_text("a=2\n")
    with pytest.raises(StageError, match=r"thing\.conf changed during the build"):
        copy_sources(package, tmp_path / "copy")


def test_control_fields_and_their_continuation() -> None:
    fields = parse_control(CONTROL, "control")
    assert fields["Version"] == "1.2"
    assert fields["Description"] == "a thing\n It does\n .\n things."


def test_control_that_lacks_fields_names_them() -> None:
    with pytest.raises(StageError, match="lacks Version, Maintainer"):
        parse_control("Package: x\nArchitecture: all\nDescription: y\n", "control")


def test_changelog_gives_the_epoch_of_its_newest_entry() -> None:
    ends = (" -- N <n@x>  Thu, 01 Jan 1970 01:00:10 +0100", " -- N <n@x>  Fri, 02 Jan 1970 00:00:00 +0000")
    text = "a (1) b; urgency=low\n\n  * x\n\n" + "\n\n".join(ends)
    assert changelog_epoch(text) == 10
    with pytest.raises(StageError, match="has no line"):
        changelog_epoch("nothing\n")


def test_links_and_modes_lines() -> None:
    assert parse_pairs("# x\n\n../a usr/b\n", LINK_LINE, "links") == [("../a", "usr/b")]
    assert parse_pairs("0440 etc/sudoers.d/x\n", MODE_LINE, "modes") == [("0440", "etc/sudoers.d/x")]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("a /etc/passwd", LINK_LINE), ("a ../../x", LINK_LINE), ("a", LINK_LINE), ("a b c", LINK_LINE),
     ("0999 etc/x", MODE_LINE), ("0644 /etc/x", MODE_LINE), ("rw etc/x", MODE_LINE)],
)  # fmt: skip
def test_bad_line_is_refused_with_its_number(text: str, pattern: re.Pattern[str]) -> None:
    with pytest.raises(StageError, match=r"f:2: .*not understood"):
        parse_pairs(f"\n{text}\n", pattern, "f")


def test_control_is_completed(folder: Path) -> None:
    tree = folder.parent / "tree"
    shutil.copytree(folder / "root", tree)
    shutil.copytree(folder / "DEBIAN", tree / "DEBIAN")
    (tree / "usr/bin/thing").write_bytes(b"x" * 1025)
    write_control(tree, parse_control(CONTROL, ""))
    control = (tree / "DEBIAN/control").read_text()
    # etc, usr, usr/bin: 1 each; thing.conf: 1; thing: 2
    assert "Installed-Size: 6\n" in control
    assert control.endswith("Description: a thing\n It does\n .\n things.\n")
    assert (tree / "DEBIAN/conffiles").read_text() == "/etc/thing.conf\n"
    digest = hashlib.md5(b"x" * 1025, usedforsecurity=False).hexdigest()
    assert (tree / "DEBIAN/md5sums").read_text() == f"{digest}  usr/bin/thing\n"
    assert installed_kib(tree) == 6


def test_times_are_all_the_same(folder: Path) -> None:
    (folder / "root/alias").symlink_to("nowhere")
    set_times(folder, 1_000_000_000)
    assert {path.lstat().st_mtime for path in [folder, *folder.rglob("*")]} == {1_000_000_000}


def test_compiler_gets_version_and_no_path_of_this_machine() -> None:
    argv = compile_argv(("a.c", "b.S"), Path("out"), "1.2")
    assert '-DVERSION="1.2"' in argv
    assert argv[-4:] == ["-o", "out", "a.c", "b.S"]
    assert "-static" in argv
    assert "-Wl,--build-id=none" in argv


def test_packing_is_as_root_and_in_one_thread() -> None:
    argv = dpkg_deb_argv(Path("tree"), Path("x.deb"))
    assert argv[-3:] == ["--build", "tree", "x.deb"]
    assert {"--root-owner-group", "--threads-max=1"} <= set(argv)


def test_static_library_is_named_with_its_source_version() -> None:
    assert built_using(("gcc=14", "musl-dev=1.2.5-3+b1")) == "musl (= 1.2.5-3)"
    with pytest.raises(StageError, match="no musl-dev") as caught:
        built_using(("gcc=14", "musl-dev="))
    assert "musl-tools" in caught.value.hint


def test_every_source_is_compiled_and_exists() -> None:
    for package, programs in PROGRAMS.items():
        present = {path.name for path in (data_path("packages") / package / "src").glob("*.[cS]")}
        assert present == {name for sources in programs.values() for name in sources}
        for members in ARCHIVES[package].values():
            assert set(members.values()) <= set(programs)


def parse_newc(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + numbers[11] - 1].decode()
        assert data[at + 110 + numbers[11] - 1] == 0
        start = -(-(at + 110 + numbers[11]) // 4) * 4
        if name == "TRAILER!!!":
            assert not any(data[start:])
            return found
        found[name] = (numbers[1], data[start : start + numbers[6]], (numbers[9], numbers[10]))
        at = -(-(start + numbers[6]) // 4) * 4


def test_newc_holds_what_was_put_in() -> None:
    entries = [Entry(f"f{n}", 0o100644, b"x" * n) for n in range(6)]
    entries += [Entry("dev/console", 0o20600, device=(5, 1)), Entry("link", 0o120777, b"target")]
    found = parse_newc(newc(entries))
    assert found == {e.name: (e.mode, e.data, e.device) for e in entries}
    assert len(newc(entries)) % 512 == 0


def test_initramfs_has_its_console_and_init() -> None:
    found = parse_newc(newc(archive_entries({"init": b"\x7fELF"})))
    assert found["init"] == (0o100755, b"\x7fELF", (0, 0))
    assert found["dev/console"] == (0o020600, b"", (5, 1))
    names = list(found)
    assert names.index("dev") < names.index("dev/console")
    assert {"proc", "sys", "modules"} <= set(names)
