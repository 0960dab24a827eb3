"""The findings about one image, as data and as text."""

from __future__ import annotations

from typing import Any

from recvirt.disk.layout import derived_uuid
from recvirt.disk.spdx import Subject, document
from recvirt.imagefile.contents import Contents, dpkg_lists, package_sizes
from recvirt.imagefile.files import detect_filesystem, printable
from recvirt.store import sha256_of
from recvirt.ui import format_bytes

_SHOWN_PACKAGES = 15


def findings(contents: Contents) -> dict[str, Any]:
    """Everything that ``recvirt inspect --json`` prints."""
    packages = contents.packages()
    sizes = package_sizes(packages, contents.tree(), dpkg_lists(contents))
    kernels = contents.kernels()
    files = [entry for entry in contents.tree().values() if not entry.is_dir]
    return {
        "path": str(contents.container.path),
        "format": contents.container.format,
        "bytes": contents.container.path.stat().st_size,
        "virtual_bytes": contents.container.virtual_bytes or contents.disk.stat().st_size,
        "os": contents.os_release().get("PRETTY_NAME", ""),
        "disk_uuid": str(contents.table.disk_uuid),
        "partitions": [
            {
                "number": part.number,
                "name": part.name,
                "type": str(part.type_uuid),
                "uuid": str(part.part_uuid),
                "offset_bytes": part.offset_bytes,
                "size_bytes": part.size_bytes,
                "filesystem": detect_filesystem(contents.disk, part),
            }
            for part in contents.table.partitions
        ],
        "boot": {name: {"present": not why, "problem": why} for name, why in contents.boot_methods().items()},
        "kernels": kernels,
        "default_kernel": contents.remembered_kernel(),
        "provenance": contents.provenance(),
        "files": len(files),
        "files_bytes": sum(entry.size_bytes for entry in files),
        "unowned_bytes": sizes[""],
        "packages": [{**package.as_json(), "bytes": sizes[package.name]} for package in packages],
    }


def as_text(found: dict[str, Any], *, all_packages: bool = False) -> str:
    """The findings for a person."""
    told = found["provenance"]
    kernel = told.get("kernel", {})
    lines = [
        f"{found['path']}: {found['format']}, {format_bytes(found['bytes'])}, "
        f"disk of {format_bytes(found['virtual_bytes'])}",
        f"system      {found['os']}",
        f"kernels     {', '.join(found['kernels']) or 'none'} (default {found['default_kernel'] or 'the newest'})",
    ]
    for name, state in found["boot"].items():
        lines.append(f"{name:<11} {'boots: code, loader and menu are there' if state['present'] else state['problem']}")
    if told:
        lines.append(f"profile     {told.get('profile')} (recvirt {told.get('recvirt')})")
        lines += [f"made from   {stage} {key}" for stage, key in sorted(told.get("stages", {}).items())]
        lines.append(f"cmdline     {kernel.get('cmdline', '')}")
    else:
        lines.append("profile     the image says nothing about its making")
    lines.append("partitions")
    lines += [
        f"  {part['number']} {part['name']:<6} {format_bytes(part['size_bytes']):>9}  {part['filesystem'] or '-':<6}"
        f" {part['uuid']}"
        for part in found["partitions"]
    ]
    packages = sorted(found["packages"], key=lambda item: -int(item["bytes"]))
    shown = packages if all_packages else packages[:_SHOWN_PACKAGES]
    lines.append(
        f"packages    {len(packages)}; {found['files']} files, {format_bytes(found['files_bytes'])}"
        f" ({format_bytes(found['unowned_bytes'])} of no package)"
    )
    lines += [f"  {format_bytes(item['bytes']):>9}  {item['name']} {item['version']}" for item in shown]
    if len(shown) < len(packages):
        lines.append(f"  ... and {len(packages) - len(shown)} smaller ones (--all shows them)")
    return printable("\n".join(lines))


def bill_of_materials(contents: Contents) -> dict[str, Any]:
    """An SPDX document of what the image holds now: also of one that was changed after it was built."""
    told = contents.provenance()
    digest = sha256_of(contents.container.path)
    epoch = told.get("epoch", 0)
    own_kernel = "kernel_build" in told.get("stages", {})
    subject = Subject(
        name=str(told.get("profile") or contents.container.path.name),
        suite=contents.os_release().get("VERSION_CODENAME", ""),
        kernel_package=str(told.get("kernel", {}).get("package", "")) if own_kernel else "",
        epoch=epoch if isinstance(epoch, int) else 0,
        identifier=derived_uuid(digest, "sbom"),
        sha256=digest,
    )
    return document(contents.packages(), subject)
