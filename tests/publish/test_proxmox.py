"""Proxmox VE: a template once, whatever a killed run left; numbers that others take; tokens, clones, recipes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.errors import DeniedError
from tests.publish import fakes
from tests.publish.fakes_proxmox import TOKEN, Proxmox
from tests.publish.support import Place, make_image
from tests.publish.tls import over_https


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECVIRT_PROXMOX_TOKEN", TOKEN)
    monkeypatch.setattr("recvirt.publish.providers.proxmox.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("recvirt.publish.budget.Budget.pause", lambda _self, _attempt, _asked: 0.0)


@pytest.fixture
def node() -> Proxmox:
    return Proxmox()


@pytest.fixture
def settings(node: Proxmox) -> Iterator[list[str]]:
    with fakes.serving(node.respond) as url:
        yield [f"url={url}", "node=pve"]


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_template_holds_the_image_and_a_second_run_changes_nothing(
    kind: str, place: Place, node: Proxmox, settings: list[str], tmp_path: Path
) -> None:
    image = make_image(tmp_path / "image", kind)
    plan = place.plan("proxmox", image, settings)
    assert plan["bytes"] == image.stat().st_size
    assert not node.uploads
    (first,) = place.publish("proxmox", image, settings)
    ((number, vm),) = node.machines.items()
    assert (first["ids"]["template"], vm["template"]) == (number, 1)
    assert vm["data"] == image.read_bytes()
    digest = json.loads(Path(first["receipt"]).read_text())["image"]["sha256"]
    assert vm["tags"].split(";") == ["recvirt", f"recvirt-digest-{digest}", "recvirt-profile-default"]
    assert node.files == {}  # the upload has done its work
    assert place.plan("proxmox", image, settings)["idle"]
    (second,) = place.publish("proxmox", image, settings)
    assert (second["sent_bytes"], second["ids"], second["new"]) == (0, first["ids"], False)
    assert (node.uploads, len(node.machines)) == (1, 1)
    text = "".join(path.read_text() for path in Path(first["recipe"]).iterdir())
    assert f"qm clone {number}" in text
    for secret in (TOKEN, TOKEN.partition("=")[2]):
        assert secret not in text + Path(first["receipt"]).read_text()
    subprocess.run(["sh", "-n", Path(first["recipe"]) / "launch.sh"], check=True)
    json.loads((Path(first["recipe"]) / "launch.json").read_text())


@pytest.mark.parametrize("left", ["upload", "short upload", "vm", "vm without a disk"])
def test_what_a_killed_run_left_is_gone_on_with(
    left: str, place: Place, node: Proxmox, settings: list[str], image: Path
) -> None:
    name = place.provider("proxmox", image, settings).job.image.name
    content = image.read_bytes()
    if "upload" in left:
        node.files[f"local:import/{name}.qcow2"] = content[:-5] if left == "short upload" else content
    else:
        disk = {} if "without" in left else {"scsi0": "local-lvm:vm-100-disk-0,size=48M"}
        node.machines["100"] = {"name": name, "data": content, **disk}
    (done,) = place.publish("proxmox", image, settings)
    ((number, vm),) = node.machines.items()
    assert done["ids"]["template"] == number
    assert (vm["template"], vm["data"]) == (1, content)
    assert node.uploads == (0 if left in ("upload", "vm") else 1)
    assert node.files == {}


def test_a_number_that_somebody_takes_meanwhile_is_passed_over(
    place: Place, node: Proxmox, settings: list[str], image: Path
) -> None:
    node.taken = {"100"}
    (done,) = place.publish("proxmox", image, settings)
    assert done["ids"]["template"] == "101"
    with pytest.raises(PublishError, match="already exists"):
        place.publish("proxmox", make_image(place.folder / "b", seed=2), [*settings, "vm_id=100"])


def test_of_two_templates_the_lower_number_stays(
    place: Place, node: Proxmox, settings: list[str], image: Path
) -> None:
    provider = place.provider("proxmox", image, settings)
    place.publish("proxmox", image, settings)
    node.machines["200"] = {**node.machines["100"]}
    assert provider._without_twin("200") == "100"  # type: ignore[attr-defined]
    assert set(node.machines) == {"100"}


def test_a_template_that_is_made_already_is_no_fault(
    place: Place, node: Proxmox, settings: list[str], image: Path
) -> None:
    node.lost_answers = 1
    (done,) = place.publish("proxmox", image, settings)
    assert node.machines[done["ids"]["template"]]["template"] == 1


def test_a_failed_task_is_told_and_nothing_is_made(
    place: Place, node: Proxmox, settings: list[str], image: Path
) -> None:
    node.exit_status = "can't activate storage 'local'"
    with pytest.raises(PublishError, match="can't activate storage"):
        place.publish("proxmox", image, settings)
    assert node.machines == {}
    assert not place.receipts.exists() or not list(place.receipts.glob("*.json"))


def test_a_refusal_is_not_tried_again(place: Place, node: Proxmox, settings: list[str], image: Path) -> None:
    with pytest.raises(PublishError, match="storage 'other' does not exist"):
        place.publish("proxmox", image, [*settings, "import_storage=other"])
    assert node.uploads == 0


@pytest.mark.parametrize("token", ["", "secret-9b1c", TOKEN.replace("01234567-", "99999999-")])
def test_a_token_that_is_absent_or_wrong_is_told_and_never_shown(
    token: str, place: Place, settings: list[str], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECVIRT_PROXMOX_TOKEN", token)
    with pytest.raises(DeniedError) as caught:
        place.publish("proxmox", image, settings)
    assert caught.value.exit_code == 8
    for word in (token, token.partition("=")[2]):
        assert not word or word not in caught.value.message + caught.value.hint


def test_pruning_spares_what_linked_clones_hang_on(
    place: Place, node: Proxmox, settings: list[str], tmp_path: Path
) -> None:
    for seed in (1, 2, 3):
        place.publish("proxmox", make_image(tmp_path / str(seed), seed=seed), settings)
    node.machines["500"] = {"name": "somebodys", "tags": "web"}
    node.in_use = {"100"}
    words = ["prune", "proxmox", "--keep", "1", "--older-than", "0", "--json", *place.options[:2]]
    words += [word for setting in settings for word in ("--set", f"proxmox.{setting}")]
    place.run(*words)
    assert set(node.machines) == {"100", "102", "500"}


def test_without_a_url_there_is_only_the_recipe(place: Place, image: Path) -> None:
    (done,) = place.publish("proxmox", image, ["storage=fast"])
    assert (done["ids"], done["receipt"]) == ({}, None)
    text = (Path(done["recipe"]) / "launch.sh").read_text()
    assert "qm create" in text
    assert "fast:0,import-from=" in text
    with pytest.raises(ConfigError, match="a node is wanted"):
        place.publish("proxmox", image, ["url=https://pve.example:8006"])


@pytest.mark.slow
def test_the_clusters_own_authority_counts_whatever_else_is_set(
    place: Place, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web/api2/json/cluster").mkdir(parents=True)
    (tmp_path / "web/api2/json/cluster/resources").write_text('{"data": []}')
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
    with over_https(tmp_path / "web", authority) as url:
        known = place.provider("proxmox", None, [f"url={url}", "node=pve", f"ca={authority / 'ca.pem'}"])
        assert known.remotes() == []
        with pytest.raises(PublishError, match=r"(?i)certificate"):
            place.provider("proxmox", None, [f"url={url}", "node=pve"]).remotes()
