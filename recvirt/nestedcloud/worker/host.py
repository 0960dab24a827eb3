"""What a worker knows of its own machine: where its files lie, and what its hypervisor can do.

The paths are the image's two mounts: application disk images (what instances start from) and block images (what
instances write to).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from recvirt.nestedcloud import bundled
from recvirt.nestedcloud.model import check_uuid
from recvirt.nestedcloud.portmap import APPLIED_PATH

DomainType = Literal["kvm", "qemu", "test"]


@dataclass(frozen=True)
class Host:
    """One hypervisor.

    ``domain_type`` is libvirt's: kvm where a VM was seen to run under it, qemu for emulation, test for libvirt's own
    stand-in driver. ``cgroup`` is 1 or 2. ``owner`` is the cloud's identifier, written into every domain. ``spool_dir``
    is where the API of the same host puts uploads, if it is on the same host. ``fetch_allow`` are networks that images
    may be fetched from although they are not of the public internet. ``bundled_dir`` has the images of packages.
    ``forwards_dir`` is where wanted forwards are written, if ports are forwarded here at all.
    ``keeps_files``: libvirt leaves the files' owner
    as it is, because a worker that is not root could not use what libvirt has given to QEMU's user: images that other
    instances start from, volumes that grow as their guests run.
    """

    owner: str
    domain_type: DomainType
    images_dir: Path
    blocks_dir: Path
    cgroup: int = 2
    log_dir: Path = Path("/var/log/libvirt/qemu")
    spool_dir: Path | None = None
    fetch_allow: tuple[IPv4Network | IPv6Network, ...] = ()
    keeps_files: bool = False
    bundled_dir: Path = bundled.FOLDER
    forwards_dir: Path | None = None
    forwards_applied: Path = APPLIED_PATH

    def image_path(self, image: str) -> Path:
        """The file of an image."""
        return self.images_dir / f"{check_uuid(image)}.qcow2"

    def disk_path(self, disk: str, disk_format: str) -> Path:
        """The file of a root disk or of a volume."""
        return self.blocks_dir / f"{check_uuid(disk)}.{disk_format}"

    def image_facts_path(self, image: str) -> Path:
        """What was found out when the image was made."""
        return self.images_dir / f"{check_uuid(image)}.json"

    def volume_facts_path(self, volume: str) -> Path:
        """The generation that a volume was given, and by which operation."""
        return self.blocks_dir / f"{check_uuid(volume)}.json"

    def volume_snapshot_path(self, volume: str, name: str) -> Path:
        """The copy that is a snapshot of a raw volume; the name becomes a UUID, and never part of a path."""
        key = uuid.uuid5(uuid.UUID(check_uuid(volume)), name)
        return self.blocks_dir / f"{check_uuid(volume)}-{key}.raw"

    @property
    def graves_dir(self) -> Path:
        """What is remembered of things that were deleted."""
        return self.blocks_dir / ".gone"

    def seed_path(self, instance: str) -> Path:
        """The instance's NoCloud data."""
        return self.blocks_dir / f"{check_uuid(instance)}-seed.img"

    def console_log_path(self, instance: str) -> Path:
        """What the instance's serial console has said."""
        return self.log_dir / f"{check_uuid(instance)}-console.log"
