"""Changing a root archive without unpacking it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from recvirt.disk.tarmerge import Merge, TarIndex, changes_archive, clean_name, compare, extract, snapshot
from recvirt.errors import StageError


def make(path: Path, *members: tuple[str, str | bytes], mtime: int = 1000) -> TarIndex:
    """A tar of ``(name, data)``: a name with a slash at its end is a folder, text after ``->`` or ``=>`` a link."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo("./" + name)
            info.mtime, info.uid, info.gid = mtime, 7, 8
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            elif isinstance(data, str):
                info.type = tarfile.SYMTYPE if data.startswith("->") else tarfile.LNKTYPE
                info.linkname = data[2:]
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return TarIndex.read(path)


def merged(merge: Merge) -> dict[str, tarfile.TarInfo]:
    buffer = io.BytesIO()
    merge.write(buffer)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        return {clean_name(info.name): info for info in archive.getmembers()}


def read(merge: Merge, name: str) -> bytes:
    buffer = io.BytesIO()
    merge.write(buffer)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        stream = archive.extractfile("./" + name)
        assert stream is not None
        return stream.read()


def test_replaced_members_are_there_once_with_the_new_content(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("etc/", b""), ("etc/one", b"old" * 500), ("etc/two", b"2"))
    tree = tmp_path / "tree"
    extract(index, lambda name: name.startswith("etc"), tree)
    before = snapshot(tree)
    (tree / "etc/one").write_text("new")
    (tree / "etc/three").write_text("3")
    changes = compare(before, snapshot(tree))
    assert changes.written == ("etc/one", "etc/three")
    merge = Merge(index, frozenset(changes.written), changes_archive(tree, changes.written, index, 900))
    found = merged(merge)
    assert sorted(found) == ["etc", "etc/one", "etc/three", "etc/two"]
    assert read(merge, "etc/one") == b"new"
    assert read(merge, "etc/two") == b"2"
    assert (found["etc/one"].uid, found["etc/one"].gid) == (7, 8), "a replaced file keeps its owner"
    assert (found["etc/three"].uid, found["etc/three"].gid) == (0, 0)
    assert found["etc/one"].mtime == 900, "no time after the epoch"


def test_the_merge_knows_its_size_and_times(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("one", b"123"), ("two", b"45"), mtime=50)
    (tmp_path / "three").write_text("6789")
    archive = changes_archive(tmp_path, ["three"], index, 70)
    merge = Merge(index, frozenset({"one"}), archive)
    assert merge.data_bytes == 6
    assert merge.members == 2
    assert {name: info.mtime for name, info in merge.infos.items()} == {"two": 50, "three": 70}


def test_a_dropped_folder_takes_what_lies_below_it(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("x/", b""), ("x/y/", b""), ("x/y/z", b"1"), ("xy", b"2"))
    assert sorted(merged(Merge(index, frozenset({"x"}), b""))) == ["xy"]


def test_nothing_dropped_gives_the_same_members(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("d/", b""), ("d/f", b"1" * 1000), ("l", "->d/f"), ("h", "=>d/f"))
    merge = Merge(index, frozenset(), b"")
    assert len(merge.ranges()) == 1, "one copy, not one a member"
    assert list(merged(merge)) == ["d", "d/f", "l", "h"]


def test_long_names_move_with_their_headers(tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "f" * 90
    index = make(tmp_path / "a", ("one", b"1"), (long, b"long"), ("two", b"2"))
    assert read(Merge(index, frozenset({"one"}), b""), long) == b"long"
    assert sorted(merged(Merge(index, frozenset({long}), b""))) == ["one", "two"]


def test_a_hard_link_to_a_replaced_file_is_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("one", b"1"), ("two", "=>./one"))
    with pytest.raises(StageError, match="hard link"):
        Merge(index, frozenset({"one"}), b"").ranges()


def test_removed_and_touched_files_are_seen(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("gone", "kept", "mode", "same-size"):
        (tree / name).write_text("1")
    before = snapshot(tree)
    (tree / "gone").unlink()
    (tree / "mode").chmod(0o600)
    (tree / "same-size").write_text("2")
    os.utime(tree / "same-size", (5, 5))
    changes = compare(before, snapshot(tree))
    assert (changes.written, changes.removed) == (("mode", "same-size"), ("gone",))


def test_folders_that_were_there_are_not_written_again(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("etc/", b""))
    (tmp_path / "etc").mkdir()
    (tmp_path / "new").mkdir()
    with tarfile.open(fileobj=io.BytesIO(changes_archive(tmp_path, ["etc", "new"], index, 5))) as archive:
        assert [info.name for info in archive.getmembers()] == ["./new"]


def test_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="leads out"):
        make(tmp_path / "a", ("../evil", b"1"))


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(StageError, match="not a readable tar"):
        TarIndex.read(tmp_path / "a")


def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", ("one", b"1" * 5000))
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(whole[:2000])
    with pytest.raises(StageError, match=r"cut short|not a readable tar"):
        TarIndex.read(tmp_path / "b")


def test_links_are_extracted_as_links(tmp_path: Path) -> None:
    index = make(tmp_path / "a", ("d/", b""), ("d/f", b"1"), ("l", "->/etc/passwd"), ("h", "=>./d/f"))
    extract(index, lambda name: True, tmp_path / "tree")
    assert (tmp_path / "tree/l").readlink() == Path("/etc/passwd")
    assert (tmp_path / "tree/h").stat().st_ino == (tmp_path / "tree/d/f").stat().st_ino
