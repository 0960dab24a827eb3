"""Which of a worker's folders come from a file server (/etc/recvirt/nfs.conf), and the change from one to the other.

Owns the lines of that file that are about the central node; those that name another server are the owner's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from recvirt.nestedcloud.machine import Machine, ProvisionError, write
from recvirt.nestedcloud.pinned import LinkError
from recvirt.nestedcloud.statuses import ExitStatus

#: Where they are on a worker, and (uploads) where the central node has them.
FOLDERS = {
    "IMAGES": "/var/lib/recvirt/images", "BLOCKS": "/var/lib/recvirt/blocks", "SPOOL": "/var/lib/recvirt/spool",
}  # fmt: skip
_EXPORTS = {**FOLDERS, "SPOOL": "/var/lib/recvirt-cloud-spool"}
#: Disks of guests that run: better to wait for the server than to tell a guest that its disk is broken.
_OPTIONS = "vers=4.2,hard"
#: What another worker has just made is there, also for who has looked for it before (nfs(5)).
_BLOCKS_OPTIONS = f"{_OPTIONS},lookupcache=positive"
LOCAL, SHARED = "local", "shared"


def _sources(machine: Machine) -> dict[str, str]:
    path = machine.root / "etc/recvirt/nfs.conf"
    text = path.read_text(errors="replace") if path.exists() else ""
    found = {name: re.findall(rf"^\s*{name}_SOURCE=(.*)$", text, re.MULTILINE) for name in FOLDERS}
    return {name: values[-1].strip(" \t\r\"'") for name, values in found.items() if values}


def of_server(server: str, name: str) -> str:
    """How a folder of the central node is written in the file."""
    return f"[{server}]:{_EXPORTS[name]}"


def ours(machine: Machine, server: str) -> tuple[str, ...]:
    """The folders that come from this server."""
    found = _sources(machine)
    return tuple(name for name in FOLDERS if found.get(name) == of_server(server, name))


def mount_from(machine: Machine, server: str, which: Iterable[str], none: Iterable[str] = ()) -> None:
    """Have ``which`` come from a server and ``none`` from nowhere, and leave the file's other lines alone."""
    path = machine.root / "etc/recvirt/nfs.conf"
    lines = path.read_text().splitlines() if path.exists() else []
    for name, source in (*((name, of_server(server, name)) for name in which), *((name, "") for name in none)):
        options = _BLOCKS_OPTIONS if name == "BLOCKS" else _OPTIONS
        wanted = {f"{name}_SOURCE": source, f"{name}_OPTIONS": options if source else ""}
        lines = [line for line in lines if not re.match(rf"\s*({'|'.join(wanted)})=", line)]
        lines += [f"{key}={value}" for key, value in wanted.items()]
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        write(machine, path, text, reader=None, mode=0o644)
        machine.run(["systemctl", "restart", "recvirt-nfs.service"], "", None)


def mount(machine: Machine, server: str, disks: str) -> None:
    """Images and uploads come from the central node, and disks do if ``disks`` is SHARED (empty: as it is)."""
    which, none = ["IMAGES", "SPOOL"], []
    if disks == SHARED:
        which.append("BLOCKS")
    elif disks == LOCAL and "BLOCKS" in ours(machine, server):
        none.append("BLOCKS")
    mount_from(machine, server, which, none)


def check_change(machine: Machine, disks: str, server: str | None) -> None:
    """LinkError when disks that are used would be hidden below a mount, or left behind one. ``server`` is the central
    node's address, where that is known yet.
    """
    now = _sources(machine).get("BLOCKS", "")
    is_shared = server is not None and now == of_server(server, "BLOCKS")
    if disks == SHARED and now and not is_shared:
        raise LinkError(
            f"the disks come from {now} already (/etc/recvirt/nfs.conf)",
            "--disks local leaves that as it is; workers with one file server share their volumes as well",
            status=ExitStatus.CONFIG,
        )  # fmt: skip
    if not disks or (disks == SHARED) == is_shared or (disks == LOCAL and not is_shared):
        return
    folder = machine.root / FOLDERS["BLOCKS"].lstrip("/")
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".qcow2", ".raw"))
    if disks == SHARED:
        if not found:
            return
        raise LinkError(
            f"{len(found)} disks lie in {folder}, and would be hidden: {', '.join(found[:3])}",
            "delete their instances and volumes, or move the files away", status=ExitStatus.REFUSED,
        )  # fmt: skip
    try:
        known = machine.run(["virsh", "-q", "-c", "qemu:///system", "list", "--all", "--name"], "", None).split()
    except ProvisionError as error:
        raise LinkError(
            f"whether instances are here can't be told: {error}", "systemctl status libvirtd", status=ExitStatus.CONFIG
        ) from None
    if known:
        raise LinkError(
            f"{len(known)} instances have their disks here: {', '.join(known[:5])}",
            "delete them by the cloud before the disks come from elsewhere", status=ExitStatus.REFUSED,
        )  # fmt: skip
