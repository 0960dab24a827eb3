"""The Nested Cloud in the image: its own command line launches VMs under KVM, changes them, and finds them again.

Everything is asked of the cloud as a person would, over TLS; what came of it is looked at from elsewhere: in libvirt,
in KVM's own counters, and inside the instance, over SSH and HTTP.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import shlex
import time
from collections.abc import Callable, Collection
from typing import Any

import requests

from recvirt.accept.boots import FORWARDED_PORT
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed, Skipped
from recvirt.accept.tinyvm import EXITS_MIN, sum_exits

#: Our packages, by what they make of a machine. An image that has one of them carries a part of the Nested Cloud.
ROLES = {"recvirt-cloud-central": "central node", "recvirt-cloud-worker": "worker"}
#: How the instance that most checks share is called.
INSTANCE = "web"
VOLUME = "data"
#: What may be reached from outside: SSH, the machines' tunnel, and, of a central node, the API.
OPEN_PORTS = {("tcp", 22), ("udp", 68), ("udp", 51820)}
CENTRAL_PORTS = {("tcp", 443)}
#: Files that the test user may not read.
SECRETS = ("central.toml", "secret-key", "tls/key.pem", "tunnel/key")
WORKER_SECRETS = ("worker.toml",)
#: Interfaces of instances and of the tunnel between machines begin like these.
_INNER = ("virbr", "rv", "recvirt")
_OPERATION_SECONDS = 120
_KEY = "~/.ssh/recvirt-instance"
_SCHEDULE_SECONDS = 60
_PAGE_SECONDS = 30
_UNREACHED = 99


def roles_of(guest: Guest) -> set[str]:
    """What the image is of a cloud."""
    return {role for package, role in ROLES.items() if package in guest.acceptance.promises.packages}


def cloud_check(name: str, *wanted: str) -> Callable[[Callable[[Guest], str]], Callable[[Guest], str]]:
    """A check for images that are all of ``wanted``; without any, for every part of a cloud."""

    def register(function: Callable[[Guest], str]) -> Callable[[Guest], str]:
        @functools.wraps(function)
        def looked_at(guest: Guest) -> str:
            if missing := sorted(set(wanted) - roles_of(guest)):
                raise Skipped(f"the image is no {' and no '.join(missing)}")
            return function(guest)

        return check(name, "cloud")(looked_at)

    return register


def cloud(guest: Guest, *words: str) -> Any:
    """What ``recvirt-cloud WORDS --json`` prints, as the test user."""
    limit = guest.acceptance.patience(_OPERATION_SECONDS)
    command = shlex.join(["recvirt-cloud", *words, "--json"])
    return guest.json(command, root=False, seconds=limit)


def operation(guest: Guest, *words: str) -> dict[str, Any]:
    """An operation that has to succeed; the row that tells of it."""
    found: dict[str, Any] = cloud(guest, *words, "--timeout", str(guest.acceptance.patience(_OPERATION_SECONDS)))
    if found["phase"] != "succeeded":
        raise Failed(f"{' '.join(words)}: {found['phase']}: {found['message']}")
    return found


def wait_for(guest: Guest, what: str, look: Any, seconds: float = _OPERATION_SECONDS) -> Any:
    """The first answer of ``look`` that holds; Failed when there is none in time."""
    end = time.monotonic() + guest.acceptance.patience(seconds)
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {guest.acceptance.patience(seconds):.0f} s")
        time.sleep(2)


def listeners(text: str, inner: Collection[str]) -> dict[tuple[str, int], str]:
    """Protocol and port of what ``ss -Hltnup`` shows, to whose they are; without the loopback, the networks for
    instances, and the machine's own addresses there (``inner``).
    """
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5:
            continue
        address, _, port = words[4].rpartition(":")
        host, _, device = address.strip("[]").partition("%")
        if host.startswith("127.") or host in ("::1", *inner) or device == "lo" or device.startswith(_INNER):
            continue
        found[words[0], int(port)] = " ".join(words[6:])
    return found


@cloud_check("cloud-is-set-up", "central node")
def cloud_is_set_up(guest: Guest) -> str:
    """The first boot makes a cloud that finds itself healthy, with a worker that is up where it has one"""
    guest.out("systemctl is-active recvirt-cloud-setup.service")
    guest.out("sudo recvirt-cloud login-here", root=False, seconds=120)
    here = "worker" in roles_of(guest)

    def healthy() -> Any:
        said = guest.run("recvirt-cloud status --json", root=False)
        found = json.loads(said.stdout) if said.status in (0, 1) and said.stdout else {}
        if here:
            return found if found.get("healthy") and found.get("workers", {}).get("up") else None
        # Nobody has joined it yet.
        wrong = {part for part, state in found.get("health", {"API": "no answer"}).items() if state != "ok"}
        return found if wrong <= {"workers"} else None

    found = wait_for(guest, "a healthy cloud with a worker" if here else "a healthy central node", healthy)
    failed = guest.failed_units()
    if failed:
        raise Failed(f"failed: {', '.join(failed)}")
    return f"version {found['version']}, {found['workers']['up']} worker up"


@cloud_check("cloud-is-closed")
def cloud_is_closed(guest: Guest) -> str:
    """From outside, SSH, the API and the workers' network can be reached, and nothing else"""
    addresses = guest.json("ip -json addr show")
    inner = [
        info["local"] for link in addresses if link["ifname"].startswith(_INNER) for info in link.get("addr_info", ())
    ]
    found = listeners(guest.out("ss -Hltnup"), inner)
    is_central = "central node" in roles_of(guest)
    if is_central and ("tcp", 443) not in found:
        raise Failed("nothing listens on port 443")
    wrong = sorted(set(found) - OPEN_PORTS - (CENTRAL_PORTS if is_central else set()))
    if wrong:
        raise Failed("; ".join(f"{port}/{protocol}: {found[protocol, port]}" for protocol, port in wrong))
    # Who listens is one thing; instances and the tunnel reach what is for them alone by the firewall.
    rules = guest.run("nft list chain inet recvirt_cloud input")
    if rules.status != 0 or "policy drop" not in rules.stdout:
        raise Failed(f"the firewall is not in force: {rules.stderr.strip() or rules.stdout[:200]}")
    return ", ".join(f"{port}/{protocol}" for protocol, port in sorted(found))


