"""Registries: logins of each kind, uploads that the server forgot, a tag that is another's, pruning, pulling back."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.budget import Budget
from recvirt.publish.errors import DeniedError
from recvirt.publish.http import Http
from recvirt.publish.providers.oci import Layer
from recvirt.publish.registry import Registry, stored_login
from recvirt.publish.source import load_source
from tests.publish import fakes, servers
from tests.publish.support import Place, make_image

# --- without a server


def test_the_layer_is_a_tar_at_any_place(image: Path, tmp_path: Path) -> None:
    import tarfile

    layer = Layer(load_source(image, lambda _d, _p: None))
    whole = layer.read(0, layer.size)
    assert layer.digest == f"sha256:{hashlib.sha256(whole).hexdigest()}"
    for offset in (0, 511, 512, 1023, 1024, 1025, 1_000_000, layer.size - 1025, layer.size - 1):
        assert layer.read(offset, 5000) == whole[offset : offset + 5000]
    (tmp_path / "layer.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "layer.tar") as archive:
        folder, disk = archive.getmembers()
        assert (folder.name, folder.isdir()) == ("disk", True)
        assert (disk.uid, disk.gid, disk.mode) == (107, 107, 0o440)
        content = archive.extractfile(disk)
        assert content is not None
        assert content.read() == image.read_bytes()


def test_a_raw_image_is_refused_before_anything_is_sent(place: Place, tmp_path: Path) -> None:
    raw = make_image(tmp_path / "raw", "raw")
    with pytest.raises(ConfigError, match="is made of a qcow2"):
        place.publish("oci-registry", raw, ["repository=127.0.0.1:1/x", "insecure=true"])


def tokens(asked: list[str]) -> Any:
    """A registry whose tokens run out after two requests."""
    state = {"left": 0, "number": 0}

    def respond(method: str, path: str, query: dict[str, list[str]], _body: Any) -> fakes.Answer:
        if path == "/token":
            asked.append(query["authorization"][0])
            assert query["service"] == ["registry.example"]
            assert query["scope"] == ["repository:a/b:pull,push,delete"]
            state.update(left=2, number=state["number"] + 1)
            return 200, {"token": f"t{state['number']}"}
        if query["authorization"] != [f"Bearer t{state['number']}"] or state["left"] <= 0:
            realm = f'Bearer realm="{respond.url}/token",service="registry.example",scope="repository:a/b:pull"'  # type: ignore[attr-defined]
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}, {
                "WWW-Authenticate": realm
            }  # fmt: skip
        state["left"] -= 1
        return 200, {"tags": ["one"]}

    return respond


def test_a_token_is_asked_for_with_the_stored_login_and_renewed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    respond = tokens(asked)
    with fakes.serving(respond) as url:
        respond.url = url
        host = url.removeprefix("http://")
        monkeypatch.setenv("DOCKER_CONFIG", str(place.folder))
        word = base64.b64encode(b"me:secret").decode()
        (place.folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": word}}}))
        assert stored_login(host) == ("me", "secret")
        registry = Registry(Http(Budget(), timeout=5), f"{host}/a/b", insecure=True)
        for _ in range(5):
            assert registry.tags() == ["one"]
    assert asked == [f"Basic {word}"] * 3


# --- with a server


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    if servers.why_not("oci-registry"):
        pytest.skip(servers.why_not("oci-registry"))
    with servers.registry(tmp_path / "registry") as found:
        yield found


def settings(host: str) -> list[str]:
    return [f"repository={host}/recvirt/images", "insecure=true", "chunk_mib=5"]


@pytest.mark.slow
def test_a_login_is_wanted_and_found(
    place: Place, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if servers.why_not("oci-registry"):
        pytest.skip(servers.why_not("oci-registry"))
    with servers.registry(tmp_path / "registry", login=True) as host:
        with pytest.raises(DeniedError, match="wants a login") as caught:
            place.publish("oci-registry", image, settings(host))
        assert "docker login" in caught.value.hint
        monkeypatch.setenv("RECVIRT_REGISTRY_USER", "u")
        monkeypatch.setenv("RECVIRT_REGISTRY_PASSWORD", "wrong-9b1c")
        with pytest.raises(DeniedError) as caught:
            place.publish("oci-registry", image, settings(host))
        assert "9b1c" not in caught.value.message
        monkeypatch.setenv("RECVIRT_REGISTRY_PASSWORD", "p")
        (done,) = place.publish("oci-registry", image, settings(host))
        assert done["sent_bytes"]


@pytest.mark.slow
def test_an_upload_that_the_registry_forgot_begins_anew(place: Place, image: Path, host: str, tmp_path: Path) -> None:
    provider = place.provider("oci-registry", image, settings(host))
    with provider.job.journal() as journal:
        journal.begin({"upload": f"http://{host}/v2/recvirt/images/blobs/uploads/00000000-0000-0000-0000-000000000000"})
    (done,) = place.publish("oci-registry", image, settings(host))
    assert done["sent_bytes"] > image.stat().st_size
    assert not list((tmp_path / "state").glob("*.journal"))


@pytest.mark.slow
def test_a_tag_that_is_anothers_is_told(place: Place, image: Path, host: str, tmp_path: Path) -> None:
    other = make_image(tmp_path / "other", seed=2)
    (done,) = place.publish("oci-registry", other, settings(host))
    base = f"http://{host}/v2/recvirt/images/manifests"
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = requests.get(f"{base}/{done['ids']['tag'].rpartition(':')[2]}", headers={"Accept": kind}, timeout=10)
    name = place.provider("oci-registry", image, settings(host)).job.image.name
    requests.put(f"{base}/{name}", data=manifest.content, headers={"Content-Type": kind}, timeout=10).raise_for_status()
    with pytest.raises(PublishError, match="is taken"):
        place.publish("oci-registry", image, settings(host))


@pytest.mark.slow
def test_moving_tags_follow_and_pruning_spares_them(place: Place, image: Path, host: str, tmp_path: Path) -> None:
    older = make_image(tmp_path / "older", seed=2)
    (older.parent / "image.json").write_text((image.parent / "image.json").read_text().replace("1795", "1794"))
    more = [*settings(host), "tags=[latest]"]
    (first,) = place.publish("oci-registry", older, more)
    (second,) = place.publish("oci-registry", image, more)
    registry = place.provider("oci-registry", None, more).registry  # type: ignore[attr-defined]
    latest = registry.manifest("latest")
    assert latest is not None
    assert second["ids"]["reference"].endswith(latest[1])
    words = ["prune", "oci-registry", "--keep", "1", "--older-than", "0", "--json", *place.options[:2]]
    words += [word for setting in more for word in ("--set", f"oci-registry.{setting}")]
    gone = json.loads(place.run(*words).stdout)
    assert [first["ids"]["reference"].endswith(item["id"]) for item in gone] == [True]
    assert registry.manifest("latest") is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="wants skopeo")
def test_another_client_pulls_it(place: Place, image: Path, host: str, tmp_path: Path) -> None:
    (done,) = place.publish("oci-registry", image, settings(host))
    words = ["skopeo", "--tmpdir", str(tmp_path), "copy", "--src-tls-verify=false"]
    words += [f"docker://{done['ids']['reference']}", f"dir:{tmp_path / 'pulled'}"]
    subprocess.run(words, check=True, capture_output=True)
    layer = max((tmp_path / "pulled").iterdir(), key=lambda path: path.stat().st_size)
    subprocess.run(["tar", "xf", layer, "-C", tmp_path], check=True)
    (disk,) = (tmp_path / "disk").iterdir()
    assert disk.read_bytes() == image.read_bytes()


@pytest.mark.slow
def test_oras_pulls_it_under_its_name_and_its_disk_is_the_image(
    place: Place, image: Path, host: str, tmp_path: Path
) -> None:
    client_module = pytest.importorskip("oras.client", reason="wants oras (pip install 'recvirt[dev]')")
    (done,) = place.publish("oci-registry", image, settings(host))
    client = client_module.OrasClient(insecure=True)
    for reference in (done["ids"]["reference"], done["ids"]["tag"]):
        (pulled,) = client.pull(target=reference, outdir=str(tmp_path / "pulled"), overwrite=True)
        layer = Path(pulled)
        assert layer.name == f"{done['ids']['tag'].rpartition(':')[2]}.tar"
        subprocess.run(["tar", "xf", layer, "-C", tmp_path], check=True)
        (disk,) = (tmp_path / "disk").iterdir()
        assert hashlib.sha256(disk.read_bytes()).hexdigest() == hashlib.sha256(image.read_bytes()).hexdigest()
        disk.unlink()
        layer.unlink()
