"""The indexes of a mirror, all pure functions of its manifests: simplestreams (Incus), virt-builder, checksums.

An index is never edited, only written anew from what is there: so a killed run, a deleted image or a second publisher
leaves nothing behind in it.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from recvirt.publish.source import Source

STREAMS_INDEX, STREAMS_IMAGES, BUILDER_INDEX = "streams/v1/index.json", "streams/v1/images.json", "index"
METADATA = "incus.tar.xz"
Manifest = Mapping[str, Any]


def as_json(data: Any) -> bytes:
    """JSON whose bytes repeat."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def manifest_of(image: Source, sha512: str, metadata: bytes, metadata_sha256: str, combined: str) -> dict[str, Any]:
    """What a mirror says about one image; all indexes are made of these."""
    return {
        "schema": 1,
        "name": image.name,
        "profile": image.profile,
        "suite": image.suite,
        "kernel": image.kernel,
        "created": image.created,
        "format": image.format,
        "virtual_bytes": image.virtual_bytes,
        "acceptance": image.acceptance.as_json() if image.acceptance else {"unaccepted": True},
        "disk": {
            "path": f"images/{image.name}/{file_name(image)}", "bytes": image.file_bytes, "sha256": image.sha256,
            "sha512": sha512,
        },
        "metadata": {
            "path": f"images/{image.name}/{METADATA}", "bytes": len(metadata), "sha256": metadata_sha256,
            "combined_sha256": combined,
        },
    }  # fmt: skip


def file_name(image: Source) -> str:
    """The image's file in the mirror."""
    return f"{image.name}.{image.format}"


def incus_metadata(image: Source) -> bytes:
    """The small archive that Incus wants beside a VM's disk; its bytes repeat."""
    when = int(datetime.fromisoformat(image.created).timestamp())
    said = {
        "architecture": "x86_64",
        "creation_date": when,
        "properties": {
            "architecture": "x86_64", "os": "recvirt", "release": image.profile, "variant": "default",
            "description": f"recvirt {image.profile} {image.short}", "serial": image.short,
        },
        "templates": {},
    }  # fmt: skip
    # YAML is a superset of JSON.
    text = as_json(said)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("metadata.yaml")
        member.size, member.mtime, member.mode = len(text), when, 0o644
        archive.addfile(member, io.BytesIO(text))
    return lzma.compress(buffer.getvalue(), preset=6)


def simplestreams(manifests: Sequence[Manifest]) -> dict[str, bytes]:
    """The two files that Incus reads. Only qcow2 disks can be imported by it."""
    products: dict[str, Any] = {}
    for manifest in manifests:
        if manifest["format"] != "qcow2":
            continue
        profile, disk, metadata = manifest["profile"], manifest["disk"], manifest["metadata"]
        product = products.setdefault(
            f"recvirt:{profile}:amd64:default",
            {
                "aliases": f"recvirt/{profile}", "arch": "amd64", "os": "recvirt", "release": profile,
                "release_title": profile, "variant": "default", "requirements": {"secureboot": "false"}, "versions": {},
            },
        )  # fmt: skip
        product["versions"][version_of(manifest)] = {
            "items": {
                METADATA: {
                    "ftype": METADATA, "path": metadata["path"], "size": metadata["bytes"],
                    "sha256": metadata["sha256"], "combined_disk-kvm-img_sha256": metadata["combined_sha256"],
                },
                "disk.qcow2": {
                    "ftype": "disk-kvm.img", "path": disk["path"], "size": disk["bytes"], "sha256": disk["sha256"],
                },
            }
        }  # fmt: skip
    images = {"content_id": "images", "datatype": "image-downloads", "format": "products:1.0", "products": products}
    entry = {
        "datatype": "image-downloads", "format": "products:1.0", "path": STREAMS_IMAGES, "products": sorted(products),
    }  # fmt: skip
    index = {"format": "index:1.0", "index": {"images": entry}}
    return {STREAMS_IMAGES: as_json(images), STREAMS_INDEX: as_json(index)}


def version_of(manifest: Manifest) -> str:
    """A version that sorts by time and is one image's alone."""
    return f"{datetime.fromisoformat(manifest['created']):%Y%m%d_%H%M}_{manifest['disk']['sha256'][:8]}"


def virt_builder(manifests: Sequence[Manifest]) -> bytes:
    """What virt-builder(1) reads: each image under its own name, the newest of a profile under the profile's."""
    newest: dict[str, Manifest] = {}
    for manifest in sorted(manifests, key=version_of):
        newest[f"recvirt-{manifest['profile']}"] = manifest
    named = [*((m["name"], m) for m in sorted(manifests, key=lambda m: str(m["name"]))), *sorted(newest.items())]
    return "\n".join(_section(name, manifest) for name, manifest in named).encode()


def _section(name: str, manifest: Manifest) -> str:
    disk = manifest["disk"]
    # The root is the third partition of every image of ours, and may grow.
    return (
        f"[{name}]\n"
        f"name=recvirt {manifest['profile']} {disk['sha256'][:12]}\n"
        f"arch=x86_64\n"
        f"file={disk['path']}\n"
        f"revision={datetime.fromisoformat(manifest['created']):%Y%m%d%H%M}\n"
        f"checksum[sha512]={disk['sha512']}\n"
        f"format={manifest['format']}\n"
        f"size={manifest['virtual_bytes']}\n"
        f"compressed_size={disk['bytes']}\n"
        f"expand=/dev/sda3\n"
        f"notes=Debian {manifest['suite']} that is a hypervisor itself, kernel {manifest['kernel']}\n"
    )
