"""The verbs that root uses on a machine of the cloud: the tunnel, joining and leaving, and what the API may not do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from recvirt.nestedcloud.client.commands import json_option
from recvirt.nestedcloud.client.output import fail, fields, table
from recvirt.nestedcloud.statuses import ExitStatus


@contextmanager
def _as_root() -> Iterator[None]:
    """Errors as one line and a hint; nothing is begun without the rights for it."""
    from recvirt.nestedcloud.pinned import LinkError
    from recvirt.nestedcloud.provision import ProvisionError

    if os.geteuid() != 0:
        fail("this wants root", "sudo recvirt-cloud ...", ExitStatus.CONFIG)
    try:
        yield
    except LinkError as error:
        fail(str(error), error.hint, error.status)
    except ProvisionError as error:
        hint = getattr(error, "hint", "") or "once that is put right, the same command goes on from there"
        fail(str(error), hint, ExitStatus.CONFIG)


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.group()
def tunnel() -> None:
    """The encrypted way between the central node and its workers on other machines (WireGuard).

    \b
    Example:
      sudo recvirt-cloud tunnel status
    """


@tunnel.command("up")
def tunnel_up() -> None:
    """Make the tunnel's interface what it should be: what systemd does at each boot.

    \b
    Example:
      sudo recvirt-cloud tunnel up
    """
    from recvirt.nestedcloud import provision
    from recvirt.nestedcloud import tunnel as way

    with _as_root():
        way.up(provision.Machine(tell=_say))


@tunnel.command("down")
def tunnel_down() -> None:
    """Take the tunnel's interface away; keys stay.

    \b
    Example:
      sudo recvirt-cloud tunnel down
    """
    from recvirt.nestedcloud import provision
    from recvirt.nestedcloud import tunnel as way

    with _as_root():
        way.down(provision.Machine(tell=_say))


@tunnel.command("status")
@json_option
def tunnel_status(as_json: bool) -> None:
    """Show the tunnel's two ends, and when they last heard of each other. Exits with 1 when it is not up.

    \b
    Example:
      sudo recvirt-cloud tunnel status --json
    """
    from recvirt.nestedcloud import provision
    from recvirt.nestedcloud import tunnel as way

    with _as_root():
        found = way.status(provision.Machine(tell=_say))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        fields({name: value for name, value in found.items() if name != "peers"}, as_json=False)
        columns = (("ADDRESS", "address"), ("ENDPOINT", "endpoint"), ("HANDSHAKE", "handshake_seconds"),
                   ("RECEIVED", "received_bytes"), ("SENT", "sent_bytes"))  # fmt: skip
        table(found["peers"], columns, as_json=False)
    if not found["up"]:
        sys.exit(ExitStatus.ERROR)


@click.command("peers")
def central_peers() -> None:
    """Let into tunnel and broker who has joined, and shut out who was revoked: what systemd does when the list changes.

    \b
    Example:
      sudo recvirt-cloud central peers
    """
    from recvirt.nestedcloud import peers, provision

    with _as_root():
        if not peers.apply(provision.Machine(tell=_say)):
            _say("nothing has changed")


@click.command("rotate")
@click.argument("what", type=click.Choice(["tunnel", "certificate"]))
@click.option("--force", is_flag=True, help="Although the other one was changed a moment ago.")
def central_rotate(what: str, force: bool) -> None:
    """Make another key for the tunnel, or another certificate for the API. Workers find out by themselves, in minutes.

    \b
    Examples:
      sudo recvirt-cloud central rotate tunnel
      sudo recvirt-cloud central rotate certificate
    """
    from recvirt.nestedcloud import peers, provision

    with _as_root():
        change = peers.rotate_tunnel if what == "tunnel" else peers.rotate_certificate
        change(provision.Machine(tell=_say), force=force)
    _say(f"the {what} is changed; workers find out at their next refresh")


@click.command("join")
@click.argument("url")
@click.option("--token", help="The invitation. [default: asked for, or read from a pipe]")
@click.option("--name", default="", help="What the worker is called. [default: as invited, or the host's name]")
@click.option("--fingerprint", default="", help="The SHA-256 of the API's certificate. [default: the invitation's]")
@click.option("--system-ca", is_flag=True, help="Check the certificate with the system's authorities instead.")
@click.option("--disks", type=click.Choice(["local", "shared"]), default=None,
              help="Where root disks and volumes are: here, or on the central node. [default: local, or as it is]")
@click.option("--no-nfs", is_flag=True, help="Leave /etc/recvirt/nfs.conf alone.")
@click.option("--timeout", default=900.0, show_default=True, help="Seconds to wait for the broker.")
def worker_join(
    url: str, token: str | None, name: str, fingerprint: str, system_ca: bool, disks: str | None, no_nfs: bool,
    timeout: float,
) -> None:  # fmt: skip
    """Make this machine a worker of the cloud at URL. Again goes on where it stopped.

    \b
    Examples:
      sudo recvirt-cloud worker join https://cloud.example.org --token rvj_...
      sudo recvirt-cloud worker join https://192.0.2.7 --name shelf-2 < token-file
      sudo recvirt-cloud worker join https://192.0.2.7 --token rvj_... --disks shared
    """
    from recvirt.nestedcloud import credentials, join, provision
    from recvirt.nestedcloud.model import ModelError, check_name

    if no_nfs and disks == "shared":
        fail("--disks shared is a line in /etc/recvirt/nfs.conf", "leave --no-nfs out", ExitStatus.USAGE)
    if token is None:
        token = str(click.prompt("Invitation", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline())
    try:
        invitation = credentials.parse_token(token)
        if system_ca:
            invitation = credentials.Token(invitation.secret)
        fingerprint = credentials.parse_fingerprint(fingerprint) if fingerprint else ""
        name = check_name(name) if name else ""
    except (ValueError, ModelError) as error:
        fail(str(error), "", ExitStatus.USAGE)
    with _as_root():
        times = join.Times(login_seconds=timeout)
        machine = provision.Machine(tell=_say)
        join.join(
            machine, url, invitation, name=name, fingerprint=fingerprint, nfs=not no_nfs, disks=disks or "",
            times=times,
        )  # fmt: skip


@click.command("refresh")
def worker_refresh() -> None:
    """Ask the central node what has changed, and take it over: what a timer does.

    \b
    Example:
      sudo recvirt-cloud worker refresh
    """
    from recvirt.nestedcloud import join, provision

    with _as_root():
        _say("changed" if join.refresh(provision.Machine(tell=_say)) else "nothing has changed")


@click.command("rotate")
def worker_rotate() -> None:
    """Change this worker's key in the tunnel and its password at the broker.

    \b
    Example:
      sudo recvirt-cloud worker rotate
    """
    from recvirt.nestedcloud import join, provision

    with _as_root():
        join.rotate(provision.Machine(tell=_say))


@click.command("move-central")
@click.argument("url")
@click.option("--fingerprint", default="", help="The SHA-256 of the API's certificate. [default: the one it had]")
def worker_move_central(url: str, fingerprint: str) -> None:
    """Reach the central node at another URL from now on. It has to be the same one there, or nothing is changed.

    \b
    Example:
      sudo recvirt-cloud worker move-central https://cloud.example.org
    """
    from recvirt.nestedcloud import credentials, join, provision

    try:
        fingerprint = credentials.parse_fingerprint(fingerprint) if fingerprint else ""
    except ValueError as error:
        fail(str(error), "", ExitStatus.USAGE)
    with _as_root():
        join.move_central(provision.Machine(tell=_say), url, fingerprint=fingerprint)


@click.command("leave")
@click.option("--force", is_flag=True, help="Although instances run here; they run on, and no cloud knows them.")
def worker_leave(force: bool) -> None:
    """Leave the cloud, and forget everything that was of it; disks stay.

    \b
    Example:
      sudo recvirt-cloud worker leave
    """
    from recvirt.nestedcloud import join, provision

    with _as_root():
        join.leave(provision.Machine(tell=_say), force=force)


WORKER_ROOT_COMMANDS = (worker_join, worker_refresh, worker_rotate, worker_move_central, worker_leave)
CENTRAL_ROOT_COMMANDS = (central_peers, central_rotate)