@cloud_check("cloud-keeps-its-secrets", "central node")
def cloud_keeps_its_secrets(guest: Guest) -> str:
    """Secrets are made at the first boot, are nobody else's to read, and stand in no log"""
    here = "worker" in roles_of(guest)
    names = (*SECRETS, *(WORKER_SECRETS if here else ()))
    for name in names:
        path = f"/etc/recvirt-cloud/{name}"
        if guest.run(f"test -s {path}").status != 0:
            raise Failed(f"{path} is not there")
        if guest.run(f"head -c 1 {path}", root=False).status == 0:
            raise Failed(f"an ordinary user can read {path}")
    path = f"/etc/recvirt-cloud/{'worker' if here else 'central'}.toml"
    password = guest.out(f"sed -n 's|^broker = .*://[^:]*:\\([^@]*\\)@.*|\\1|p' {path}")
    if not password:
        raise Failed(f"{path} has no password for the broker")
    # Not on a command line: it would be in the log of this very look.
    told = guest.run(
        "sed -n 's|^broker = .*://[^:]*:\\([^@]*\\)@.*|\\1|p' /etc/recvirt-cloud/*.toml > /run/recvirt-words;"
        " journalctl -b -o cat --no-pager | grep -cFf /run/recvirt-words; rm -f /run/recvirt-words"
    )
    if told.stdout.strip() != "0":
        raise Failed(f"the broker's password stands in {told.stdout.strip()} lines of the journal")
    return f"{len(names)} files"


def address_of(guest: Guest, name: str) -> str:
    """The address that libvirt's DHCP server gave an instance."""
    mac = cloud(guest, "show", name)["nics"][0]["mac"]
    leases = guest.out(
        "for net in $(virsh -c qemu:///system net-list --name); do"
        f" virsh -c qemu:///system net-dhcp-leases $net --mac {shlex.quote(mac)}; done"
    )
    found = re.search(r"ipv4\s+([\d.]+)/", leases)
    return found[1] if found else ""


def inside(guest: Guest, command: str, name: str = INSTANCE) -> str:
    """The stdout of a command in the instance, once its SSH server answers."""
    address = wait_for(guest, f"an address of {name}", lambda: address_of(guest, name))
    # A command may end with 255 as well, as BusyBox's mount does; ssh means by it that nobody was reached.
    told_apart = f"({command}\n); status=$?; [ $status -ne 255 ] || exit 254; exit $status"
    ssh = (
        f"ssh -i {_KEY} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        f" -o ConnectTimeout=20 root@{address} {shlex.quote(told_apart)}"
        # 255 would look as if this guest could not be reached.
        f"; status=$?; [ $status -ne 255 ] || exit {_UNREACHED}; exit $status"
    )
    said: list[str] = []

    def answered() -> bool:
        done = guest.run(ssh, root=False)
        said[:] = [done.stdout.rstrip("\n"), done.stderr.strip(), str(done.status)]
        return done.status != _UNREACHED

    wait_for(guest, f"an SSH login on {name}", answered)
    if said[2] != "0":
        raise Failed(f"in {name}, {command!r} ended with status {said[2]}: {said[1] or said[0]}")
    return said[0]


