"""An image that was published is the image: pulled back by another client it boots, and runs VMs."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from recvirt.accept import Options, run_acceptance
from recvirt.accept.promise import promises_of
from recvirt.model import Profile
from recvirt.sandbox import ToolsRoot
from tests.publish import servers
from tests.publish.support import Place

#: On both firmwares, and an L2 in it.
CHECKS = ("boots-on-bios", "l2-under-kvm", "boots-on-uefi")


def test_what_oras_pulls_from_a_registry_boots(
    image: Path, profile: Profile, tools: ToolsRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := servers.why_not("oci-registry"):
        pytest.skip(reason)
    client_module = pytest.importorskip("oras.client", reason="wants oras (pip install 'recvirt[dev]')")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with servers.registry(tmp_path / "registry") as host:
        settings = [f"repository={host}/recvirt/images", "insecure=true"]
        (done,) = Place(tmp_path).publish("oci-registry", image, settings, "--unaccepted")
        client = client_module.OrasClient(insecure=True)
        (layer,) = client.pull(target=done["ids"]["reference"], outdir=str(tmp_path / "pulled"))
    subprocess.run(["tar", "xf", layer, "-C", tmp_path], check=True)
    (disk,) = (tmp_path / "disk").iterdir()
    with disk.open("rb") as mine, image.open("rb") as theirs:
        assert hashlib.file_digest(mine, "sha256").digest() == hashlib.file_digest(theirs, "sha256").digest()
    options = Options(checks=CHECKS)
    report = run_acceptance(
        disk, profile, tools, tmp_path / "out", promises=promises_of(profile, image.parent), options=options
    )
    assert {result.name: result.outcome for result in report.results} == dict.fromkeys(CHECKS, "passed")
