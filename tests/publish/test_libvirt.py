"""libvirt itself: a pool of a libvirtd of the test's own, overlays that keep a volume, kills in the middle."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.errors import PublishError
from tests.publish import servers
from tests.publish.services import environment
from tests.publish.support import Place, make_image

pytest.importorskip("libvirt")
from tests.cloud.faults.libvirtd import Libvirtd, scratch, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    if why_not() or servers.why_not("libvirt"):
        pytest.skip(why_not() or servers.why_not("libvirt"))
    folder = scratch("recvirt-publish-")
    daemon = Libvirtd(folder)
    try:
        daemon.start(hold=False)
        yield daemon.qemu_uri
    finally:
        daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def over_ssh(uri: str, tmp_path: Path) -> Iterator[str]:
    """The same libvirtd through an SSH server of the test's own."""
    missing = [name for name in ("sshd", "nc") if servers.find(name) is None]
    if missing:
        # Not installed with the other servers: Debian's package starts one for the whole network.
        pytest.skip(f"wants {', '.join(missing)}: apt install openssh-server netcat-openbsd")
    for name in ("client", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/client.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's folder without rights, which its package's service makes
    words = [str(servers.find("sshd")), "-D", "-e", "-f", str(tmp_path / "sshd_config")]
    kind, key, *_ = (tmp_path / "host.pub").read_text().split()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    client = tmp_path / "ssh"
    client.write_text(f'#!/bin/sh\nexec ssh -o UserKnownHostsFile={tmp_path}/known "$@"\n')
    client.chmod(0o755)
    log_path = tmp_path / "sshd.log"
    with log_path.open("w") as log, subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log) as sshd:
        try:
            deadline = time.monotonic() + 30
            while "Server listening" not in log_path.read_text():
                assert sshd.poll() is None and time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.05)
            path = uri.partition("socket=")[2]
            yield (
                f"qemu+ssh://{getpass.getuser()}@127.0.0.1:{port}/system"
                f"?socket={path}&command={client}&keyfile={tmp_path}/client&no_tty=1"
            )
        finally:
            sshd.kill()


@pytest.fixture
def pool(uri: str, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "pool"
    folder.mkdir()
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    virsh(uri, "pool-create-as", "images", "dir", "--target", str(folder))
    yield folder
    virsh(uri, "pool-destroy", "images")


def virsh(uri: str, *words: str) -> str:
    return subprocess.run(["virsh", "-q", "-c", uri, *words], check=True, capture_output=True, text=True).stdout


def settings(uri: str) -> list[str]:
    return [f"uri={uri}", "pool=images"]


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_volume_is_the_image_and_is_not_sent_twice(
    place: Place, uri: str, pool: Path, tmp_path: Path, kind: str
) -> None:
    image = make_image(tmp_path / "image", kind)
    assert place.plan("libvirt", image, settings(uri))["bytes"] == image.stat().st_size
    (first,) = place.publish("libvirt", image, settings(uri))
    assert (pool / first["ids"]["volume"]).read_bytes() == image.read_bytes()
    written = (pool / first["ids"]["volume"]).stat().st_mtime_ns
    assert place.plan("libvirt", image, settings(uri))["idle"]
    (second,) = place.publish("libvirt", image, settings(uri))
    assert (second["sent_bytes"], second["ids"]) == (0, first["ids"])
    assert (pool / first["ids"]["volume"]).stat().st_mtime_ns == written
    described = virsh(uri, "vol-dumpxml", "--pool", "images", first["ids"]["volume"])
    assert f"<format type='{kind}'/>" in described


def test_a_volume_arrives_over_ssh(place: Place, over_ssh: str, pool: Path, image: Path) -> None:
    (first,) = place.publish("libvirt", image, settings(over_ssh))
    assert (pool / first["ids"]["volume"]).read_bytes() == image.read_bytes()
    (second,) = place.publish("libvirt", image, settings(over_ssh))
    assert (second["sent_bytes"], second["ids"]) == (0, first["ids"])


def test_a_spoilt_volume_is_sent_again(place: Place, uri: str, pool: Path, image: Path) -> None:
    (first,) = place.publish("libvirt", image, settings(uri))
    volume = pool / first["ids"]["volume"]
    with volume.open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"spoilt")
    (second,) = place.publish("libvirt", image, settings(uri))
    assert second["sent_bytes"] == image.stat().st_size
    assert volume.read_bytes() == image.read_bytes()


