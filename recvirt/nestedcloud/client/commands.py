"""The verbs on instances and on what belongs to them. Thin: each is one call of the API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recvirt.nestedcloud.client.api import Api, ApiError, load_access
from recvirt.nestedcloud.client.output import fields, parse_bytes, table

if TYPE_CHECKING:
    _Bytes = click.ParamType[int]
else:
    _Bytes = click.ParamType  # no generic before click 8.2


class Size(_Bytes):
    """Bytes, as 512M or 2G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        try:
            return value if isinstance(value, int) else parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
wait_option = click.option("--wait/--no-wait", default=True, help="Wait until it is done. [default: wait]")
timeout_option = click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait.")


@click.pass_context
def _api(ctx: click.Context) -> Api:
    return Api(load_access(ctx.find_root().params.get("project")))


def api() -> Api:
    """The cloud that the user has access to."""
    return _api()


def follow(operation: Mapping[str, Any], wait: bool, timeout: float, as_json: bool) -> None:
    """Wait for an operation, telling what it is at, unless somebody else reads along."""
    said = ""

    def progress(now: Mapping[str, Any]) -> None:
        nonlocal said
        name = next((now[f"{what}_name"] for what in ("volume", "image", "instance") if now[f"{what}_name"]), "")
        text = f"{now['kind']} {name}: {now['phase']} {now['progress']} % {now['message']}".rstrip()
        if text != said and not as_json:
            click.echo(text, err=True)
        said = text

    done = api().wait(operation, timeout, progress) if wait else operation
    if as_json:
        fields(done, as_json=True)
    elif not wait:
        click.echo(done["uuid"])
    elif how := done["facts"].get("how"):
        click.echo(f"done {how}")


