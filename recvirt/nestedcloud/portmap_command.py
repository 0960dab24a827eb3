"""``recvirt-cloud worker forwards``: what systemd starts, as root, when a worker wants other ports forwarded."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from recvirt.nestedcloud import portmap
from recvirt.nestedcloud.statuses import ExitStatus


@click.command("forwards")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), default=portmap.RUN_DIR,
              show_default=True, help="The worker's folder in /run.")  # fmt: skip
@click.option("--applied", type=click.Path(path_type=Path, dir_okay=False), default=portmap.APPLIED_PATH,
              show_default=True, help="The file that says what became of it.")  # fmt: skip
def forwards(run_dir: Path, applied: Path) -> None:
    """Load the rules that lead ports to instances, as the worker wants them. Needs root; again changes nothing.

    \b
    Example:
      sudo recvirt-cloud worker forwards
    """
    try:
        state = portmap.apply(run_dir, applied)
    except (portmap.PortmapError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        click.echo("hint: what was forwarded before still is; nft list table ip recvirt_forwards", err=True)
        sys.exit(ExitStatus.CONFIG)
    for instance, item in sorted(state.instances.items()):
        if item.refused:
            click.echo(f"{instance}: {item.refused}", err=True)
