"""``recvirt inspect``, ``recvirt diff`` and ``recvirt sbom``: what image files hold, from the files alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from recvirt.cli import App, pass_app

_IMAGE = click.Path(path_type=Path, exists=True, dir_okay=False, readable=True)


@click.command(short_help="Tell what an image file holds.")
@click.argument("image", type=_IMAGE)
@click.option("--all", "all_packages", is_flag=True, help="List every package, not only the largest.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that was found as JSON.")
@pass_app
def inspect(app: App, image: Path, all_packages: bool, as_json: bool) -> None:
    """Tell what an image FILE holds: partitions, boot methods, kernels, provenance, packages by size.

    Reads qcow2, raw, fixed VHD, VMDK and OVA. The image is not booted, not mounted and not written to.

    \b
    Examples:
      recvirt inspect build/default/disk.qcow2
      recvirt inspect --json disk.vhd | jq -r '.boot.uefi.present'
    """
    from recvirt.imagefile.contents import open_image
    from recvirt.imagefile.inspect import as_text, findings

    with open_image(image, app.tools()) as contents:
        found = findings(contents)
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found, all_packages=all_packages))


@click.command(short_help="Tell what differs between two images.")
@click.argument("old", type=_IMAGE)
@click.argument("new", type=_IMAGE)
@click.option("--json", "as_json", is_flag=True, help="Print all differences as JSON.")
@click.option("--exit-code", is_flag=True, help="End with status 1 when something differs, as git diff does.")
@pass_app
def diff(app: App, old: Path, new: Path, as_json: bool, exit_code: bool) -> int:
    """Tell what changed from image OLD to image NEW: packages, kernel configuration, sizes of files.

    \b
    Examples:
      recvirt diff yesterday.qcow2 build/default/disk.qcow2
      recvirt diff --json a.qcow2 b.qcow2 | jq '.packages.changed'
    """
    from recvirt.imagefile.contents import open_image
    from recvirt.imagefile.diff import as_text, compare, is_equal

    tools = app.tools()
    with open_image(old, tools) as before, open_image(new, tools) as after:
        found = compare(before, after)
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found))
    return int(exit_code and not is_equal(found))


@click.command(short_help="Print an image's bill of materials (SPDX).")
@click.argument("image", type=_IMAGE)
@click.option("--json", "as_json", is_flag=True, help="Accepted for evenness: an SPDX document is always JSON.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to a file.")
@pass_app
def sbom(app: App, image: Path, as_json: bool, output: Path | None) -> None:
    """Print a software bill of materials (SPDX 2.3, JSON) of what an image FILE holds now.

    \b
    Examples:
      recvirt sbom build/default/disk.qcow2 > sbom.spdx.json
      recvirt sbom -o sbom.spdx.json disk.vmdk
    """
    from recvirt.disk.facts import as_json as to_json
    from recvirt.imagefile.contents import open_image
    from recvirt.imagefile.inspect import bill_of_materials

    del as_json
    with open_image(image, app.tools()) as contents:
        text = to_json(bill_of_materials(contents))
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text)
