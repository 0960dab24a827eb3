"""A machine becomes a worker of a cloud on another machine, stays one, and leaves. Runs as root on the worker.

Each step does only what is missing: killed anywhere, the same command goes on. Owns the order of the steps and what is
written on the worker; who is let in is the central node's (``central.peers``).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from recvirt.nestedcloud import membership, mounts, pinned, tunnel
from recvirt.nestedcloud.credentials import Token
from recvirt.nestedcloud.membership import Member, Welcome
from recvirt.nestedcloud.pinned import LinkError, Place
from recvirt.nestedcloud.provision import WORKER_USER, Machine, ProvisionError, domain_type, read, toml, write
from recvirt.nestedcloud.statuses import ExitStatus

#: The first handshake: the central node's root has to let the worker's key in.
HANDSHAKE_SECONDS = 90.0
#: The broker's own tools take minutes for an account under emulation.
LOGIN_SECONDS = 900.0
_PAUSE_SECONDS = 1.0
_TUNNEL_SECONDS = 5.0
TUNNEL_UNIT, TARGET = "recvirt-cloud-tunnel.service", "recvirt-cloud.target"
_SETUP_UNIT = "recvirt-cloud-setup.service"
_WORKER_UNITS = ("recvirt-cloud-worker.service", "recvirt-cloud-console.service")


@dataclass(frozen=True)
class Times:
    """How long what is waited for, and how; tests have no patience."""

    handshake_seconds: float = HANDSHAKE_SECONDS
    login_seconds: float = LOGIN_SECONDS
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


def certificate_path(machine: Machine) -> Path:
    """The API's certificate, for consoles."""
    return tunnel.folder(machine) / "central.pem"


def broker_url(worker: str, password: str, central: IPv6Address) -> str:
    """The broker in the tunnel."""
    return f"amqp://{worker}:{password}@[{central}]:5672//"


def _context(member: Member) -> ssl.SSLContext:
    place = pinned.place_of(member.url)
    if not member.fingerprint:
        return ssl.create_default_context()
    return pinned.pinned_context(pinned.certificate_of(place, member.fingerprint))


def join(
    machine: Machine, url: str, token: Token, *, name: str = "", fingerprint: str = "", nfs: bool = True,
    disks: str = "", times: Times | None = None,
) -> None:  # fmt: skip
    """Everything, in order. LinkError or ProvisionError say what does not work and what to do about it.

    ``disks`` says where root disks and volumes are: ``mounts.LOCAL``, ``mounts.SHARED``, or (empty) where they are now.
    """
    times = times or Times()
    place = pinned.place_of(url)
    with membership.alone(machine):
        member = _who(machine, str(place), name, fingerprint or token.fingerprint)
        mounts.check_change(machine, disks, _central_address(machine))
        public = tunnel.ensure_key(machine)
        machine.tell(f"asking {place} to be let in as {member.name}")
        body: dict[str, Any] = {
            "token": str(token), "uuid": member.uuid, "name": member.name, "public_key": public,
            "password_hash": member.current.password_hash,
        }  # fmt: skip
        if member.joined:
            welcome, clock = _ask_again(machine, member)
        else:
            answer = pinned.ask(place, "join", body, _context(member))
            welcome, clock = membership.check_welcome(answer.data, member), answer.clock_seconds
        member = membership.save(machine, replace(member, name=welcome.name, joined=True))
        machine.tell(f"this machine is {welcome.name} of the cloud {welcome.cloud}; the tunnel is {welcome.address}")
        _keep(machine, place.host, welcome)
        tunnel.up(machine)
        _wait_for_handshake(machine, place, welcome, times, clock)
        member = _keep_certificate(machine, member, welcome)
        _configure(machine, member, welcome)
        if nfs:
            mounts.mount(machine, str(welcome.central_address), disks)
        _start(machine)
        _wait_for_login(machine, member, welcome, times)
        machine.tell(f"{welcome.name} is a worker now; on the central node: recvirt-cloud worker list")


