"""A second machine, of another image, as a worker of the first one's cloud: it joins, runs an instance, is lost and
comes back, shares its disks, and is shut out.
"""

from __future__ import annotations

import secrets
import shlex
from typing import Any

from recvirt.accept.boots import CENTRAL_ADDRESS
from recvirt.accept.checks.nestedcloud import cloud, cloud_is_set_up, operation, roles_of, wait_for
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed

NAME, INSTANCE = "shelf-2", "far"
VOLUME = "moved"
#: The key to both instances of a volume's way, on the machine that runs each.
_KEY = "/run/recvirt-instance-key"
_MINUTES = 300


def worker_row(guest: Guest) -> dict[str, Any]:
    """What the cloud says of the worker that joined; nothing when it does not know it."""
    rows: list[dict[str, Any]] = cloud(guest, "worker", "list")
    return next((row for row in rows if row["name"] == NAME), {})


def _runs_instances(guest: Guest) -> bool:
    """Whether the central node is a worker, too."""
    return "worker" in roles_of(guest)


def wait_for_status(guest: Guest, wanted: str) -> None:
    """Until the cloud says so of the worker."""
    wait_for(guest, f"{NAME} is {wanted}", lambda: worker_row(guest).get("status") == wanted, _MINUTES)


@check("worker-joins", "workers")
def worker_joins(guest: Guest) -> str:
    """With one command a machine of another image becomes a worker, through a tunnel"""
    worker: Guest = guest.facts["worker"]
    cloud_is_set_up(guest)
    token = cloud(guest, "worker", "invite", "--name", NAME)["token"]
    words = ["recvirt-cloud", "worker", "join", f"https://{CENTRAL_ADDRESS}", "--token", token]
    # The invitation names the certificate that the cloud has to show.
    other = [*words[:-1], token[:-1] + ("1" if token[-1] == "0" else "0")]
    if worker.run(shlex.join(other), seconds=_MINUTES).status == 0:
        raise Failed("it joined a cloud that shows another certificate than its invitation names")
    said = worker.run(shlex.join(words), seconds=_MINUTES)
    if said.status != 0:
        raise Failed(f"joining ended with status {said.status}: {(said.stderr or said.stdout).strip()[-600:]}")
    wait_for_status(guest, "up")
    # The images come through the tunnel; root is nobody there, and may only look whether they are.
    worker.out("stat /var/lib/recvirt/images/.")
    source = worker.out("findmnt -n -t nfs4 -o SOURCE /var/lib/recvirt/images")
    if not source.startswith("[fd"):
        raise Failed(f"images are mounted from {source!r}")
    if failed := worker.failed_units() + guest.failed_units():
        raise Failed(f"failed: {', '.join(failed)}")
    return f"images from {source}"


@check("worker-runs-an-instance", "workers")
def worker_runs_an_instance(guest: Guest) -> str:
    """An instance that the cloud places on the other machine runs there, under KVM"""
    worker: Guest = guest.facts["worker"]
    wait_for_status(guest, "up")
    for row in cloud(guest, "worker", "list"):
        if row["name"] != NAME:
            cloud(guest, "worker", "drain", row["name"])
    operation(guest, "launch", INSTANCE, "--memory", "256M")
    shown = cloud(guest, "show", INSTANCE)
    if shown["worker"] != NAME:
        raise Failed(f"it runs on {shown['worker']}")
    domain = f"{INSTANCE}-{shown['uuid'][:8]}"
    if "<domain type='kvm'" not in worker.out(f"virsh -c qemu:///system dumpxml {domain}"):
        raise Failed("libvirt does not run it under KVM")
    if _runs_instances(guest) and domain in guest.out("virsh -c qemu:///system list --all --name").split():
        raise Failed("the central machine has it, too")
    address = shown["address"]
    wait_for(guest, f"an answer of {address}", lambda: worker.run(f"ping -c 1 -W 5 {address}").status == 0, _MINUTES)
    return f"{domain} on {NAME}, {address} answers there"


@check("lost-worker-is-told", "workers")
def lost_worker_is_told(guest: Guest) -> str:
    """Of a worker that is gone the cloud says so, and when it is back its instance is, too"""
    worker: Guest = guest.facts["worker"]
    assert worker.vm is not None
    worker.vm.qmp.execute("stop")
    try:
        wait_for_status(guest, "away")
        shown = cloud(guest, "show", INSTANCE)
        if not shown["away"]:
            raise Failed("the cloud does not say that nothing can be done to its instance")
    finally:
        worker.vm.qmp.execute("cont")
    worker.reset()
    wait_for_status(guest, "up")

    def running() -> bool:
        row = cloud(guest, "show", INSTANCE)
        return row["power"] == "running" and not row["away"]

    wait_for(guest, f"{INSTANCE} runs again", running, _MINUTES)
    domain = f"{INSTANCE}-{shown['uuid'][:8]}"
    if worker.out("virsh -c qemu:///system list --name").split() != [domain]:
        raise Failed("libvirt runs something else on it")
    return f"away, then up; {domain} runs again"


