"""Overlays are frozen without following links, and tars depend on nothing but their content."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from recvirt.errors import ConfigError, StageError
from recvirt.rootfs.files import TreeFile
from recvirt.rootfs.overlay import read_overlay, write_devices_tar, write_files_tar, write_overlay_tar
from recvirt.store import key_of


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    folder = tmp_path / "overlay"
    (folder / "etc/x.d").mkdir(parents=True)
    (folder / "etc/x.d/one.conf").write_text("one")
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "usr/bin/tool").write_text("#!/bin/sh\n")
    (folder / "usr/bin/tool").chmod(0o4755)
    (folder / "etc/link").symlink_to("/etc/passwd")
    (folder / "outside").symlink_to(tmp_path)
    return folder


def test_links_are_copied_and_never_followed(overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    frozen = read_overlay(overlay)
    assert [entry.path for entry in frozen.entries] == [
        "etc", "etc/link", "etc/x.d", "etc/x.d/one.conf", "outside", "usr", "usr/bin", "usr/bin/tool",
    ]  # fmt: skip
    links = {entry.path: entry.link for entry in frozen.entries if entry.link}
    assert links == {"etc/link": "/etc/passwd", "outside": str(tmp_path)}


def test_the_tar_is_root_s_and_keeps_modes(overlay: Path, tmp_path: Path) -> None:
    write_overlay_tar(read_overlay(overlay), tmp_path / "o.tar", 1000)
    with tarfile.open(tmp_path / "o.tar") as archive:
        members = {member.name: member for member in archive}
        assert {(m.uid, m.gid, m.uname, m.mtime) for m in members.values()} == {(0, 0, "", 1000)}
        assert members["usr/bin/tool"].mode == 0o4755
        assert members["etc/link"].issym() and members["etc/x.d"].isdir()
        stream = archive.extractfile("etc/x.d/one.conf")
        assert stream is not None and stream.read() == b"one"


def test_the_same_content_gives_the_same_bytes(overlay: Path, tmp_path: Path) -> None:
    write_overlay_tar(read_overlay(overlay), tmp_path / "1.tar", 1000)
    os.utime(overlay / "etc/x.d/one.conf", (5, 5))
    write_overlay_tar(read_overlay(overlay), tmp_path / "2.tar", 1000)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_the_key_follows_content_modes_and_links(overlay: Path) -> None:
    keys = [key_of("x", 1, read_overlay(overlay))]
    (overlay / "etc/x.d/one.conf").write_text("two")
    keys.append(key_of("x", 1, read_overlay(overlay)))
    (overlay / "etc/x.d/one.conf").chmod(0o600)
    keys.append(key_of("x", 1, read_overlay(overlay)))
    (overlay / "etc/link").unlink()
    (overlay / "etc/link").symlink_to("shadow")
    keys.append(key_of("x", 1, read_overlay(overlay)))
    assert len(set(keys)) == 4


def test_a_file_that_changes_meanwhile_is_noticed(overlay: Path, tmp_path: Path) -> None:
    frozen = read_overlay(overlay)
    (overlay / "etc/x.d/one.conf").write_text("other")
    with pytest.raises(StageError, match="changed while"):
        write_overlay_tar(frozen, tmp_path / "o.tar", 0)


def test_what_is_no_file_is_refused_with_its_name(overlay: Path) -> None:
    os.mkfifo(overlay / "pipe")
    os.mkfifo(overlay / "etc/pipe")
    with pytest.raises(ConfigError) as caught:
        read_overlay(overlay)
    assert [Path(p.file).name for p in caught.value.problems] == ["pipe", "pipe"]
    with pytest.raises(ConfigError, match="is not a folder"):
        read_overlay(overlay / "gone")


def test_names_that_are_no_text_are_refused(overlay: Path) -> None:
    Path(os.fsdecode(os.fsencode(overlay) + b"/caf\xe9")).write_text("")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_overlay(overlay)


def test_our_files_come_with_their_folders(tmp_path: Path) -> None:
    files = [TreeFile.of("etc/a/b", b"1", 0o440), TreeFile.of("etc/c", b"22")]
    write_files_tar(files, tmp_path / "f.tar", 7)
    with tarfile.open(tmp_path / "f.tar") as archive:
        found = [(m.name, m.mode, m.isdir(), m.size) for m in archive]
    assert found == [
        ("etc", 0o755, True, 0),
        ("etc/a", 0o755, True, 0),
        ("etc/a/b", 0o440, False, 1),
        ("etc/c", 0o644, False, 2),
    ]


def test_device_nodes(tmp_path: Path) -> None:
    write_devices_tar(tmp_path / "d.tar", 7)
    with tarfile.open(tmp_path / "d.tar") as archive:
        nodes = {m.name: (m.devmajor, m.devminor) for m in archive if m.ischr()}
    assert nodes["./dev/null"] == (1, 3) and nodes["./dev/console"] == (5, 1)
