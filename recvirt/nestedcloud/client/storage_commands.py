"""The verbs on volumes and images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click

from recvirt.nestedcloud.client.api import Api
from recvirt.nestedcloud.client.commands import SIZE, api, follow, json_option, listing, timeout_option, wait_option
from recvirt.nestedcloud.client.output import fields

#: What the API takes in one request.
_PIECE_BYTES = 8 * 1024**2

_format = click.option("--format", "disk_format", type=click.Choice(["raw", "qcow2"]), help="How it is written.")
_sha256 = click.option("--sha256", default="", help="The digest that it has to have.")
_largest = click.option("--max-size", type=SIZE, help="As large as its disk may be. [default: 16G]")


def _post(path: str, body: dict[str, Any], wait: bool, timeout: float, as_json: bool) -> None:
    follow(api().call("POST", api().below(path), body), wait, timeout, as_json)


@click.group()
def volume() -> None:
    """Disks of their own, that outlive instances.

    \b
    Example:
      recvirt-cloud volume list
    """


@volume.command()
@click.argument("name")
@click.option("--size", type=SIZE, required=True, help="As 512M or 20G.")
@click.option("--fs", type=click.Choice(["ext4", "xfs", "none"]), default="ext4", show_default=True,
              help="The file system that is made in it.")  # fmt: skip
@_format
@click.option("--near", metavar="INSTANCE", help="The instance that it is for: it is made where that one is.")
@click.option("--on", metavar="WORKER", help="The worker that makes it: it lies where that one has its disks.")
@wait_option
@timeout_option
@json_option
def allocate(name: str, size: int, fs: str, disk_format: str | None, near: str | None, on: str | None, wait: bool,
             timeout: float, as_json: bool) -> None:  # fmt: skip
    """Make a volume, with a file system in it.

    \b
    Examples:
      recvirt-cloud volume allocate data --size 20G --near web
      recvirt-cloud volume allocate logs --size 2G --fs xfs --format qcow2 --on shelf-2
    """
    body: dict[str, Any] = {"name": name, "size_bytes": size, "filesystem": fs}
    body |= {key: value for key, value in (("format", disk_format), ("near", near), ("on", on)) if value is not None}
    _post("volumes", body, wait, timeout, as_json)


@volume.command("show")
@click.argument("name")
@json_option
def volume_show(name: str, as_json: bool) -> None:
    """Show a volume.

    \b
    Example:
      recvirt-cloud volume show data
    """
    fields(api().call("GET", api().below(f"volumes/{name}")), as_json=as_json)


@volume.command()
@click.argument("name")
@click.argument("instance")
@wait_option
@timeout_option
@json_option
def attach(name: str, instance: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Give an instance a volume, as it runs or while it is off.

    The guest finds it as /dev/disk/by-id/virtio- and the first 20 digits of its UUID, and by its label.

    \b
    Example:
      recvirt-cloud volume attach data web
    """
    _post(f"volumes/{name}/attach", {"instance": instance}, wait, timeout, as_json)