def instance_key(guest: Guest) -> str:
    """The path of the test user's key to instances; made when it is not there."""
    guest.out(f"test -e {_KEY} || ssh-keygen -q -t ed25519 -N '' -f {_KEY}", root=False)
    return guest.out(f"echo {_KEY}", root=False)


def domain_of(guest: Guest, name: str) -> str:
    """libvirt's name of an instance."""
    return f"{name}-{cloud(guest, 'show', name)['uuid'][:8]}"


@cloud_check("cloud-launches-under-kvm", *ROLES.values())
def cloud_launches_under_kvm(guest: Guest) -> str:
    """An instance that the cloud launched runs under KVM, lets its key's owner in, and serves a page"""
    operation(guest, "launch", INSTANCE, "--ssh-key", f"{instance_key(guest)}.pub", "--vcpus-max", "2",
              "--memory", "256M", "--memory-max", "512M")  # fmt: skip
    domain = domain_of(guest, INSTANCE)
    if "<domain type='kvm'" not in guest.out(f"virsh -c qemu:///system dumpxml {domain}"):
        raise Failed("libvirt does not run it under KVM")
    nonce = secrets.token_hex(16)
    inside(guest, f"mkdir -p /www && echo {nonce} > /www/index.html && busybox httpd -p 80 -h /www")
    fetch = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=30).read().decode())"
    url = f"http://{address_of(guest, INSTANCE)}/"
    page = guest.out(shlex.join(["python3", "-c", fetch, url]), root=False)
    if page.strip() != nonce:
        raise Failed(f"the page that the instance serves is {page[:80]!r}")
    query = json.dumps({"execute": "query-stats", "arguments": {"target": "vcpu"}})
    stats = guest.json(f"virsh -c qemu:///system qemu-monitor-command {domain} {shlex.quote(query)}")
    exits = sum_exits(stats["return"]).get("exits", 0)
    if exits < EXITS_MIN:
        raise Failed(f"KVM counted {exits} exits of the instance; it was not KVM that ran it")
    guest.acceptance.measure("instance_exits", exits)
    return f"its page came over the network; KVM counted {exits} exits"


@cloud_check("cloud-forwards-a-port", *ROLES.values())
def cloud_forwards_a_port(guest: Guest) -> str:
    """A port of the machine leads, from outside of it, to an instance's page, until the forward is removed"""
    if guest.vm is None:
        raise Skipped("a guest inside a guest has no port on this host")
    nonce = secrets.token_hex(16)
    # The page's server may run since the launch.
    inside(guest, f"mkdir -p /www && echo {nonce} > /www/forward && (busybox httpd -p 80 -h /www 2>/dev/null || true)")
    url = f"http://127.0.0.1:{guest.vm.host_port(FORWARDED_PORT)}/forward"

    def page() -> str:
        with requests.Session() as session:
            session.trust_env = False  # whatever proxy the test host has, it does not lead into the machine
            try:
                return session.get(url, timeout=_PAGE_SECONDS).text.strip()
            except requests.RequestException as error:
                return f"{type(error).__name__}: {error}"

    if (early := page()) == nonce:
        raise Failed("the port led to the instance before anybody asked for it")
    operation(guest, "forward", "add", INSTANCE, f"{FORWARDED_PORT}:80")
    if (found := page()) != nonce:
        raise Failed(f"through the forward, the instance's page is {found[:200]!r}")
    operation(guest, "forward", "remove", INSTANCE, str(FORWARDED_PORT))
    if page() == nonce:
        raise Failed("the port still leads to the instance after its forward was removed")
    return f"port {FORWARDED_PORT} of the machine showed the instance's page; before ({early.partition(':')[0]}) not"


@cloud_check("cloud-rescales-live", *ROLES.values())
def cloud_rescales_live(guest: Guest) -> str:
    """A running instance gets another processor and keeps running"""
    before = inside(guest, "cat /proc/sys/kernel/random/boot_id; nproc").split()
    how = operation(guest, "rescale", INSTANCE, "--vcpus", "2")["facts"].get("how", "")

    def two() -> bool:
        return inside(guest, "cat /proc/sys/kernel/random/boot_id; nproc").split() == [before[0], "2"]

    if before[1] != "1":
        raise Failed(f"it started with {before[1]} processors, not with one")
    wait_for(guest, "a second processor, without a reboot", two)
    return f"from 1 to 2 processors, {how}"


@cloud_check("cloud-reverts-to-a-snapshot", *ROLES.values())
def cloud_reverts_to_a_snapshot(guest: Guest) -> str:
    """What was written after a snapshot is gone when the instance goes back to it"""
    inside(guest, "echo before > /root/word && sync")
    operation(guest, "snapshot", INSTANCE, "one")
    inside(guest, "echo after > /root/word && sync")
    operation(guest, "revert", INSTANCE, "one")
    word = inside(guest, "cat /root/word")
    if word != "before":
        raise Failed(f"after going back the file holds {word!r}")
    return "a file is as it was"