def _who(machine: Machine, url: str, name: str, fingerprint: str) -> Member:
    if machine.central.exists():
        raise LinkError(
            "this machine is a central node itself, with a worker of its own",
            "join from a machine of the profile nested-cloud-worker", status=ExitStatus.CONFIG,
        )  # fmt: skip
    member = membership.load(machine)
    other = read(machine.worker).get("uuid")
    if (other is not None and (member is None or other != member.uuid)) or (
        member is not None and member.joined and member.url != url
    ):
        raise LinkError(
            "this machine is a worker of another cloud already", "recvirt-cloud worker leave, then join",
            status=ExitStatus.CONFIG,
        )  # fmt: skip
    if member is None:
        return membership.save(machine, membership.new_member(url, name, fingerprint))
    # Nobody has let it in yet, so it may still be called otherwise, or have the address wrong.
    changed = member if member.joined else replace(member, url=url, name=name or member.name)
    return membership.save(machine, replace(changed, fingerprint=fingerprint or member.fingerprint))


def _ways(machine: Machine, member: Member) -> list[tuple[str, Callable[[], tuple[Place, ssl.SSLContext]]]]:
    """How the central node may be asked: through the tunnel, where WireGuard vouches for it; by its public address."""
    found = tunnel.config(machine)
    ways: list[tuple[str, Callable[[], tuple[Place, ssl.SSLContext]]]] = []
    if found is not None and tunnel.is_up(machine):
        inside = Place(found["central"]["address"], 443)
        ways.append(("tunnel", lambda: (inside, pinned.tunnel_context())))
    ways.append(("public", lambda: (pinned.place_of(member.url), _context(member))))
    return ways


def _ask_peer(machine: Machine, member: Member, **more: Any) -> tuple[Welcome, float]:
    """Ask as a member. A way that is not there is no answer; a refusal is one."""
    body = {"uuid": member.uuid, "password": member.current.password, **more}
    trouble: LinkError | None = None
    for name, way in _ways(machine, member):
        try:
            place, context = way()
            words: dict[str, Any] = {"seconds": _TUNNEL_SECONDS, "device": tunnel.INTERFACE} if name == "tunnel" else {}
            answer = pinned.ask(place, "peer", body, context, **words)
            return membership.check_welcome(answer.data, member), answer.clock_seconds
        except LinkError as error:
            if error.status is ExitStatus.REFUSED and error.kind != "fingerprint":
                raise
            trouble = error
    assert trouble is not None
    raise trouble


def _ask_again(machine: Machine, member: Member) -> tuple[Welcome, float]:
    if member.coming is not None:
        raise LinkError(
            "a change of key and password was cut short", "recvirt-cloud worker rotate", status=ExitStatus.CONFIG
        )
    return _ask_peer(machine, member)


def _keep(machine: Machine, host: str, welcome: Welcome) -> bool:
    central = tunnel.Peer(welcome.central_public_key, welcome.central_address, (host, welcome.port))
    return tunnel.keep_worker(machine, welcome.cloud, welcome.address, central)


def _wait(times: Times, seconds: float, look: Callable[[], bool]) -> bool:
    deadline = times.now() + seconds
    while not look():
        if times.now() >= deadline:
            return False
        times.sleep(_PAUSE_SECONDS)
    return True


def _wait_for_handshake(machine: Machine, place: Place, welcome: Welcome, times: Times, clock: float) -> None:
    machine.tell(f"waiting for the tunnel: UDP to {place.host}, port {welcome.port}")
    if _wait(times, times.handshake_seconds, lambda: tunnel.is_fresh(machine)):
        return
    hint = (
        f"does every firewall on the way let UDP port {welcome.port} through? On the central node: systemctl status "
        "recvirt-cloud-tunnel recvirt-cloud-peers, and sudo recvirt-cloud tunnel status"
    )
    if abs(clock) > pinned.CLOCK_SECONDS_MAX:
        hint = f"the two clocks are {abs(clock):.0f} s apart: set them right; and {hint}"
    raise LinkError(
        f"the tunnel to {place.host} does not come up: no handshake in {times.handshake_seconds:.0f} s", hint
    )


def _keep_certificate(machine: Machine, member: Member, welcome: Welcome) -> Member:
    """The API's certificate as it is now: told through the tunnel, or by who showed the one before."""
    path = certificate_path(machine)
    wanted = welcome.certificate_sha256
    if not wanted:
        return member
    try:
        if not path.exists() or member.fingerprint != wanted:
            pem = pinned.certificate_of(Place(str(welcome.central_address), 443), wanted)
            write(machine, path, pem, reader=None, mode=0o644)
    except LinkError as error:
        machine.tell(f"no serial consoles until the next refresh: {error}")
        return member
    # Where the system's authorities vouch for a certificate it may change at any time.
    return membership.save(machine, replace(member, fingerprint=wanted)) if member.fingerprint else member