def test_killed_in_the_middle_the_next_run_ends_right(place: Place, uri: str, pool: Path, image: Path) -> None:
    words = [sys.executable, "-m", "recvirt", "-q", "publish", "libvirt", str(image), *place.options]
    words += [word for setting in settings(uri) for word in ("--set", f"libvirt.{setting}")]
    for delay in (0.5, 0.8, 1.0):
        process = subprocess.Popen(words, cwd=place.folder, env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    (done,) = place.publish("libvirt", image, settings(uri))
    assert (pool / done["ids"]["volume"]).read_bytes() == image.read_bytes()
    assert len(list(pool.iterdir())) == 1


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_a_killed_run_left_is_gone_on_with(
    place: Place, uri: str, pool: Path, tmp_path: Path, spoilt: bool
) -> None:
    image = make_image(tmp_path / "larger", size=96 << 20, pieces=24, seed=7)
    content, left = image.read_bytes(), 9_000_000
    volume = f"{place.provider('libvirt', image, settings(uri)).job.image.name}.qcow2"
    start = b"spoilt" + content[6:left] if spoilt else content[:left]
    (pool / volume).write_bytes(start)
    virsh(uri, "pool-refresh", "images")
    assert place.plan("libvirt", image, settings(uri))["bytes"] == len(content) - (8 << 20)
    (done,) = place.publish("libvirt", image, settings(uri))
    assert (pool / volume).read_bytes() == content
    # Another content than the image's is found by the reading back, and all is sent anew.
    assert done["sent_bytes"] == len(content) - (8 << 20) + (len(content) if spoilt else 0)


def test_pruning_keeps_what_an_overlay_lies_on(place: Place, uri: str, pool: Path, tmp_path: Path) -> None:
    volumes = []
    for seed in (1, 2, 3):
        (done,) = place.publish("libvirt", make_image(tmp_path / str(seed), seed=seed), settings(uri))
        volumes.append(done["ids"]["volume"])
        os.utime(pool / volumes[-1], (1_700_000_000 + seed, 1_700_000_000 + seed))
    (pool / "somebodys.qcow2").write_bytes(b"x")
    virsh(uri, "vol-create-as", "images", "vm.qcow2", "1G", "--format", "qcow2", "--backing-vol", volumes[0],
          "--backing-vol-format", "qcow2")  # fmt: skip
    virsh(uri, "pool-refresh", "images")
    words = ["prune", "libvirt", "--keep", "1", "--older-than", "1", "--json", *place.options[:2]]
    words += [word for setting in settings(uri) for word in ("--set", f"libvirt.{setting}")]
    gone = [item["name"] for item in json.loads(place.run(*words).stdout)]
    assert gone == [volumes[1]]
    assert {path.name for path in pool.iterdir()} == {volumes[0], volumes[2], "vm.qcow2", "somebodys.qcow2"}


def test_the_recipes_domain_fits_libvirts_schema(place: Place, uri: str, pool: Path, image: Path) -> None:
    (done,) = place.publish("libvirt", image, settings(uri))
    schema = shutil.which("virt-xml-validate")
    assert schema, "libvirt-clients is needed"
    assert shutil.which("xmllint"), "libxml2-utils is needed"
    subprocess.run([schema, Path(done["recipe"]) / "domain.xml", "domain"], check=True)
    subprocess.run(["sh", "-n", Path(done["recipe"]) / "launch.sh"], check=True)


def test_an_upload_that_libvirt_refuses_is_told(place: Place, uri: str, pool: Path, image: Path) -> None:
    provider = place.provider("libvirt", image, settings(uri))
    assert pool.exists()
    with pytest.raises(PublishError, match="Storage volume not found"):
        provider._go_on(0)  # type: ignore[attr-defined]


def test_libvirts_own_words_are_told(place: Place, uri: str, pool: Path, image: Path) -> None:
    assert pool.exists()
    with pytest.raises(PublishError, match="no storage pool with matching name 'other'"):
        place.publish("libvirt", image, [f"uri={uri}", "pool=other"])
    with pytest.raises(PublishError, match="libvirt at"):
        place.publish("libvirt", image, ["uri=qemu+unix:///system?socket=/nowhere/s", "pool=images"])
