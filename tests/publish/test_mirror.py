"""The mirror: whole or absent, read back, indexes that follow what is there, nothing sent twice."""

from __future__ import annotations

import configparser
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from recvirt.errors import ConfigError, VerificationError
from recvirt.publish.trees import FolderTree
from tests.publish.support import Place, make_image


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_tree_holds_the_image_and_all_about_it(place: Place, image: Path, tree: Path) -> None:
    (done,) = place.publish("mirror", image, [f"path={tree}"])
    disk = tree / done["ids"]["path"]
    assert disk.read_bytes() == image.read_bytes()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=disk.parent, check=True)
    key = (place.folder / "state/receipt-key.pub").read_text()
    (tree / "allowed").write_text(f"recvirt {key}")
    words: list[str | Path] = ["ssh-keygen", "-Y", "verify", "-f", tree / "allowed", "-I", "recvirt"]
    words += ["-n", "recvirt-checksums"]
    sums = (disk.parent / "SHA256SUMS").read_bytes()
    subprocess.run([*words, "-s", disk.parent / "SHA256SUMS.sig"], input=sums, check=True, capture_output=True)


def test_simplestreams_leads_to_the_files(place: Place, image: Path, tree: Path) -> None:
    place.publish("mirror", image, [f"path={tree}"])
    index = json.loads((tree / "streams/v1/index.json").read_text())
    images = json.loads((tree / index["index"]["images"]["path"]).read_text())
    (product,) = images["products"].values()
    (version,) = product["versions"].values()
    items = version["items"].values()
    for item in items:
        content = (tree / item["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (item["size"], item["sha256"])
    metadata, disk = sorted(items, key=lambda item: item["size"])
    both = (tree / metadata["path"]).read_bytes() + (tree / disk["path"]).read_bytes()
    assert metadata["combined_disk-kvm-img_sha256"] == hashlib.sha256(both).hexdigest()
    with tarfile.open(fileobj=io.BytesIO((tree / metadata["path"]).read_bytes())) as archive:
        assert archive.getnames() == ["metadata.yaml"]


def test_virt_builders_index_is_right(place: Place, image: Path, tree: Path) -> None:
    place.publish("mirror", image, [f"path={tree}"])
    index = configparser.ConfigParser()
    index.read(tree / "index")
    assert len(index.sections()) == 2
    for name in index.sections():
        disk = tree / index[name]["file"]
        assert hashlib.sha512(disk.read_bytes()).hexdigest() == index[name]["checksum[sha512]"]
        assert int(index[name]["size"]) == 48 << 20
    validate = shutil.which("virt-index-validate")
    if validate:
        subprocess.run([validate, tree / "index"], check=True)


def test_a_second_run_sends_and_changes_nothing(place: Place, image: Path, tree: Path) -> None:
    place.publish("mirror", image, [f"path={tree}"])
    before = files(tree)
    plan = place.plan("mirror", image, [f"path={tree}"])
    assert (plan["idle"], plan["bytes"]) == (True, 0)
    (done,) = place.publish("mirror", image, [f"path={tree}"])
    assert done["sent_bytes"] == 0
    assert files(tree) == before


def test_a_dry_run_sends_nothing(place: Place, image: Path, tree: Path) -> None:
    plan = place.plan("mirror", image, [f"path={tree}"])
    assert plan["bytes"] == image.stat().st_size
    assert [step["action"] for step in plan["steps"]] == ["upload", "create", "create"]
    assert not tree.exists()
    assert not place.receipts.exists()


def test_what_is_there_is_read_back_each_time(place: Place, image: Path, tree: Path) -> None:
    (done,) = place.publish("mirror", image, [f"path={tree}"])
    disk = tree / done["ids"]["path"]
    with disk.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"!")
    with pytest.raises(VerificationError, match="not what was sent"):
        place.publish("mirror", image, [f"path={tree}"])


def test_two_images_stand_side_by_side_and_the_newer_one_leads(place: Place, image: Path, tree: Path) -> None:
    other = make_image(place.folder / "other", seed=2)
    (other.parent / "image.json").write_text((image.parent / "image.json").read_text().replace("1795", "1796"))
    for one in (image, other):
        place.publish("mirror", one, [f"path={tree}"])
    index = configparser.ConfigParser()
    index.read(tree / "index")
    assert len(index.sections()) == 3
    newest = json.loads(place.run("published", "--json", *place.options, other).stdout)[0]
    assert index["recvirt-default"]["file"] == newest["receipt"]["ids"]["path"]


def test_pruning_takes_files_and_entries_and_never_the_newest(place: Place, image: Path, tree: Path) -> None:
    other = make_image(place.folder / "other", seed=2)
    (other.parent / "image.json").write_text((image.parent / "image.json").read_text().replace("1795", "1794"))
    for one in (image, other):
        place.publish("mirror", one, [f"path={tree}"])
    words = ["prune", "mirror", "--keep", "1", "--older-than", "0", "--json", "--set", f"mirror.path={tree}"]
    words += place.options[:2]
    would = json.loads(place.run(*words, "--dry-run").stdout)
    assert len(would) == 1
    assert len(list((tree / "images").iterdir())) == 2
    assert json.loads(place.run(*words).stdout) == would
    (left,) = (tree / "images").iterdir()
    assert would[0]["name"] not in (tree / "index").read_text()
    assert left.name in (tree / "index").read_text()
    assert json.loads(place.run(*words).stdout) == []


def test_a_full_disk_is_told_before_anything_is_sent(
    place: Place, image: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderTree, "free_bytes", lambda _self: 1000)
    with pytest.raises(ConfigError, match=r"1\.0 kB free"):
        place.publish("mirror", image, [f"path={tree}"])
    assert not tree.exists()


def test_a_disk_that_fills_up_is_an_error_and_the_next_run_mends_it(
    place: Place, image: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("recvirt.publish.trees.copy_sparse", full)
        with pytest.raises(OSError, match="No space"):
            place.publish("mirror", image, [f"path={tree}"])
    assert not list(tree.rglob("*.qcow2"))
    place.publish("mirror", image, [f"path={tree}"])


def test_killed_at_any_time_the_next_run_ends_the_same(place: Place, image: Path, tree: Path, tmp_path: Path) -> None:
    place.publish("mirror", image, [f"path={tree}"])
    wanted = {name: content for name, (content, _) in files(tree).items() if not name.endswith(".sig")}
    other = tmp_path / "killed"
    words = [sys.executable, "-m", "recvirt", "-q", "publish", "mirror", str(image), "--set", f"mirror.path={other}"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    for delay in (0.45, 0.6, 0.7, 0.8):
        process = subprocess.Popen([*words, *place.options], cwd=tmp_path, env=environment)
        time.sleep(delay)
        process.kill()
        process.wait()
    place.publish("mirror", image, [f"path={other}"])
    found = {name: content for name, (content, _) in files(other).items() if not name.endswith((".sig", ".part"))}
    assert found == wanted


def test_two_runs_at_once_make_one(place: Place, image: Path, tree: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "recvirt", "publish", "mirror", str(image), "--set", f"mirror.path={tree}", "--json"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    both = [
        subprocess.Popen([*words, *place.options], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sent = [json.loads(process.communicate()[0])[0]["sent_bytes"] for process in both]
    assert sorted(sent) == [0, image.stat().st_size]
    assert len(list((tree / "images").iterdir())) == 1
