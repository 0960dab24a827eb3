"""A provider as tests see it: a stand-in that runs, the settings that lead to it, and what it really holds."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.publish import fakes, proxy, servers
from tests.publish.amazon_rules import AmazonRules

AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AZURE_STORAGE_ACCOUNT": "devstoreaccount1",
    "AZURE_STORAGE_KEY": AZURITE_KEY, "RECVIRT_WEBDAV_USER": "u", "RECVIRT_WEBDAV_PASSWORD": "p",
}  # fmt: skip


@dataclass
class Service:
    """One stand-in behind a line that tests can disturb. ``names`` lists our images there; ``fetch`` gets one back."""

    target: str
    settings: list[str]
    line: proxy.Line
    names: Callable[[], list[str]]
    fetch: Callable[[str, Path], Path]
    extra: Any = None
    kind: str = ""
    environment: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))


def is_same_disk(image: Path, copy: Path, kind: str) -> None:
    """AssertionError unless both hold the same disk."""
    words: list[str | Path] = ["qemu-img", "compare", "-f", "qcow2", "-F", kind, image, copy]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def registry(folder: Path) -> Iterator[Service]:
    with servers.registry(folder) as host, proxy.line(host) as line:
        base = f"http://{host}/v2/recvirt/images"
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}

        def names() -> list[str]:
            return requests.get(f"{base}/tags/list", timeout=10).json().get("tags") or []

        def fetch(name: str, target: Path) -> Path:
            manifest = requests.get(f"{base}/manifests/{name}", headers=accept, timeout=10).json()
            layer = requests.get(f"{base}/blobs/{manifest['layers'][0]['digest']}", timeout=30).content
            (target / "layer.tar").write_bytes(layer)
            with tarfile.open(target / "layer.tar") as archive:
                member = next(m for m in archive if m.name.startswith("disk/") and m.isfile())
                assert (member.uid, member.gid) == (107, 107)
                stream = archive.extractfile(member)
                assert stream is not None
                (target / "got.qcow2").write_bytes(stream.read())
            return target / "got.qcow2"

        where = line.url.removeprefix("http://").rstrip("/")
        settings = [f"repository={where}/recvirt/images", "insecure=true", "chunk_mib=5"]
        yield Service("oci-registry", settings, line, names, fetch)


@contextmanager
def glance(folder: Path, method: str = "upload") -> Iterator[Service]:
    with servers.glance(folder) as url, proxy.line(url) as line:

        def images() -> dict[str, str]:
            found = requests.get(f"{url}/v2/images", timeout=10).json()["images"]
            return {image["name"]: image["id"] for image in found if image["status"] == "active"}

        def names() -> list[str]:
            found = requests.get(f"{url}/v2/images", timeout=10).json()["images"]
            return [image["name"] for image in found]

        def fetch(name: str, target: Path) -> Path:
            content = requests.get(f"{url}/v2/images/{images()[name]}/file", timeout=30).content
            (target / "got.qcow2").write_bytes(content)
            return target / "got.qcow2"

        yield Service("openstack", [f"endpoint={line.url}", "auth=none", f"method={method}"], line, names, fetch)


@contextmanager
def amazon(folder: Path) -> Iterator[Service]:
    with servers.moto(folder) as url, proxy.line(url) as line:
        import boto3

        line.rules = AmazonRules()
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "endpoint_url": url}
        ec2 = boto3.client("ec2", region_name="eu-central-1", **keys)
        ebs = boto3.client("ebs", region_name="eu-central-1", **keys)

        def names() -> list[str]:
            return [image["Name"] for image in ec2.describe_images(Owners=["self"])["Images"]]

        def fetch(name: str, target: Path) -> Path:
            del name
            filters = [{"Name": "tag:recvirt-whole", "Values": ["yes"]}]
            (snapshot,) = ec2.describe_snapshots(OwnerIds=["self"], Filters=filters)["Snapshots"]
            listed = ebs.list_snapshot_blocks(SnapshotId=snapshot["SnapshotId"])["Blocks"]
            with (target / "got.raw").open("wb") as stream:
                stream.truncate(1 << 30)
                for block in listed:
                    words = {"BlockIndex": block["BlockIndex"], "BlockToken": block["BlockToken"]}
                    data = ebs.get_snapshot_block(SnapshotId=snapshot["SnapshotId"], **words)["BlockData"].read()
                    stream.seek(block["BlockIndex"] * 524_288)
                    stream.write(data)
            return target / "got.raw"

        yield Service("aws", [f"endpoint={line.url}", "region=eu-central-1", "verify=full"], line, names, fetch, ec2)


@contextmanager
def azure(folder: Path) -> Iterator[Service]:
    with servers.azurite(folder) as url, proxy.line(url) as line:
        from azure.storage.blob import ContainerClient

        login = {"account_name": "devstoreaccount1", "account_key": AZURITE_KEY}
        container = ContainerClient(url, "recvirt", credential=login)
        container.create_container()

        def names() -> list[str]:
            return [blob.name.removesuffix(".vhd") for blob in container.list_blobs()]

        def fetch(name: str, target: Path) -> Path:
            (target / "got.vhd").write_bytes(container.download_blob(f"{name}.vhd").readall())
            return target / "got.vhd"

        yield Service("azure", [f"account_url={line.url}", "verify_full=true"], line, names, fetch, container)


@contextmanager
def google(folder: Path) -> Iterator[Service]:
    compute = fakes.Compute()
    with ExitStack() as stack:
        url = stack.enter_context(servers.cloud_storage(folder))
        line = stack.enter_context(proxy.line(url))
        api = stack.enter_context(fakes.serving(compute.respond))

        def fetch(name: str, target: Path) -> Path:
            content = requests.get(f"{url}/storage/v1/b/images/o/{name}.tar.gz?alt=media", timeout=30).content
            (target / "got.tar.gz").write_bytes(content)
            subprocess.run(["tar", "xSzf", "got.tar.gz"], cwd=target, check=True)
            return target / "disk.raw"

        settings = [f"storage_endpoint={line.url}", f"compute_endpoint={api}", "auth=none", "project=project-1"]
        settings += ["bucket=images", "keep_archive=true"]
        yield Service("gcp", settings, line, lambda: list(compute.images), fetch, compute)


@contextmanager
def webdav(folder: Path, server: Callable[[Path], Any] = servers.webdav) -> Iterator[Service]:
    with server(folder) as url, proxy.line(url) as line:
        files = folder / "files"

        def names() -> list[str]:
            return [path.parent.name for path in files.glob("tree/images/*/manifest.json")]

        def fetch(name: str, target: Path) -> Path:
            del target
            return files / f"tree/images/{name}/{name}.qcow2"

        yield Service("mirror", [f"url={line.url}/tree"], line, names, fetch)


@contextmanager
def s3(folder: Path) -> Iterator[Service]:
    with servers.moto(folder) as url, proxy.line(url) as line:
        import boto3

        client = boto3.client(
            "s3", region_name="eu-central-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="y"
        )
        client.create_bucket(Bucket="images", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})

        def names() -> list[str]:
            keys = [item["Key"] for item in client.list_objects_v2(Bucket="images").get("Contents", [])]
            return [key.split("/")[2] for key in keys if key.endswith("manifest.json")]

        def fetch(name: str, target: Path) -> Path:
            client.download_file("images", f"tree/images/{name}/{name}.qcow2", str(target / "got.qcow2"))
            return target / "got.qcow2"

        yield Service("mirror", ["s3=images/tree", f"endpoint={line.url}", "region=eu-central-1"], line, names, fetch)


#: Name -> the service, the stand-in it wants, and the format of what it gives back.
SERVICES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "oci-registry": (registry, "oci-registry", "qcow2"),
    "openstack": (glance, "openstack", "qcow2"),
    "openstack-import": (lambda folder: glance(folder, "import"), "openstack", "qcow2"),
    "aws": (amazon, "aws", "raw"),
    "azure": (azure, "azure", "vpc"),
    "gcp": (google, "gcp", "raw"),
    "webdav": (webdav, "webdav", "qcow2"),
    "webdav-apache": (lambda folder: webdav(folder, servers.apache), "apache", "qcow2"),
    "s3": (s3, "aws", "qcow2"),
}


def sha256(path: Path) -> str:
    """A file's digest."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment() -> dict[str, str]:
    """For a recvirt of its own process."""
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(servers.ROOT)}