def _device(guest: Guest) -> str:
    """The volume in the instance, by its serial number."""
    serial = cloud(guest, "volume", "show", VOLUME)["uuid"].replace("-", "")[:20]
    look = (
        "mkdir -p /mnt; cd /sys/class/block; "
        f'for d in vd?; do [ "$(cat $d/serial)" = {serial} ] && echo /dev/$d; done; true'
    )
    return str(wait_for(guest, "the volume in the instance", lambda: inside(guest, look)))


@cloud_check("cloud-gives-volumes", *ROLES.values())
def cloud_gives_volumes(guest: Guest) -> str:
    """A volume comes formatted, is attached to a running instance, and grows with its file system"""
    operation(guest, "volume", "allocate", VOLUME, "--size", "200M", "--near", INSTANCE)
    operation(guest, "volume", "attach", VOLUME, INSTANCE)
    word = secrets.token_hex(16)
    size = "df -k /mnt | awk 'END {print $2}'"
    small = int(inside(guest, f"mount -t ext4 {_device(guest)} /mnt && echo {word} > /mnt/word && sync && {size}"))
    operation(guest, "volume", "resize", VOLUME, "300M")
    sectors = inside(guest, f"cat /sys/class/block/{_device(guest).removeprefix('/dev/')}/size")
    if int(sectors) != 300 * 2048:
        raise Failed(f"the running instance sees {sectors} sectors of a volume that has 300 MiB now")
    inside(guest, "umount /mnt")
    operation(guest, "volume", "detach", VOLUME)
    operation(guest, "volume", "resize", VOLUME, "400M")
    operation(guest, "volume", "attach", VOLUME, INSTANCE)
    found = inside(guest, f"mount -t ext4 {_device(guest)} /mnt && cat /mnt/word && {size}; umount /mnt").split()
    if found[0] != word:
        raise Failed(f"the file on the volume holds {found[0]!r}")
    if int(found[1]) < 1.7 * small:
        raise Failed(f"its file system has {found[1]} KiB after it was doubled, and had {small}")
    return f"ext4, {small} KiB, then {found[1]} KiB with the same file"


@cloud_check("cloud-keeps-appointments", *ROLES.values())
def cloud_keeps_appointments(guest: Guest) -> str:
    """A launch that is scheduled a minute ahead happens then, and not before"""
    at = int(guest.out("date +%s")) + _SCHEDULE_SECONDS
    when = guest.out(f"date -u -d @{at} '+%Y-%m-%d %H:%M:%S'")
    cloud(guest, "schedule", "add", "later", "launch", "--at", when, "--set", "name=later", "--set",
          "memory_bytes=134217728")  # fmt: skip

    def launched() -> Any:
        rows = [row for row in cloud(guest, "operations") if row["instance_name"] == "later"]
        return rows[0] if rows and rows[0]["phase"] in ("succeeded", "failed") else None

    row = wait_for(guest, "the launch", launched, _SCHEDULE_SECONDS + _OPERATION_SECONDS)
    created = int(guest.out(f"date +%s -d {shlex.quote(row['created'])}"))
    if row["phase"] != "succeeded":
        raise Failed(f"the launch failed: {row['message']}")
    if created < at:
        raise Failed(f"it began {at - created} s before its time")
    operation(guest, "delete", "later")
    return f"begun {created - at} s after its time"


@cloud_check("cloud-survives-a-power-cut", *ROLES.values())
def cloud_survives_a_power_cut(guest: Guest) -> str:
    """After the power was cut, the cloud, its instances and their disks come back by themselves"""
    word = secrets.token_hex(16)
    inside(guest, f"echo {word} > /root/word && sync")
    before = {row["name"]: (row["uuid"], row["state"]) for row in cloud(guest, "list")}
    seconds = guest.reset()

    def back() -> Any:
        said = guest.run("recvirt-cloud list --json", root=False)
        rows = json.loads(said.stdout) if said.status == 0 and said.stdout else []
        now = {row["name"]: (row["uuid"], row["state"]) for row in rows}
        return now == before and all(row["power"] == "running" for row in rows if row["state"] == "on")

    wait_for(guest, f"the same instances as before ({', '.join(before)})", back, 2 * _OPERATION_SECONDS)
    found = inside(guest, "cat /root/word")
    if found != word:
        raise Failed(f"the instance came back with another disk: {found!r}")
    defined = guest.out("virsh -c qemu:///system list --all --name").split()
    wanted = sorted(f"{name}-{uuid[:8]}" for name, (uuid, _) in before.items())
    if sorted(defined) != wanted:
        raise Failed(f"libvirt knows {', '.join(defined)}; the cloud {', '.join(wanted)}")
    return f"SSH after {seconds:.0f} s; {len(before)} instance(s) as before"