def _place_on(guest: Guest, name: str, instance: str) -> str:
    """Launch an instance on the worker of that name; its address there."""
    for row in cloud(guest, "worker", "list"):
        cloud(guest, "worker", "undrain" if row["name"] == name else "drain", row["name"])
    public = f"{_KEY}.pub"
    operation(guest, "launch", instance, "--memory", "256M", "--ssh-key", public)
    shown: dict[str, Any] = cloud(guest, "show", instance)
    if shown["worker"] != name:
        raise Failed(f"{instance} runs on {shown['worker']}")
    return str(shown["address"])


def _in(machine: Guest, address: str, command: str) -> str:
    """The stdout of a command in an instance of this machine, once its SSH server answers."""
    ssh = (
        f"ssh -i {_KEY} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        f" -o ConnectTimeout=20 root@{address} {shlex.quote(command)}"
    )
    said: list[str] = []

    def done() -> bool:
        found = machine.run(f"{ssh} || exit 1")
        said[:] = [found.stdout.strip(), found.stderr.strip()]
        return found.status == 0 and said[0] != ""

    wait_for(machine, f"{command!r} in the instance at {address}", done, _MINUTES)
    return said[0]


def _share_key(guest: Guest, worker: Guest) -> None:
    guest.out(f"test -e {_KEY} || ssh-keygen -q -t ed25519 -N '' -f {_KEY}; chmod 644 {_KEY}.pub")
    text = guest.out(f"cat {_KEY}")
    worker.out(f"umask 077; printf '%s\\n' {shlex.quote(text)} > {_KEY}")


@check("worker-shares-volumes", "workers")
def worker_shares_volumes(guest: Guest) -> str:
    """What was written to a volume on the central machine is read from it on a worker that shares the disks"""
    worker: Guest = guest.facts["worker"]
    if INSTANCE in [row["name"] for row in cloud(guest, "list")]:
        operation(guest, "delete", INSTANCE)
    token = cloud(guest, "worker", "invite")["token"]
    words = ["recvirt-cloud", "worker", "join", f"https://{CENTRAL_ADDRESS}", "--token", token, "--disks", "shared"]
    said = worker.run(shlex.join(words), seconds=_MINUTES)
    if said.status != 0:
        raise Failed(f"joining again ended with status {said.status}: {(said.stderr or said.stdout).strip()[-600:]}")
    worker.run("stat /var/lib/recvirt/blocks/.", seconds=_MINUTES)
    source = worker.out("findmnt -n -t nfs4 -o SOURCE /var/lib/recvirt/blocks || :")
    if not source.startswith("[fd"):
        raise Failed(f"disks are mounted from {source!r}")

    def share() -> bool:
        rows = cloud(guest, "worker", "list")
        return all(row["status"] != "away" and row["pool"] == rows[0]["pool"] != "" for row in rows)

    wait_for(guest, "one pool for both workers", share, _MINUTES)
    _share_key(guest, worker)
    # Where the central node runs nothing, the one worker has both instances, and the file lies on the central node.
    own = next((row["name"] for row in cloud(guest, "worker", "list") if row["name"] != NAME), NAME)
    machine = guest if _runs_instances(guest) else worker
    near = _place_on(guest, own, "near")
    operation(guest, "volume", "allocate", VOLUME, "--size", "64M", "--on", own)
    volume = cloud(guest, "volume", "show", VOLUME)["uuid"]
    if volume not in guest.out("ls /var/lib/recvirt/blocks"):
        raise Failed(f"the central node has no file of the volume {volume}")
    serial = volume.replace("-", "")[:20]
    device = f'cd /sys/class/block; for d in vd?; do [ "$(cat $d/serial)" = {serial} ] && echo /dev/$d; done; true'
    mount = f"mkdir -p /mnt; mount -t ext4 $({device}) /mnt"
    word = secrets.token_hex(16)
    operation(guest, "volume", "attach", VOLUME, "near")
    _in(machine, near, device)
    _in(machine, near, f"{mount}; echo {word} > /mnt/word; umount /mnt; echo done")
    operation(guest, "volume", "detach", VOLUME)
    far = _place_on(guest, NAME, "far-shared")
    operation(guest, "volume", "attach", VOLUME, "far-shared")
    _in(worker, far, device)
    found = _in(worker, far, f"{mount}; cat /mnt/word; umount /mnt")
    if found != word:
        raise Failed(f"the file on the volume holds {found!r}")
    return f"disks from {source}; the same file on {own} and {NAME}"


@check("revoked-worker-is-shut-out", "workers")
def revoked_worker_is_shut_out(guest: Guest) -> str:
    """A worker that was revoked reaches nothing of the cloud any more"""
    worker: Guest = guest.facts["worker"]
    central = worker.json("recvirt-cloud tunnel status --json")["peers"][0]["address"]
    if worker.run(f"ping -c 1 -W 20 {central}").status != 0:
        raise Failed(f"{central} did not answer before")
    cloud(guest, "worker", "revoke", NAME)
    wait_for_status(guest, "revoked")
    wait_for(guest, "silence in the tunnel", lambda: worker.run(f"ping -c 1 -W 5 {central}").status != 0, _MINUTES)
    said = worker.run("recvirt-cloud worker refresh", seconds=_MINUTES)
    if said.status == 0:
        raise Failed("it could ask for the tunnel's parameters")
    return "no answer in the tunnel; the API refuses it"
