"""The root disk's growth and the two NFS mounts."""

from __future__ import annotations

import secrets

from recvirt.accept.boots import GROWTH_BYTES
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped
from recvirt.errors import GuestError

MOUNT_POINTS = ("/var/lib/recvirt/images", "/var/lib/recvirt/blocks")
#: File systems keep some per cent for themselves.
_USABLE = 0.90
#: Serial number and size of the disk that comes while the VM runs.
_VOLUME = "recvirt-volume"
_VOLUME_BYTES = 64 * 1024**2


def _root_bytes(guest: Guest) -> int:
    # Multiplied here: older awks print such numbers as 5.1e+09.
    blocks, block_bytes = guest.out("stat -f -c '%b %S' /").split()
    return int(blocks) * int(block_bytes)


@check("root-grown", "first")
def root_grown(guest: Guest) -> str:
    """On a larger disk the root file system grows by itself"""
    acceptance = guest.acceptance
    size = _root_bytes(guest)
    # The whole disk but the first partitions; and certainly more than the image could hold.
    disk = acceptance.image_facts.virtual_bytes + GROWTH_BYTES
    expected = disk * _USABLE - 256 * 1024**2
    if size < expected:
        raise Failed(f"the root has {size / 1024**3:.2f} GiB on a disk of {disk / 1024**3:.2f} GiB")
    return f"{size / 1024**3:.2f} GiB"


@check("partitions-change-after-remount", "first")
def partitions_change_after_remount(guest: Guest) -> str:
    """The partition table is not touched before the root is writable: whoever looks for it meanwhile finds nothing"""
    remounted = _moment(guest, "systemd-remount-fs.service", "ExecMainExitTimestampMonotonic")
    changed = _moment(guest, "systemd-repart.service", "ExecMainStartTimestampMonotonic")
    if not 0 < remounted <= changed:
        raise Failed(f"the root was remounted after {remounted} us, systemd-repart began after {changed} us")
    return f"{(changed - remounted) / 1000:.0f} ms later"


def _moment(guest: Guest, unit: str, name: str) -> int:
    return int(guest.out(f"systemctl show {unit} -p {name} --value") or 0)


@check("partition-table-whole", "powercut")
def partition_table_whole(guest: Guest) -> str:
    """After power cuts both copies of the partition table are whole"""
    disk = guest.out("lsblk -n -o PKNAME $(findfs PARTLABEL=root)")
    said = guest.out(f"LC_ALL=C sfdisk --verify /dev/{disk} 2>&1")
    if "corrupt" in said or "No errors detected" not in said:
        raise Failed(f"sfdisk --verify: {said}")
    return "both copies agree"


@check("root-grown-after-power-cuts", "powercut")
def root_grown_after_power_cuts(guest: Guest) -> str:
    """After power cuts the root file system has still grown"""
    return root_grown(guest)


@check("nfs-mounts", "first")
def nfs_mounts(guest: Guest) -> str:
    """Both NFS mounts named in user data are mounted from the test host, for reading and writing"""
    acceptance = guest.acceptance
    if acceptance.profile.root.nfs is None:
        raise Skipped("the profile has no NFS mounts")
    for point in MOUNT_POINTS:
        word = secrets.token_hex(16)
        guest.out(f"ls {point}", seconds=60)
        found = guest.out(f"findmnt -n -t nfs4 -o SOURCE,OPTIONS {point} || :").split()
        if not found:
            raise Failed(
                f"{point} is not mounted: {guest.out('systemctl status --no-pager -n 10 ' + _unit(point) + ' || :')}"
            )
        guest.out(f"echo {word} > {point}/recvirt-test && sync {point}/recvirt-test", seconds=60)
        # Unmounted and mounted anew: what comes back then was kept by the server.
        guest.out(f"umount {point}", seconds=60)
        said = guest.out(f"cat {point}/recvirt-test", seconds=60)
        if said != word:
            raise Failed(f"{point}/recvirt-test holds {said!r} after a new mount, not {word!r}")
        if "nosuid" not in found[1]:
            raise Failed(f"{point} is mounted without nosuid: {found[1]}")
    return f"{' and '.join(MOUNT_POINTS)}: written, mounted anew, read"


def _unit(point: str) -> str:
    return point.strip("/").replace("/", "-") + ".mount"


@check("nfs-server-away", "second")
def nfs_server_away(guest: Guest) -> str:
    """With servers that refuse or stay silent the boot goes on, and an access gives up in bounded time"""
    acceptance = guest.acceptance
    if acceptance.profile.root.nfs is None:
        raise Skipped("the profile has no NFS mounts")
    times = guest.out("systemctl show multi-user.target -p ActiveEnterTimestampMonotonic --value")
    if int(times or 0) <= 0:
        raise Failed("multi-user.target was not reached")
    waiting = guest.out("systemctl list-jobs --no-legend --plain || :")
    if ".mount" in waiting:
        raise Failed(f"the boot still waits: {waiting}")
    said = []
    for point in MOUNT_POINTS:
        done = guest.run(
            f"timeout -s KILL {acceptance.patience(45):.0f} ls {point}/. >/dev/null 2>&1; echo $?", seconds=120
        )
        status = done.stdout.strip()
        if status == "0" and guest.run(f"findmnt -n -t nfs4 {point}").status == 0:
            raise Failed(f"{point} is mounted, though its server is away")
        if status in ("137", "124"):
            raise Failed(f"an access to {point} hangs while its server is away")
        said.append(f"{point}: {'an empty folder' if status == '0' else 'an error'}")
    return f"up after {int(times) / 1e6:.0f} s; " + ", ".join(said)


@check("volume-attach", "second")
def volume_attach(guest: Guest) -> str:
    """A disk that is attached to the running VM appears, keeps what is written, goes, and comes back with it"""
    vm = guest.vm
    if vm is None or guest.overlay is None:
        raise GuestError("a guest inside a guest has no ports of its own here")
    path = guest.overlay.with_name("volume.raw")
    with path.open("wb") as stream:
        stream.truncate(_VOLUME_BYTES)
    limit = guest.acceptance.patience(60)
    link, word = f"/dev/disk/by-id/virtio-{_VOLUME}", secrets.token_hex(16)
    vm.plug_disk(path, _VOLUME)
    guest.out(f"until [ -b {link} ]; do sleep 0.2; done; udevadm settle")
    guest.out(f"mkfs.ext4 -q {link} && mount {link} /mnt && echo {word} > /mnt/word && umount /mnt")
    vm.unplug_disk(_VOLUME, limit)
    guest.out(f"while [ -e {link} ]; do sleep 0.2; done")
    vm.plug_disk(path, _VOLUME)
    guest.out(f"until [ -b {link} ]; do sleep 0.2; done; udevadm settle")
    found = guest.out(f"mount -o ro {link} /mnt && cat /mnt/word && umount /mnt")
    vm.unplug_disk(_VOLUME, limit)
    path.unlink()
    if found != word:
        raise Failed(f"{word} was written, {found!r} read")
    return f"{_VOLUME_BYTES // 1024**2} MiB, attached and detached twice"
