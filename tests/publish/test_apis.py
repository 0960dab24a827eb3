"""Google, Azure's galleries, DigitalOcean, Keystone: requests against schemas, and answers of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recvirt.errors import ConfigError, PublishError, VerificationError
from recvirt.publish.errors import DeniedError
from recvirt.publish.provider import Published
from recvirt.publish.providers.azure import Azure
from recvirt.publish.providers.gcp import LICENCE, Gcp
from tests.publish import fakes, servers
from tests.publish.support import Place, make_image

GCP = ["project=project-1", "bucket=images", "auth=none"]


def gcp(place: Place, image: Path | None, *more: str) -> Gcp:
    found = place.provider("gcp", image, [*GCP, *more])
    assert isinstance(found, Gcp)
    return found


def schema_of(name: str) -> dict[str, Any]:
    """A schema of Compute Engine's discovery document, as JSON schema: unknown keys are faults."""
    place = "lib/python*/site-packages/googleapiclient/discovery_cache/documents/compute.v1.json"
    found = next(iter(servers.HOME.glob(place)), None)
    if found is None:
        pytest.fail("wants google-api-python-client: sh scripts/publish-servers.sh")
    schemas = json.loads(found.read_text())["schemas"]

    def strict(node: Any) -> Any:
        if isinstance(node, list):
            return [strict(item) for item in node]
        if not isinstance(node, dict):
            return node
        # What jsonschema knows; Google's bounds are texts, its formats its own.
        result = {key: strict(node[key]) for key in ("items", "additionalProperties", "enum", "type") if key in node}
        if "properties" in node:
            result["properties"] = {key: strict(value) for key, value in node["properties"].items()}
            result["additionalProperties"] = False
        if "$ref" in node:
            result["$ref"] = f"#/definitions/{node['$ref']}"
        if node.get("type") == "any":
            del result["type"]
        return result

    definitions = {key: strict(value) for key, value in schemas.items()}
    return {"definitions": definitions, "$ref": f"#/definitions/{name}"}


@pytest.mark.slow
def test_images_insert_fits_googles_own_document(place: Place, image: Path) -> None:
    import jsonschema

    body = gcp(place, image, "storage_location=eu").image_body()
    jsonschema.validate(body, schema_of("Image"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "licences": []}, schema_of("Image"))
    assert body["licenses"] == [LICENCE]
    assert {"type": "UEFI_COMPATIBLE"} in body["guestOsFeatures"]
    for key, value in body["labels"].items():
        assert len(key) <= 63
        assert len(value) <= 63
        assert value == value.lower()


@pytest.mark.slow
def test_the_instance_of_the_recipe_fits_googles_own_document(place: Place, image: Path) -> None:
    import jsonschema

    from recvirt.publish.recipe import render

    provider = gcp(place, image)
    files = render(provider, Published({"image": "projects/p/global/images/i"}, "x"))
    jsonschema.validate(json.loads(files["launch.json"]), schema_of("Instance"))