@click.command()
@click.argument("name")
@click.option("--image", help="The image to start from. [default: the only one there is, or recvirt-guest]")
@click.option("--vcpus", type=int, help="Virtual processors. [default: 1]")
@click.option("--vcpus-max", type=int, help="As many as it may grow to while it runs.")
@click.option("--memory", type=SIZE, help="As 512M or 2G. [default: 512M]")
@click.option("--memory-max", type=SIZE, help="As much as it may grow to while it runs.")
@click.option("--disk", type=SIZE, help="[default: the image's size]")
@click.option("--priority", type=int, help="Of its processors, 1 to 100; ten more is twice as much. [default: 50]")
@click.option("--network", "networks", multiple=True, help="A network, by name; again for another card.")
@click.option("--ssh-key", "keys", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A file with public keys. [default: your own]")  # fmt: skip
@click.option("--no-ssh-keys", is_flag=True, help="Not your own ones either.")
@click.option("--user-data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="For cloud-init.")
@click.option("--nest", is_flag=True, help="Let it run VMs of its own.")
@click.option("--reservation", metavar="UUID", help="Use this reservation's room, and be deleted when it ends.")
@wait_option
@timeout_option
@json_option
def launch(name: str, image: str | None, keys: tuple[Path, ...], no_ssh_keys: bool, user_data: Path | None,
           networks: tuple[str, ...], nest: bool, reservation: str | None,
           wait: bool, timeout: float, as_json: bool, **sizes: int | None) -> None:  # fmt: skip
    """Launch an instance.

    \b
    Examples:
      recvirt-cloud launch web
      recvirt-cloud launch web --ssh-key ~/.ssh/id_ed25519.pub
      recvirt-cloud launch db --vcpus 2 --vcpus-max 4 --memory 2G --memory-max 8G --disk 20G
    """
    body: dict[str, Any] = {"name": name, "nest": nest}
    body |= _sizes(sizes)
    if image is not None:
        body["image"] = image
    if keys:
        body["ssh_keys"] = [line for path in keys for line in key_lines(path)]
    elif not no_ssh_keys and (own := own_keys(Path.home())):
        click.echo(f"with the keys of {', '.join(str(path) for path in own)}", err=True)
        body["ssh_keys"] = [line for path in own for line in key_lines(path)]
    if user_data is not None:
        body["user_data"] = user_data.read_text()
    if reservation is not None:
        body["reservation"] = reservation
    if networks:
        body["networks"] = list(networks)
    follow(api().call("POST", api().below("instances"), body), wait, timeout, as_json)


def key_lines(path: Path) -> list[str]:
    """The public keys of a file."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def own_keys(home: Path) -> list[Path]:
    """The files of a person's own public keys, by the names that ssh(1) gives them; on a machine where there are none,
    such as a cloud's VM, what lets them in there lets them in further on.
    """
    folder = home / ".ssh"
    found = [path for path in sorted(folder.glob("id_*.pub")) if path.is_file()]
    allowed = folder / "authorized_keys"
    return found or ([allowed] if allowed.is_file() and key_lines(allowed) else [])


def _sizes(sizes: Mapping[str, int | None]) -> dict[str, int]:
    names = {"memory": "memory_bytes", "memory_max": "memory_max_bytes", "disk": "disk_bytes"}
    return {names.get(name, name): value for name, value in sizes.items() if value is not None}


@click.command()
@click.argument("name")
@click.option("--vcpus", type=int, help="Virtual processors.")
@click.option("--vcpus-max", type=int, help="As many as it may grow to while it runs.")
@click.option("--memory", type=SIZE, help="As 512M or 2G.")
@click.option("--memory-max", type=SIZE, help="As much as it may grow to while it runs.")
@click.option("--disk", type=SIZE, help="Of the root disk; it only grows.")
@click.option("--priority", type=int, help="Of its processors, 1 to 100.")
@click.option("--restart", is_flag=True, help="Allow what can't be done while it runs.")
@wait_option
@timeout_option
@json_option
def rescale(name: str, restart: bool, wait: bool, timeout: float, as_json: bool, **sizes: int | None) -> None:
    """Make an instance larger or smaller: as it runs where that can be done.

    \b
    Examples:
      recvirt-cloud rescale web --vcpus 2
      recvirt-cloud rescale web --memory-max 16G --restart
    """
    body: dict[str, Any] = {"restart": restart, **_sizes(sizes)}
    follow(api().call("POST", api().below(f"instances/{name}/rescale"), body), wait, timeout, as_json)


def _verb(name: str, text: str, *options: Any, path: str = "", method: str = "POST") -> click.Command:
    """A command that asks for one operation on one instance; its other options are the request's body."""

    def run(instance: str, wait: bool, timeout: float, as_json: bool, **body: Any) -> None:
        given = {key: value for key, value in body.items() if value is not None}
        where = f"instances/{instance}" + (f"/{path or name}" if method == "POST" else "")
        follow(api().call(method, api().below(where), given), wait, timeout, as_json)

    function: Any = run
    for option in reversed((click.argument("instance"), *options, wait_option, timeout_option, json_option)):
        function = option(function)
    command: click.Command = click.command(name, help=f"{text}\n\n\b\nExample:\n  recvirt-cloud {name} web" + (
        " before-upgrade" if options and name != "stop" else ""))(function)  # fmt: skip
    return command


_snapshot = click.argument("snapshot")
start = _verb("start", "Power an instance on.")
stop = _verb(
    "stop", "Power an instance off: its guest first, then without asking.",
    click.option("--graceful-seconds", type=float, help="What the guest gets; 0 takes the power away. [default: 60]"),
)  # fmt: skip
reboot = _verb("reboot", "Restart an instance's guest.")
suspend = _verb("suspend", "Stop an instance's processors; its memory stays.")
resume = _verb("resume", "Let a suspended instance go on.")
delete = _verb("delete", "Delete an instance with its root disk.", method="DELETE")
snapshot = _verb("snapshot", "Keep what an instance is now under a name.", _snapshot)
revert = _verb("revert", "Go back to a snapshot.", _snapshot)
snapshot_remove = _verb("snapshot-remove", "Forget a snapshot.", _snapshot)


def listing(
    name: str, path: str, text: str, columns: tuple[tuple[str, str], ...], *, scoped: bool = True, program: str = ""
) -> click.Command:
    def run(as_json: bool) -> None:
        table(api().pages(api().below(path) if scoped else path), columns, as_json=as_json)

    command: click.Command = click.command(
        name, help=f"{text}\n\n\b\nExample:\n  recvirt-cloud {program or name} --json"
    )(json_option(run))
    return command


instances = listing(
    "list", "instances", "List the instances.",
    (("NAME", "name"), ("STATE", "state"), ("POWER", "power"), ("ADDRESS", "address"), ("VCPUS", "vcpus"),
     ("MEMORY", "memory_bytes"), ("DISK", "disk_bytes"), ("IMAGE", "image"), ("WORKER", "worker")),
)  # fmt: skip
operations = listing(
    "operations", "operations", "List what was asked for, newest first.",
    (("UUID", "uuid"), ("KIND", "kind"), ("INSTANCE", "instance_name"), ("PHASE", "phase"), ("%", "progress"),
     ("MESSAGE", "message")),
)  # fmt: skip
images = listing(
    "images", "images", "List the images.",
    (("NAME", "name"), ("STATE", "state"), ("PUBLIC", "public"), ("SIZE", "virtual_bytes")),
)  # fmt: skip
networks = listing(
    "networks", "networks", "List the networks.", (("NAME", "name"), ("KIND", "kind"), ("SUBNET", "cidr"))
)  # fmt: skip
workers = listing(
    "workers", "workers", "List the workers.",
    (("NAME", "name"), ("UP", "up"), ("DRAINING", "draining"), ("VCPUS", "vcpus"), ("MEMORY", "memory_bytes"),
     ("DISK", "disk_bytes")), scoped=False,
)  # fmt: skip


@click.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show an instance.

    \b
    Example:
      recvirt-cloud show web
    """
    fields(api().call("GET", api().below(f"instances/{name}")), as_json=as_json)


@click.command()
@click.argument("uuid")
@click.option("--wait", is_flag=True, help="Wait until it has ended.")
@timeout_option
@json_option
def operation(uuid: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Show an operation, or wait for it.

    \b
    Example:
      recvirt-cloud operation 7d3f... --wait
    """
    found = api().call("GET", api().below(f"operations/{uuid}"))
    if wait:
        follow(found, True, timeout, as_json)
    else:
        fields(found, as_json=as_json)


def plain_verb(
    group: click.Group, name: str, text: str, path: str, method: str, said: str, *, example: str = ""
) -> None:
    """A verb without an answer on a named thing; ``path`` has a place for its name."""

    def run(name: str) -> None:
        api().call(method, api().below(path.format(name)))
        click.echo(f"{name} {said}")

    line = example or f"{group.name} {name} office"
    group.command(name, help=f"{text}\n\n\b\nExample:\n  recvirt-cloud {line}")(click.argument("name")(run))


COMMANDS = (
    launch, instances, show, start, stop, reboot, suspend, resume, rescale, delete, snapshot, revert, snapshot_remove,
    operations, operation, images, networks, workers,
)  # fmt: skip

__all__ = ["COMMANDS", "ApiError"]