@volume.command()
@click.argument("name")
@wait_option
@timeout_option
@json_option
def detach(name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Take a volume from its instance. Unmount it in the guest first.

    \b
    Example:
      recvirt-cloud volume detach data
    """
    _post(f"volumes/{name}/detach", {}, wait, timeout, as_json)


@volume.command()
@click.argument("name")
@click.argument("size", type=SIZE)
@wait_option
@timeout_option
@json_option
def resize(name: str, size: int, wait: bool, timeout: float, as_json: bool) -> None:
    """Make a volume larger. A detached ext4 grows with it; otherwise the answer says what the guest has to do.

    \b
    Example:
      recvirt-cloud volume resize data 40G
    """
    _post(f"volumes/{name}/resize", {"size_bytes": size}, wait, timeout, as_json)


def _snapshot_verb(verb: str, text: str) -> click.Command:
    def run(name: str, snapshot: str, wait: bool, timeout: float, as_json: bool) -> None:
        _post(f"volumes/{name}/{verb}", {"snapshot": snapshot}, wait, timeout, as_json)

    function: Any = run
    for option in reversed(
        (click.argument("name"), click.argument("snapshot"), wait_option, timeout_option, json_option)
    ):
        function = option(function)
    example = f"\n\n\b\nExample:\n  recvirt-cloud volume {verb} data before-upgrade"
    command: click.Command = click.command(verb, help=text + example)(function)
    return command


volume.add_command(_snapshot_verb("snapshot", "Keep what is in a volume under a name; nobody may be using it."))
volume.add_command(_snapshot_verb("revert", "Bring a volume back to a snapshot; what came after it is lost."))
volume.add_command(_snapshot_verb("snapshot-remove", "Forget a snapshot of a volume."))
volume.add_command(
    listing(
        "list", "volumes", "List the volumes.",
        (("NAME", "name"), ("STATE", "state"), ("SIZE", "size_bytes"), ("FS", "filesystem"), ("FORMAT", "format"),
         ("INSTANCE", "instance"), ("WORKER", "worker")), program="volume list",
    )
)  # fmt: skip


@volume.command()
@click.argument("name")
@wait_option
@timeout_option
@json_option
def remove(name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Remove a volume and its snapshots. What is in them is lost.

    \b
    Example:
      recvirt-cloud volume remove data
    """
    follow(api().call("DELETE", api().below(f"volumes/{name}")), wait, timeout, as_json)


@click.group()
def image() -> None:
    """What instances start as a copy of.

    \b
    Example:
      recvirt-cloud image list
    """


def _image_body(name: str, disk_format: str | None, sha256: str, max_size: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {"name": name}
    if sha256:
        body["sha256"] = sha256.lower()
    body |= {key: value for key, value in (("format", disk_format), ("largest_bytes", max_size)) if value is not None}
    return body


@image.command("import")
@click.argument("name")
@click.argument("url")
@_format
@_sha256
@_largest
@wait_option
@timeout_option
@json_option
def import_url(name: str, url: str, disk_format: str | None, sha256: str, max_size: int | None, wait: bool,
               timeout: float, as_json: bool) -> None:  # fmt: skip
    """Have the cloud fetch an image from a web server.

    \b
    Example:
      recvirt-cloud image import debian https://cloud.debian.org/images/cloud/... --sha256 ...
    """
    body = _image_body(name, disk_format, sha256, max_size)
    _post("images", {**body, "url": url}, wait, timeout, as_json)


@image.command()
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_format
@_largest
@wait_option
@timeout_option
@json_option
def upload(name: str, file: Path, disk_format: str | None, max_size: int | None, wait: bool, timeout: float,
           as_json: bool) -> None:  # fmt: skip
    """Upload an image. Called again after it was cut off, it goes on where it was.

    \b
    Example:
      recvirt-cloud image upload mine disk.qcow2
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cloud = api()
    body = {**_image_body(name, disk_format, digest, max_size), "upload_bytes": file.stat().st_size}
    made = cloud.call("POST", cloud.below("images"), body)
    _send(cloud, name, file, int(made["uploaded_bytes"]), as_json)
    _post(f"images/{name}/complete", {}, wait, timeout, as_json)


def _send(cloud: Api, name: str, file: Path, there: int, as_json: bool) -> None:
    total = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(there)
        while piece := stream.read(_PIECE_BYTES):
            there = cloud.call("PUT", cloud.below(f"images/{name}/content"), data=piece, offset=there)["there"]
            if not as_json:
                click.echo(f"upload {name}: {100 * there // total} %", err=True)


@image.command("show")
@click.argument("name")
@json_option
def image_show(name: str, as_json: bool) -> None:
    """Show an image.

    \b
    Example:
      recvirt-cloud image show tiny
    """
    fields(api().call("GET", api().below(f"images/{name}")), as_json=as_json)


@image.command("delete")
@click.argument("name")
@wait_option
@timeout_option
@json_option
def image_delete(name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Delete an image that no instance is a copy of.

    \b
    Example:
      recvirt-cloud image delete mine
    """
    follow(api().call("DELETE", api().below(f"images/{name}")), wait, timeout, as_json)


image.add_command(
    listing(
        "list", "images", "List the images.",
        (("NAME", "name"), ("STATE", "state"), ("PUBLIC", "public"), ("SIZE", "virtual_bytes")), program="image list",
    )
)  # fmt: skip


@click.command()
@click.argument("instance")
@click.argument("image_name", metavar="IMAGE")
@wait_option
@timeout_option
@json_option
def export(instance: str, image_name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Make an image of an instance's root disk. It has to be off or suspended.

    \b
    Example:
      recvirt-cloud export web web-golden
    """
    _post(f"instances/{instance}/export", {"image": image_name}, wait, timeout, as_json)


@click.command()
@click.argument("instance")
@click.argument("name")
@wait_option
@timeout_option
@json_option
def clone(instance: str, name: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Make another instance with a copy of one's root disk. The first has to be off, and so is the clone.

    \b
    Example:
      recvirt-cloud clone web web-two
    """
    _post(f"instances/{instance}/clone", {"name": name}, wait, timeout, as_json)


STORAGE_COMMANDS: tuple[click.Command, ...] = (volume, image, export, clone)