def _configure(machine: Machine, member: Member, welcome: Welcome) -> None:
    before = read(machine.worker)
    wanted = {
        "uuid": member.uuid, "name": welcome.name, "cloud": str(welcome.cloud),
        "broker": broker_url(member.uuid, member.current.password, welcome.central_address),
        "libvirt": "qemu:///system", "domain_type": before.get("domain_type") or domain_type(machine),
        "images_dir": mounts.FOLDERS["IMAGES"], "blocks_dir": mounts.FOLDERS["BLOCKS"],
        "spool_dir": mounts.FOLDERS["SPOOL"], "run_dir": "/run/recvirt-worker",
        "log_dir": str(machine.logs), "api": str(Place(str(welcome.central_address), 443)),
        "api_ca": str(certificate_path(machine)), "api_pinned": True,
    }  # fmt: skip
    # What the owner has added stays; what the central node says, it says anew.
    text = toml({**before, **wanted})
    if not machine.worker.exists() or machine.worker.read_text() != text:
        write(machine, machine.worker, text, reader=WORKER_USER)


def _start(machine: Machine) -> None:
    machine.tell("starting the worker's services")
    machine.run(["systemctl", "enable", "--now", TUNNEL_UNIT], "", None)
    # It ran at the boot, when there was nothing to set up; what needs it is started anew, with what is written now.
    machine.run(["systemctl", "restart", _SETUP_UNIT], "", None)
    machine.run(["systemctl", "enable", "--now", TARGET], "", None)


def _wait_for_login(machine: Machine, member: Member, welcome: Welcome, times: Times) -> None:
    machine.tell("waiting for the broker to know this worker")
    url = broker_url(member.uuid, member.current.password, welcome.central_address)
    if not _wait(times, times.login_seconds, lambda: machine.can_log_in(url)):
        raise LinkError(
            f"the broker at {welcome.central_address} did not let this worker in for {times.login_seconds:.0f} s",
            "on the central node: journalctl -u recvirt-cloud-peers -u rabbitmq-server; this command goes on from here",
            status=ExitStatus.TIMED_OUT,
        )  # fmt: skip


def refresh(machine: Machine) -> bool:
    """Ask what has changed, and take it over; whether anything had. What the timer does."""
    with membership.alone(machine):
        member = membership.required(machine)
        if member.coming is not None:
            _take_over(machine, member, Times())
            return True
        if not tunnel.is_up(machine):
            tunnel.up(machine)
        welcome, _ = _ask_peer(machine, member)
        changed = _keep(machine, pinned.place_of(member.url).host, welcome)
        if changed or not tunnel.is_fresh(machine):
            # A name may stand for another address by now.
            tunnel.up(machine)
        after = _keep_certificate(machine, member, welcome)
        return changed or after != member


def rotate(machine: Machine, times: Times | None = None) -> None:
    """Another key and another password. The old ones are used until the central node has answered."""
    with membership.alone(machine):
        member = membership.required(machine)
        if member.coming is None:
            coming = membership.new_secrets(tunnel.new_key(machine))
            member = membership.save(machine, replace(member, coming=coming))
        _take_over(machine, member, times or Times())


def _take_over(machine: Machine, member: Member, times: Times) -> None:
    coming = member.coming
    assert coming is not None
    machine.tell("telling the central node of another key and another password")
    public = tunnel.public_of(machine, coming.key)
    welcome, clock = _ask_peer(machine, member, public_key=public, password_hash=coming.password_hash)
    # Killed from here on, the same is asked once more, and answered: the one before still opens that.
    tunnel.keep_key(machine, coming.key)
    place = pinned.place_of(member.url)
    _keep(machine, place.host, welcome)
    member = replace(member, current=replace(coming, key=""), coming=None)
    _configure(machine, member, welcome)
    membership.save(machine, member)
    tunnel.up(machine)
    for unit in _WORKER_UNITS:
        machine.run(["systemctl", "try-restart", unit], "", None)
    _wait_for_handshake(machine, place, welcome, times, clock)
    _wait_for_login(machine, member, welcome, times)
    machine.tell("key and password are changed")


