"""What the central node offers to workers on other machines, in the tunnel alone: the broker, disks and uploads.

Owns: where the broker and the file server listen, what is exported and to whom. Does not own: the tunnel
(``tunnel.py``).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from recvirt.nestedcloud.machine import Machine, ProvisionError, write

TUNNEL_SERVICE = "recvirt-cloud-tunnel.service"
#: As sysusers.d has them. NFS knows owners by number; who has others (an older installation) can't share its disks.
WORKER_UID, DISKS_GID, SPOOL_GID = 641, 642, 643
#: root of a worker has no business with files here, and is nobody: worker and QEMU use them as themselves. ``sync``:
#: what a guest has flushed is on this machine's disk.
_OPTIONS = "rw,sync,root_squash,no_subtree_check,sec=sys"
_MOUNT = re.compile(r"^\s*(IMAGES|BLOCKS)_SOURCE=(.*)$", re.MULTILINE)


def folders(machine: Machine) -> tuple[Path, ...]:
    """Images of applications' disks, and block images."""
    return tuple(machine.root / "var/lib/recvirt" / name for name in ("images", "blocks"))


def sources(machine: Machine) -> Mapping[str, str]:
    """Which of the two come from a file server, and from where (/etc/recvirt/nfs.conf)."""
    try:
        text = (machine.root / "etc/recvirt/nfs.conf").read_text(errors="replace")
    except FileNotFoundError:
        return {}
    found = {name.lower(): value.strip(" \t\r\"'") for name, value in _MOUNT.findall(text)}
    return {name: value for name, value in found.items() if value}


def _broker_conf(machine: Machine) -> Path:
    return machine.root / "etc/rabbitmq/conf.d/60-recvirt-cloud-tunnel.conf"


def broker_host(machine: Machine) -> str | None:
    """The host in the URL of a broker that listens in the tunnel; None when it is not told to."""
    try:
        found = re.search(r"^listeners\.tcp\.tunnel = (\S+):5672$", _broker_conf(machine).read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return f"[{found[1]}]" if found else None


def start_tunnel(machine: Machine, cloud: uuid.UUID) -> None:
    """The central node's end of the tunnel, with its address: what listens on one that is not there does not start.
    ProvisionError when there is none.
    """
    from recvirt.nestedcloud import tunnel

    tunnel.ensure_central(machine, cloud)
    machine.run(["systemctl", "start", TUNNEL_SERVICE], "", None)
    said = machine.run(["ip", "-6", "-oneline", "address", "show", "dev", tunnel.INTERFACE], "", None)
    if f" {tunnel.central_address(cloud)}/" not in said:
        raise ProvisionError(f"{tunnel.INTERFACE} lacks its address: systemctl restart {TUNNEL_SERVICE}")


def ensure(machine: Machine, cloud: uuid.UUID) -> None:
    """The tunnel, and who listens in it. Without one everything else of the cloud goes on."""
    from recvirt.nestedcloud import tunnel

    try:
        start_tunnel(machine, cloud)
        up = True
    except ProvisionError as error:
        machine.tell(f"no tunnel, so no workers on other machines; the cloud of this one goes on: {error}")
        up = False
    listener = f"# Written by recvirt-cloud setup.\nlisteners.tcp.tunnel = {tunnel.central_address(cloud)}:5672\n"
    _keep(machine, _broker_conf(machine), listener if up else "")
    _ensure_files(machine, cloud, exported(machine) if up else ())


def exported(machine: Machine) -> tuple[Path, ...]:
    """The folders that workers on other machines mount from this one."""
    mounted = sources(machine)
    found = tuple(path for path in folders(machine) if path.name not in mounted)
    numbers = machine.owner_of("recvirt-worker")[0], machine.group_of("recvirt-disks")
    if found and numbers != (WORKER_UID, DISKS_GID):
        machine.tell(
            f"disks are not shared with other machines: recvirt-worker and recvirt-disks are {numbers[0]} and"
            f" {numbers[1]} here, and {WORKER_UID} and {DISKS_GID} there (operating.md, 'Numbers of users')"
        )
        return ()
    # Uploads are of this machine, wherever disks are. Without their number a worker here still reads them.
    spool = (machine.spool,) if machine.group_of("recvirt-spool") == SPOOL_GID else ()
    return (*found, *spool)


def _ensure_files(machine: Machine, cloud: uuid.UUID, paths: tuple[Path, ...]) -> None:
    """The exports and the address of the file server, which is there for them alone."""
    from recvirt.nestedcloud import tunnel

    to = f"{tunnel.prefix(cloud)}({_OPTIONS})"
    lines = [f"/{path.relative_to(machine.root)} {to}\n" for path in paths]
    conf = f"# Written by recvirt-cloud setup.\n[nfsd]\nhost={tunnel.central_address(cloud)}\n" if lines else ""
    changed = [
        _keep(machine, machine.root / "etc/nfs.conf.d/60-recvirt-cloud-tunnel.conf", conf),
        _keep(machine, machine.root / "etc/exports.d/recvirt-cloud.exports", "".join(lines)),
    ]
    if any(changed):
        # It waits for this very step, so nobody waits for it here.
        words = ["systemctl", "--no-block", "restart" if lines else "stop", "nfs-server.service"]
        machine.run(words, "", None)


def _keep(machine: Machine, path: Path, text: str) -> bool:
    """A file with this text, or none; whether it was another."""
    before = path.read_text() if path.exists() else ""
    if before == text:
        return False
    if text:
        write(machine, path, text, reader=None, mode=0o644)
    else:
        path.unlink()
    return True
