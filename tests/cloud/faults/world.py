"""What a cloud is, said without what differs from run to run, so that two of them can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

#: Where a worker remembers what was deleted; see ``recvirt.nestedcloud.worker.graves``.
_GRAVES = ".gone"


def names() -> dict[str, str]:
    """UUIDs of rows as words."""
    from recvirt.nestedcloud.central.models import Image, Instance, Network, Volume

    found: dict[str, str] = {}
    for model in (Image, Instance, Network, Volume):
        for number, row in enumerate(model.objects.order_by("created")):
            found[str(row.pk)] = f"{model.__name__.lower()}-{number}-{row.name}"  # type: ignore[attr-defined]
    return found


def _put_names(text: str, known: dict[str, str]) -> str:
    for key, name in known.items():
        text = text.replace(key, name)
    return text


def rows() -> dict[str, Any]:
    """The database's side. Deleted things are left out."""
    from recvirt.nestedcloud.central.models import Image, Instance, Reservation, Volume

    instances = {
        row.name: [
            str(row.state), row.power, row.vcpus, row.vcpus_max, row.memory_bytes, row.memory_max_bytes, row.disk_bytes,
            row.promised_vcpus, row.promised_memory_bytes, row.promised_disk_bytes, sorted(row.snapshots),
        ]
        for row in Instance.objects.exclude(state="deleted")
    }  # fmt: skip
    volumes = {
        row.name: [
            str(row.state), row.size_bytes, row.promised_bytes, row.instance.name if row.instance else None, row.slot,
            dict(row.snapshots),
        ]
        for row in Volume.objects.exclude(state="deleted")
    }  # fmt: skip
    images = {
        row.name: [str(row.state), row.virtual_bytes, row.promised_bytes]
        for row in Image.objects.exclude(state="deleted").exclude(project=None)
    }
    return {"instances": instances, "volumes": volumes, "images": images, "reservations": Reservation.objects.count()}


def domains(connection: Any, known: dict[str, str]) -> dict[str, Any]:
    """libvirt's side, of the domains that have our metadata."""
    found = {}
    for domain in connection.listAllDomains():
        description = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        own = description.find("metadata/{*}instance")
        if own is None:
            continue
        sources = sorted(
            _put_names(Path(element.get("file", "")).name, known)
            for element in description.iterfind("devices/disk/source")
        )
        _, _, memory, vcpus, _ = domain.info()
        snapshots = sorted(item.getName() for item in domain.listAllSnapshots())
        key = _put_names(domain.UUIDString(), known)
        found[key] = [domain.state()[0], memory, vcpus, own.get("generation"), sources, snapshots]
    return found


def files(folders: list[Path], known: dict[str, str]) -> dict[str, int]:
    """Files and their sizes. What only remembers, and hidden leftovers by their own name, so that they are seen."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and _GRAVES not in path.parts and path.name != "identity":
                # A snapshot's second half is derived from UUIDs.
                name = f"{path.name[:36]}-SNAPSHOT" if _is_snapshot(path) else path.name
                found[f"{folder.name}/{_put_names(name, known)}"] = path.stat().st_size
    return found


def forwards(rules: Path) -> list[Any]:
    """Rows, and what the rules that were loaded last lead where."""
    from recvirt.nestedcloud.central.models import Forward

    rows = sorted([str(row), row.nic.instance.name, row.state] for row in Forward.objects.all())
    loaded = rules.read_text().splitlines() if rules.exists() else []
    return [rows, sorted(line.strip() for line in loaded if "dnat to" in line)]


def _is_snapshot(path: Path) -> bool:
    return path.suffix == ".raw" and len(path.stem) == 73


def networks(connection: Any) -> int:
    """How many networks of ours there are."""
    return sum(network.name().startswith("recvirt-") for network in connection.listAllNetworks())


def loose_ends() -> list[str]:
    """Operations that have not ended, leases, endings told twice or never."""
    from recvirt.nestedcloud.central.models import ACTIVE_PHASES, Event, Operation

    found = []
    for operation in Operation.objects.all():
        told = list(
            Event.objects.filter(subject=operation.pk)
            .exclude(kind="operation.queued")
            .values_list("kind", flat=True)
        )  # fmt: skip
        what = f"{operation.kind} {operation.pk}: {operation.phase} ({operation.message})"
        if operation.phase in ACTIVE_PHASES:
            found.append(f"not ended: {what}")
        elif operation.lease_until is not None:
            found.append(f"a lease is left: {what}")
        elif told != [f"operation.{operation.phase}"]:
            found.append(f"told {told}: {what}")
    return found