def move_central(machine: Machine, url: str, *, fingerprint: str = "", times: Times | None = None) -> None:
    """The same central node is at another URL. Nothing is changed before it has shown there that it is the same: by its
    certificate, by knowing this worker, and by a handshake in the tunnel.
    """
    place = pinned.place_of(url)
    with membership.alone(machine):
        member = membership.required(machine)
        if member.coming is not None:
            raise LinkError(
                "a change of key and password was cut short", "recvirt-cloud worker rotate", status=ExitStatus.CONFIG
            )
        before = pinned.place_of(member.url)
        moved = replace(member, url=str(place), fingerprint=fingerprint or member.fingerprint)
        machine.tell(f"asking {place} whether it is this worker's central node")
        body = {"uuid": member.uuid, "password": member.current.password}
        answer = pinned.ask(place, "peer", body, _context(moved))
        welcome = membership.check_welcome(answer.data, member)
        if str(welcome.cloud) != read(machine.worker).get("cloud"):
            raise LinkError(
                f"{place} is of another cloud: {welcome.cloud}", "recvirt-cloud worker leave, then join",
                status=ExitStatus.REFUSED,
            )  # fmt: skip
        try:
            _tunnel_to(machine, place, welcome, times or Times(), answer.clock_seconds)
        except LinkError:
            _keep(machine, before.host, welcome)
            tunnel.up(machine)
            machine.tell(f"nothing is changed: the central node is still looked for at {before}")
            raise
        _keep_certificate(machine, membership.save(machine, moved), welcome)
        machine.tell(f"the central node is at {place} from now on")


def _tunnel_to(machine: Machine, place: Place, welcome: Welcome, times: Times, clock: float) -> None:
    """A new session with the central node, by way of ``place``; one that is there would hide that there is no way."""
    _keep(machine, place.host, welcome)
    tunnel.down(machine)
    tunnel.up(machine)
    _wait_for_handshake(machine, place, welcome, times, clock)


def leave(machine: Machine, *, force: bool = False) -> None:
    """Tell the central node, and forget everything that is of the membership. Disks stay."""
    with membership.alone(machine):
        if machine.central.exists():
            raise LinkError(
                "this machine is a central node, and its worker can't leave it", "recvirt-cloud worker drain NAME",
                status=ExitStatus.CONFIG,
            )  # fmt: skip
        if not force:
            _check_idle(machine)
        try:
            member = membership.load(machine)
            if member is not None and member.joined:
                _ask_peer(machine, member, leave=True)
                machine.tell("the central node knows that this worker has left")
        except (LinkError, ProvisionError) as error:
            machine.tell(f"the central node does not know ({error}); there: recvirt-cloud worker revoke NAME")
        machine.run(["systemctl", "disable", "--now", TARGET, *_WORKER_UNITS, TUNNEL_UNIT], "", None)
        _forget(machine)
        machine.tell("this machine is no worker any more; its disks are where they were")


def _check_idle(machine: Machine) -> None:
    try:
        running = machine.run(["virsh", "-q", "-c", "qemu:///system", "list", "--name"], "", None).split()
    except ProvisionError as error:
        raise LinkError(
            f"whether instances run can't be told: {error}", "--force leaves all the same", status=ExitStatus.CONFIG
        ) from None
    if running:
        raise LinkError(
            f"{len(running)} instances run here: {', '.join(running[:5])}",
            "delete or stop them by the cloud first; --force leaves them to themselves", status=ExitStatus.REFUSED,
        )  # fmt: skip


def _central_address(machine: Machine) -> str | None:
    """The central node's place in the tunnel, if this machine was told of it."""
    found = tunnel.config(machine)
    return found["central"]["address"] if found is not None and found["role"] == "worker" else None


def _forget(machine: Machine) -> None:
    central = _central_address(machine)
    if central is not None and (ours := mounts.ours(machine, central)):
        mounts.mount_from(machine, central, (), ours)
    tunnel.forget(machine)
    for path in (certificate_path(machine), machine.worker, membership.path_of(machine)):
        path.unlink(missing_ok=True)
