"""Launch recipes: every provider has one, in words that each language can read whatever the values are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

from recvirt.publish.config import PROVIDERS, provider_class
from recvirt.publish.provider import Job, Published
from recvirt.publish.recipe import environment, hcl, powershell, render
from recvirt.publish.signing import Signer, Signing
from recvirt.publish.source import Source, load_source

#: What each provider's configuration has to say, and what publishing gives back.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "mirror": ({"path": "/srv/images"}, {"path": "images/x/x.qcow2"}),
    "oci-registry": ({"repository": "r.example/a/b"}, {"reference": "r.example/a/b@sha256:00", "tag": "t"}),
    "libvirt": ({}, {"pool": "default", "volume": "v.qcow2", "path": "/p"}),
    "openstack": ({"cloud": "lab"}, {"image": "0-1-2", "name": "n"}),
    "azure": ({"account_url": "https://a.example"}, {"blob": "https://a.example/b", "version": "/subscriptions/v"}),
    "aws": ({"region": "eu-central-1"}, {"ami": "ami-1", "snapshot": "snap-1"}),
    "gcp": ({"project": "project-1", "bucket": "images"}, {"image": "projects/p/global/images/i", "family": "f"}),
    "digitalocean": ({"url": "https://m.example/i"}, {"image": "123"}),
}
TURNED_ON = {
    "mirror": "-cpu host", "oci-registry": "host-passthrough", "libvirt": "host-passthrough", "openstack": "nested=1",
    "azure": "Standard_D4s_v5", "aws": "NestedVirtualization", "gcp": "enable-nested-virtualization",
    "digitalocean": "unverified", "proxmox": "--cpu host", "oracle": "unverified", "alibaba": "bare metal",
    "hetzner": "does not work", "vmware": "vhv.enable", "hyperv": "ExposeVirtualizationExtensions $true",
    "xen": "nestedhvm = 1",
}  # fmt: skip


def recipe(name: str, source: Source, folder: Path) -> dict[str, str]:
    settings, ids = SETTINGS.get(name, ({}, {}))
    kind = provider_class(name)
    signer = Signer(Signing(), folder)
    job = Job(target=name, source=source, state_dir=folder, workers=1, signer=signer)
    return render(kind(kind.config_model(**settings), job), Published(ids, "compared", ("here",)))


@pytest.fixture(scope="session")
def source(image: Path) -> Source:
    return load_source(image, lambda _d, _p: None)


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_says_how_nesting_is_turned_on(name: str, source: Source, tmp_path: Path) -> None:
    files = recipe(name, source, tmp_path)
    body = "domain.xml" if name == "libvirt" else "launch.json"
    assert {"README.md", body, "main.tf"} < set(files)
    assert TURNED_ON[name] in "".join(files.values())
    assert "recvirt-nested-check" in files["README.md"]
    assert source.sha256 in files["README.md"]
    for file in files:
        assert file == "README.md" or f"`{file}`" in files["README.md"]
    json.loads(files.get("launch.json", "{}"))
    assert files["main.tf"].count("{") == files["main.tf"].count("}")
    for file, text in files.items():
        if file.endswith(".sh"):
            subprocess.run(["sh", "-n"], input=text.encode(), check=True)
    if "domain.xml" in files:
        assert ET.fromstring(files["domain.xml"]).find("cpu").get("mode") == "host-passthrough"  # type: ignore[union-attr]
    if "vm.yaml" in files:
        assert yaml.safe_load(files["vm.yaml"]) == json.loads(files["launch.json"])


@pytest.mark.parametrize("name", PROVIDERS)
def test_shellcheck_finds_nothing(name: str, source: Source, tmp_path: Path) -> None:
    checker = shutil.which("shellcheck")
    assert checker is not None, "shellcheck is needed"
    for file, text in recipe(name, source, tmp_path).items():
        if file.endswith(".sh"):
            subprocess.run([checker, "-"], input=text.encode(), check=True)


NASTY = "a'b\"c$(touch x)`y`${z}%{if}\\ \n\u2019"


def test_values_are_quoted_for_the_shell(tmp_path: Path) -> None:
    text = environment(tmp_path).from_string("printf %s {{ v | sh }}").render(v=NASTY)
    said = subprocess.run(["sh", "-c", text], capture_output=True, check=True, cwd=tmp_path).stdout.decode()
    assert said == NASTY
    assert list(tmp_path.iterdir()) == []


def test_values_are_quoted_for_the_other_languages(tmp_path: Path) -> None:
    env = environment(tmp_path)
    assert json.loads(env.from_string("{{ v | json }}").render(v=NASTY)) == NASTY
    node = ET.fromstring(env.from_string("<a b={{ v | xml }}/>").render(v="<&'\">"))
    assert node.get("b") == "<&'\">"
    quoted = hcl(NASTY)
    assert "$${z}" in quoted
    assert "%%{if}" in quoted
    assert powershell("it's") == "'it''s'"
    assert re.fullmatch(r"'(?:[^'\u2018-\u201b]|(['\u2018-\u201b])\1)*'", powershell(NASTY))


def test_a_value_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        environment(tmp_path).from_string("{{ nothing }}").render()