def test_googles_refusals_are_told(place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = fakes.Compute()
    with fakes.serving(compute.respond) as url:
        provider = gcp(place, image, f"compute_endpoint={url}")
        monkeypatch.setattr(provider, "_send", lambda: (0, "compared"))
        compute.error = {"code": "QUOTA_EXCEEDED", "message": "Quota 'IMAGES' exceeded. Limit: 100.0"}
        with pytest.raises(PublishError, match=r"Quota 'IMAGES' exceeded") as caught:
            provider.publish()
        assert "prune" in caught.value.hint
        compute.error = None
        compute.images[provider.job.image.name] = {"name": "x", "labels": {"recvirt-digest": "0" * 63}}
        with pytest.raises(PublishError, match="is taken"):
            provider.plan()


def test_google_is_pruned_by_label(place: Place, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = fakes.Compute()
    with fakes.serving(compute.respond) as url:
        for seed in (1, 2, 3):
            provider = gcp(place, make_image(tmp_path / str(seed), seed=seed), f"compute_endpoint={url}")
            provider._insert(None)
        compute.images["other"] = {"name": "other", "creationTimestamp": "2020-01-01T00:00:00.000-08:00"}
        words = ["prune", "gcp", "--keep", "1", "--older-than", "0", "--json", *place.options[:2]]
        for setting in (*GCP, f"compute_endpoint={url}"):
            words += ["--set", f"gcp.{setting}"]
        gone = json.loads(place.run(*words).stdout)
    assert len(gone) == 2
    assert set(compute.images) == {provider.job.image.name, "other"}


# --- Azure's galleries

AZURE = [
    "account_url=https://images.blob.core.windows.net", "subscription='00000000-0000-0000-0000-000000000000'",
    "resource_group=g", "gallery=recvirt", "location=westeurope", "regions=[northeurope]", "definition=recvirt-default",
]  # fmt: skip


@pytest.fixture
def gallery() -> Iterator[tuple[fakes.Gallery, str]]:
    held = fakes.Gallery()
    with fakes.serving(held.respond) as url:
        yield held, url


def azure(place: Place, image: Path | None, url: str, monkeypatch: pytest.MonkeyPatch) -> Azure:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "images")
    monkeypatch.setattr(Azure, "_fresh_token", lambda _self: ("token", 1e12))
    found = place.provider("azure", image, [*AZURE, f"management={url}"])
    assert isinstance(found, Azure)
    return found


def test_a_gallery_gets_one_version_an_image(
    place: Place, image: Path, gallery: tuple[fakes.Gallery, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, url = gallery
    first = azure(place, image, url, monkeypatch)
    assert [step.action for step in first._plan_version()] == ["create", "create", "replicate"]
    identity = first._make_version()
    assert first._make_version() == identity
    assert [step.action for step in first._plan_version()] == ["exists"]
    other = azure(place, make_image(tmp_path / "other", seed=2), url, monkeypatch)  # of the same second
    versions = [identity.rpartition("/")[2], other._make_version().rpartition("/")[2]]
    for version in versions:
        assert [str(int(part)) for part in version.split(".")] == version.split(".")
    assert len(set(versions)) == 2
    (_, definition), (_, body), _ = held.bodies
    assert definition["properties"]["hyperVGeneration"] == "V2"
    assert body["properties"]["storageProfile"]["osDiskImage"]["source"]["uri"].endswith(".vhd")
    regions = body["properties"]["publishingProfile"]["targetRegions"]
    assert [region["name"] for region in regions] == ["westeurope", "northeurope"]
    remotes = other.remotes()
    assert len(remotes) == 2
    other.delete(remotes[0])
    other.delete(remotes[0])
    assert len(other.remotes()) == 1


def test_the_footer_is_a_vhds_and_whole_mebibytes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    for size in (48 << 20, (48 << 20) + 512, (49 << 20) - 512):
        image = make_image(tmp_path / str(size), "raw", accepted=False, size=size)
        blob = azure(place, image, "http://127.0.0.1:1", monkeypatch).blob
        assert blob.disk_bytes == -(-size // (1 << 20)) << 20
        path = tmp_path / f"{size}.vhd"
        with path.open("wb") as stream:
            stream.truncate(blob.disk_bytes)
            stream.seek(blob.disk_bytes)
            stream.write(blob.footer)
        words = ["qemu-img", "info", "--output=json", "-f", "vpc", str(path)]
        assert json.loads(subprocess.check_output(words))["virtual-size"] == blob.disk_bytes
        assert max(blob.runs.values()) <= 4 << 20
        assert all(offset % 512 == 0 for offset in blob.runs)


# --- DigitalOcean


def test_digitalocean_fetches_what_was_compared(
    place: Place, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ocean, content = fakes.DigitalOcean(), [image.read_bytes()]
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", "t")
    monkeypatch.setattr("recvirt.publish.providers.digitalocean.time.sleep", lambda _s: None)
    with fakes.serving(ocean.respond) as url, fakes.serving(lambda *_a: (200, content[0])) as mirror:
        settings = [f"endpoint={url}", f"url={mirror}/images/{{name}}/{{name}}.{{format}}"]
        for sent in (True, False):
            (done,) = place.publish("digitalocean", image, settings)
            assert done["new"] is sent
        assert len(ocean.images) == 1
        assert ocean.bodies[0]["url"].endswith(".qcow2")
        content[0] = content[0][:-1] + b"!"
        other = make_image(tmp_path / "other", seed=2)
        with pytest.raises(VerificationError):
            place.publish("digitalocean", other, settings)
        provider = place.provider("digitalocean", None, settings)
        (remote,) = provider.remotes()
        provider.delete(remote)
        provider.delete(remote)
        monkeypatch.delenv("DIGITALOCEAN_TOKEN")
        with pytest.raises(DeniedError, match="no token"):
            provider.remotes()


# --- Keystone


def clouds(folder: Path, url: str, password: str) -> None:
    auth = {"auth_url": f"{url}/v3", "username": "u", "project_name": "p", "user_domain_name": "Default",
            "project_domain_name": "Default"}  # fmt: skip
    (folder / "clouds.yaml").write_text(json.dumps({"clouds": {"lab": {"auth": auth, "region_name": "one"}}}))
    (folder / "secure.yaml").write_text(json.dumps({"clouds": {"lab": {"auth": {"password": password}}}}))


@pytest.mark.slow
def test_a_token_that_ran_out_is_asked_for_again(place: Place, image: Path, tmp_path: Path) -> None:
    if servers.why_not("openstack"):
        pytest.skip(servers.why_not("openstack"))
    with servers.glance(tmp_path / "glance", token="fresh") as glance:
        keystone = fakes.Keystone(glance, ["old", "fresh"])
        with fakes.serving(keystone.respond) as url:
            keystone.url = url
            clouds(tmp_path, url, "right")
            (done,) = place.publish("openstack", image, ["cloud=lab"])
            assert done["ids"]["image"]
            with pytest.raises(PublishError, match="two region not found"):
                place.publish("openstack", image, ["cloud=lab", "region=two"])
            keystone.tokens = ["old"]
            with pytest.raises(DeniedError) as caught:
                place.publish("openstack", image, ["cloud=lab"])
            assert "expired" in caught.value.hint


def test_a_wrong_password_is_denied_and_not_told(place: Place, image: Path, tmp_path: Path) -> None:
    keystone = fakes.Keystone("http://127.0.0.1:1", ["x"])
    with fakes.serving(keystone.respond) as url:
        keystone.url = url
        clouds(tmp_path, url, "wrong-7f3a")
        with pytest.raises(DeniedError) as caught:
            place.publish("openstack", image, ["cloud=lab"])
    assert "7f3a" not in caught.value.message + caught.value.hint


def test_a_cloud_that_nobody_knows_is_told(place: Place, image: Path) -> None:
    with pytest.raises(ConfigError, match=r"no clouds\.yaml has a cloud 'x'"):
        place.publish("openstack", image, ["cloud=x"])
    with pytest.raises(ConfigError, match="not known which OpenStack"):
        place.publish("openstack", image, [])


@pytest.mark.parametrize(
    ("module", "extra", "settings"),
    [("boto3", "aws", ["region=eu-central-1"]), ("keystoneauth1", "openstack", ["cloud=lab"])],
)
def test_a_library_that_is_absent_is_named_with_the_command(
    place: Place, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str,
    settings: list[str],
) -> None:  # fmt: skip
    import sys

    from recvirt.publish.errors import MissingSdkError

    clouds(tmp_path, "http://127.0.0.1:1", "x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingSdkError) as caught:
        place.publish(extra, image, settings)
    assert f"pip install 'recvirt[{extra}]'" in caught.value.hint
    assert caught.value.exit_code == 4
