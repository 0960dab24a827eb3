"""The verbs on workers, for administrators."""

from __future__ import annotations

import json
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import click

from recvirt.nestedcloud.client.commands import api, json_option, listing
from recvirt.nestedcloud.client.output import fields, table

_UNITS = {"m": 60, "h": 3600, "d": 86400}
#: Of the documentation's addresses (RFC 5737, RFC 3849): nobody is there, and nothing is sent.
_ELSEWHERE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))


def _seconds(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r}: want a time as 30m, 1h or 2d", param_hint="--for")
    return int(found[1]) * _UNITS[found[2]]


def own_address() -> str:
    """The address by which this machine leaves for others; empty when it has none."""
    for place, family in _ELSEWHERE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((place, 9))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return ""


def url_for_others(url: str) -> str:
    """The cloud's address as another machine reaches it: one that is of the loopback means this machine."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return url
    address = own_address()
    if not address:
        return "https://CENTRAL-NODE"
    port = f":{parts.port}" if parts.port not in (None, 443) else ""
    return f"https://{f'[{address}]' if ':' in address else address}{port}"


@click.command("invite")
@click.option("--name", help="What the worker will be called. [default: it says]")
@click.option("--for", "lifetime", default="1h", show_default=True, help="How long it is good, as 30m, 1h, 2d.")
@json_option
def invite(name: str | None, lifetime: str, as_json: bool) -> None:
    """Invite a machine to become a worker: prints the command that it runs, once.

    \b
    Examples:
      recvirt-cloud worker invite
      recvirt-cloud worker invite --name shelf-2 --for 2d
    """
    body: dict[str, Any] = {"seconds": _seconds(lifetime)}
    if name is not None:
        body["name"] = name
    cloud = api()
    made = cloud.call("POST", "workers/invitations", body)
    command = f"sudo recvirt-cloud worker join {url_for_others(cloud.access.url)} --token {made['token']}"
    if as_json:
        click.echo(json.dumps({**made, "command": command}, indent=1))
        return
    click.echo("On the machine that is to be a worker (it is good once, and until "
               f"{made['expires'][:19].replace('T', ' ')} UTC):\n", err=True)  # fmt: skip
    click.echo(command)


@click.command("invitations")
@json_option
def invitations(as_json: bool) -> None:
    """List the invitations, newest first.

    \b
    Example:
      recvirt-cloud worker invitations
    """
    columns = (("UUID", "uuid"), ("NAME", "name"), ("BY", "made_by"), ("EXPIRES", "expires"), ("USED BY", "used_by"))
    table(api().pages("workers/invitations"), columns, as_json=as_json)


@click.command("uninvite")
@click.argument("uuid")
def uninvite(uuid: str) -> None:
    """Take an invitation back.

    \b
    Example:
      recvirt-cloud worker uninvite 7d3f...
    """
    api().call("DELETE", f"workers/invitations/{uuid}")
    click.echo(f"{uuid} is taken back")


worker_list = listing(
    "list", "workers", "List the workers.",
    (("NAME", "name"), ("STATUS", "status"), ("VCPUS", "vcpus"), ("MEMORY", "memory_bytes"), ("DISK", "disk_bytes"),
     ("POOL", "pool"), ("LAST SEEN", "last_seen")), scoped=False, program="worker list",
)  # fmt: skip


@click.command("show")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show a worker.

    \b
    Example:
      recvirt-cloud worker show shelf-2
    """
    fields(api().call("GET", f"workers/{name}"), as_json=as_json)


def _verb(name: str, text: str, said: str) -> click.Command:
    def run(worker: str, as_json: bool) -> None:
        found = api().call("POST", f"workers/{worker}/{name}", {})
        if as_json:
            fields(found, as_json=True)
        else:
            click.echo(f"{worker} {said}")

    help_text = f"{text}\n\n\b\nExample:\n  recvirt-cloud worker {name} shelf-2"
    command: click.Command = click.command(name, help=help_text)(
        click.argument("worker", metavar="NAME")(json_option(run))
    )
    return command


drain = _verb("drain", "Place nothing new on a worker; what is there stays.", "takes nothing new")
undrain = _verb("undrain", "Place new things on a worker again.", "takes new things again")
revoke = _verb(
    "revoke", "Shut a worker out for good. Its instances run on there, out of the cloud's reach.",
    "is shut out; its instances say so (recvirt-cloud show), and what was under way has failed",
)  # fmt: skip

WORKER_COMMANDS = (invite, invitations, uninvite, worker_list, show, drain, undrain, revoke)
