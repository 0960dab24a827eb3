"""publish.yaml: faults of all targets at once, with file and line, before anything is looked at or sent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from recvirt.errors import ConfigError
from recvirt.publish.config import PROVIDERS, Targets, provider_class
from recvirt.publish.provider import TargetConfig
from tests.publish.servers import ROOT
from tests.publish.support import Place


def load(folder: Path, text: str, *names: str, overrides: tuple[str, ...] = ()) -> dict[str, TargetConfig]:
    path = folder / "publish.yaml"
    path.write_text(text)
    targets = Targets(path, overrides)
    found = {name: targets.load(name) for name in names}
    targets.done()
    return {name: pair[1] for name, pair in found.items() if pair}


def faults(folder: Path, text: str, *names: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *names, overrides=overrides)
    assert caught.value.exit_code == 3
    return caught.value.message


def test_a_target_is_its_provider_or_says_another(tmp_path: Path) -> None:
    text = "mirror: {path: a}\nlab: {provider: mirror, url: 'https://lab.example/images'}\n"
    found = load(tmp_path, text, "mirror", "lab", overrides=("mirror.path=/b",))
    assert (found["mirror"].path, found["lab"].url) == ("/b", "https://lab.example/images")  # type: ignore[attr-defined]


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (config,) = load(tmp_path, "mirror: {path: tree}\n", "mirror").values()
    assert config.path_of_tree == tmp_path / "tree"  # type: ignore[attr-defined]


def test_faults_of_all_targets_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    text = "aws:\n  regoin: eu-west-1\n  share: [12]\ngcp:\n  project: p\nmirror: {}\n"
    said = faults(tmp_path, text, "aws", "gcp", "mirror", "awss")
    assert "publish.yaml:2: aws.regoin: unknown key; did you mean 'region'?" in said
    assert "publish.yaml:3: aws.share.0: must be text" in said
    assert "gcp.bucket: is required" in said
    assert "publish.yaml:5: gcp.project" in said
    assert "exactly one of path, url and s3" in said
    assert "there is no provider 'awss'; did you mean 'aws'?" in said


def test_an_overrides_fault_names_it(tmp_path: Path) -> None:
    assert "--set aws.region=Nowhere" in faults(tmp_path, "{}\n", "aws", overrides=("aws.region=Nowhere",))


@pytest.mark.parametrize("text", ["aws: [1]\n", "aws: {region: &a x\n", "- 1\n"])
def test_what_is_no_mapping_is_told(tmp_path: Path, text: str) -> None:
    assert "publish.yaml" in faults(tmp_path, text, "aws")


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_has_a_class_and_says_what_its_keys_mean(name: str) -> None:
    kind = provider_class(name)
    assert kind.name == name
    for key, field in kind.config_model.model_fields.items():
        assert field.description, key
        words = ("password", "secret", "token", "credential")
        assert not any(word in key for word in words), f"{name}.{key}: secrets have no keys"


def test_an_address_with_a_login_is_refused(tmp_path: Path) -> None:
    assert "user's name" in faults(tmp_path, "mirror: {url: 'https://u:p@x.example/'}\n", "mirror")


def test_nothing_is_hashed_or_sent_when_one_target_is_wrong(place: Place, image: Path, tmp_path: Path) -> None:
    settings = ["--set", f"mirror.path={tmp_path / 'm'}", "--set", "gcp.project=x"]
    with pytest.raises(ConfigError, match="gcp"):
        place.run("publish", "mirror", "gcp", image, *settings, *place.options)
    assert not (tmp_path / "m").exists()


def test_a_static_rule_of_one_target_stops_all(place: Place, image: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Hetzner"):
        place.run("publish", "mirror", "hetzner", image, "--set", f"mirror.path={tmp_path / 'm'}", *place.options)
    assert not (tmp_path / "m").exists()


def test_the_manual_names_every_key_and_provider() -> None:
    text = (ROOT / "docs/publishing.md").read_text()
    for name in PROVIDERS:
        assert f"`{name}`" in text
        for key in provider_class(name).config_model.model_fields:
            # The folder is the configuration's own; endpoints of stand-ins are for tests.
            if key not in ("folder", "storage_endpoint", "compute_endpoint", "management"):
                assert re.search(rf"[`*]{key}[`*]", text), f"{name}.{key}"


def test_every_provider_says_what_rights_it_wants() -> None:
    text = (ROOT / "docs/policies/README.md").read_text()
    for name in ("aws", "gcp", "azure", "openstack", "oci-registry", "mirror", "libvirt", "digitalocean"):
        assert f"| {name} " in text
    json.loads((ROOT / "docs/policies/azure.json").read_text())
    assert yaml.safe_load((ROOT / "docs/policies/gcp.yaml").read_text())["includedPermissions"]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_the_ci_examples_are_yaml_and_call_targets_that_exist(name: str) -> None:
    text = (ROOT / "docs/ci" / name).read_text()
    assert yaml.safe_load(text)
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = re.findall(r"\bmake ([a-z-]+)", text)
    assert {"image", "acceptance", "publish"} <= set(called)
    assert set(called) <= set(targets)
