"""The verbs on how instances are reached: forwards of ports, and SSH where an instance's address leads somewhere."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from recvirt.nestedcloud.client.api import Api, ApiError
from recvirt.nestedcloud.client.commands import api, follow, json_option, timeout_option, wait_option
from recvirt.nestedcloud.client.output import table

_LINKS = Path("/sys/class/net")
#: What makes an instance run that does not.
_WAYS_ON = {"stopped": "start", "crashed": "start", "suspended": "resume"}

_protocol = click.option(
    "--protocol", type=click.Choice(["tcp", "udp"]), default="tcp", show_default=True, help="Of the port."
)


class Ports(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Two ports, as 8080:80."""

    name = "ports"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The worker's and the guest's."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,5}):(\d{1,5})", str(value))
        if found is None or not all(1 <= int(port) <= 65535 for port in found.groups()):
            self.fail(f"{value!r}: want the worker's port and the guest's, as 8080:80", param, ctx)
        return int(found[1]), int(found[2])


@click.group()
def forward() -> None:
    """Ports of workers that lead to instances, from wherever the worker is reached.

    \b
    Example:
      recvirt-cloud forward list
    """


@forward.command("add")
@click.argument("instance")
@click.argument("ports", type=Ports())
@_protocol
@click.option("--source", metavar="CIDR", default="", help="Who may come, as 192.0.2.0/24. [default: everybody]")
@click.option("--network", metavar="NAME", help="The network of the card that is meant. [default: the first]")
@wait_option
@timeout_option
@json_option
def forward_add(instance: str, ports: tuple[int, int], protocol: str, source: str, network: str | None, wait: bool,
                timeout: float, as_json: bool) -> None:  # fmt: skip
    """Have a port of an instance's worker lead to a port of the instance.

    \b
    Examples:
      recvirt-cloud forward add web 8080:80
      recvirt-cloud forward add web 2222:22 --source 192.0.2.0/24
    """
    body: dict[str, Any] = {
        "instance": instance, "host_port": ports[0], "guest_port": ports[1], "protocol": protocol, "source": source,
    }  # fmt: skip
    if network is not None:
        body["network"] = network
    follow(api().call("POST", api().below("forwards"), body), wait, timeout, as_json)


@forward.command("list")
@json_option
def forward_list(as_json: bool) -> None:
    """List the ports that lead to instances.

    \b
    Example:
      recvirt-cloud forward list --json
    """
    columns = (
        ("WORKER", "worker"), ("PORT", "host_port"), ("PROTOCOL", "protocol"), ("INSTANCE", "instance"),
        ("ADDRESS", "address"), ("TO", "guest_port"), ("SOURCE", "source"), ("STATE", "state"), ("MESSAGE", "message"),
    )  # fmt: skip
    table(api().pages(api().below("forwards")), columns, as_json=as_json)


@forward.command("remove")
@click.argument("instance")
@click.argument("port", type=int)
@_protocol
@wait_option
@timeout_option
@json_option
def forward_remove(instance: str, port: int, protocol: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Have a worker's port lead to an instance no more; connections through it end.

    \b
    Example:
      recvirt-cloud forward remove web 8080
    """
    cloud = api()
    wanted = (instance, port, protocol)
    for row in cloud.pages(cloud.below("forwards")):
        if (row["instance"], row["host_port"], row["protocol"]) == wanted:
            path = cloud.below(f"forwards/{row['uuid']}")
            return follow(cloud.call("DELETE", path, {}), wait, timeout, as_json)
    raise ApiError(
        f"port {port}/{protocol} does not lead to {instance}", kind="not-found", hint="recvirt-cloud forward list"
    )


def reached_here(cloud: Api, instance: Mapping[str, Any], links: Path) -> str:
    """An address of an instance that leads to it from this machine. ApiError says from where else it does."""
    name = instance["name"]
    if instance["address"] is None:
        raise ApiError(f"no address of {name} is known", kind="not-found", hint=f"recvirt-cloud console {name}")
    bridges = {row["name"]: f"rv{row['uuid'][:8]}" for row in cloud.pages(cloud.below("networks"))}
    for nic in instance["nics"]:
        bridge = bridges.get(nic["network"])
        if nic["address"] is not None and bridge is not None and (links / bridge).exists():
            return str(nic["address"])
    raise ApiError(
        f"{instance['address']} leads to {name} on the machine of its worker {instance['worker']} alone, and that is "
        "not this one", kind="elsewhere",
        hint=f"call it there, or forward a port: recvirt-cloud forward add {name} 2222:22",
    )  # fmt: skip


def wait_for_greeting(address: str, seconds: float, port: int = 22) -> bool:
    """Until an SSH server greets there; False when none does in time. A guest takes its time to boot."""
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            with socket.create_connection((address, port), timeout=10) as connection:
                if connection.recv(4) == b"SSH-":
                    return True
        except OSError:  # no route yet, refused, timed out
            pass
        if time.monotonic() >= end:
            return False
        if not told:
            click.echo(f"waiting for the SSH server at {address}", err=True)
            told = True
        time.sleep(1)


@click.command()
@click.argument("name")
@click.option("--user", default="root", show_default=True, help="The guest's user.")
@click.option("--wait", "seconds", type=click.FloatRange(0), default=300, show_default=True, metavar="SECONDS",
              help="How long a guest that boots is waited for.")  # fmt: skip
@click.argument("command", nargs=-1)
def ssh(name: str, user: str, seconds: float, command: tuple[str, ...]) -> None:
    """Log in to an instance by SSH, on the machine of its worker.

    \b
    Examples:
      recvirt-cloud ssh web
      recvirt-cloud ssh web -- uptime
    """
    cloud = api()
    instance = cloud.call("GET", cloud.below(f"instances/{name}"))
    address = reached_here(cloud, instance, _LINKS)
    if verb := _WAYS_ON.get(instance["power"]):
        raise ApiError(f"{name} is {instance['power']}", hint=f"recvirt-cloud {verb} {name}")
    if not wait_for_greeting(address, seconds):
        raise ApiError(
            f"no SSH server of {name} greets at {address} within {seconds:g} s", kind="unreachable",
            hint=f"recvirt-cloud logs {name} shows how far it has come; --wait gives it longer",
        )  # fmt: skip
    # An address may have been another instance's; the key that is remembered is this one's.
    words = ["ssh", "-o", f"HostKeyAlias=recvirt-{instance['uuid']}", "-o", "StrictHostKeyChecking=accept-new",
             "-l", user, "--", address, *command]  # fmt: skip
    try:
        os.execvp("ssh", words)  # noqa: S606 - we become it
    except FileNotFoundError:
        raise ApiError("ssh is not installed", hint="apt install openssh-client") from None


NETWORK_COMMANDS = (forward, ssh)
