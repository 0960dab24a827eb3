"""``recvirt publish``, ``published`` and ``prune``: images at clouds, registries and mirrors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recvirt.cli import App, pass_app
from recvirt.cli.completion import complete_target

if TYPE_CHECKING:
    from recvirt.publish.engine import Options

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False, readable=True)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_config_option = click.option(
    "--config", type=_FILE, help="The file that tells about the targets.  [default: publish.yaml, if it is there]"
)
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TARGET.KEY=VALUE",
    help="Override a value of the configuration, as aws.region=eu-west-1. May be repeated.",
)  # fmt: skip
_state_option = click.option(
    "--state-dir", type=_FOLDER, envvar="RECVIRT_STATE_DIR",
    help="Where a run notes what it has sent.  [default: $XDG_STATE_HOME/recvirt/publish]",
)  # fmt: skip
_receipts_option = click.option("--receipts", type=_FOLDER, help="Where receipts are kept.  [default: build/receipts]")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "recvirt/publish"


def _options(
    app: App, config: Path | None, overrides: tuple[str, ...], state_dir: Path | None, receipts: Path | None = None
) -> Options:
    from recvirt.publish.engine import Options

    return Options(
        config=config, overrides=overrides, state_dir=(state_dir or _state_dir()).absolute(),
        receipts=receipts or app.build_dir.absolute() / "receipts",
    )  # fmt: skip


def _image(app: App, image: str) -> Path:
    """The file that IMAGE names, or the image of the profile that it names."""
    from recvirt.products import built_image

    path = Path(image)
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return path.resolve()
    return built_image(app.load(image).model.name, app.build_dir.absolute()).resolve()


@click.command(short_help="Take an accepted image to clouds, registries and mirrors.")
@click.argument("targets", nargs=-1, required=True, metavar="PROVIDER...")
@click.argument("image", metavar="IMAGE", shell_complete=complete_target)
@_config_option
@_set_option
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be converted, sent, created and retired.")
@click.option("--workers", type=click.IntRange(1, 64), help="Parts that are sent at once.  [default: 8]")
@click.option("--report", type=_FILE, help="The acceptance report.  [default: the one beside the image]")
@click.option("--unaccepted", is_flag=True, help="Publish an image that proved nothing; the receipt says so.")
@click.option("--force", is_flag=True, help="Also where nesting is known not to work.")
@_receipts_option
@_state_option
@_json_option
@pass_app
def publish(
    app: App,
    targets: tuple[str, ...],
    image: str,
    config: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    workers: int | None,
    report: Path | None,
    unaccepted: bool,
    force: bool,
    receipts: Path | None,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Take an IMAGE (a file, or a profile that was built) to one or more PROVIDERs, or to targets of publish.yaml.

    The image must have passed "recvirt test". What is there already is compared and left alone; a run that was killed
    is gone on with. Each target gets a signed receipt, and a recipe that starts the image with nesting on.

    \b
    Examples:
      recvirt publish mirror default --set mirror.path=/srv/images
      recvirt publish aws gcp build/default/disk.qcow2 --dry-run
      recvirt publish oci-registry default --set oci-registry.repository=registry.example/recvirt
    """
    from dataclasses import replace

    from recvirt.publish import engine

    path = _image(app, image)
    options = replace(
        _options(app, config, overrides, state_dir, receipts),
        report=report, unaccepted=unaccepted, workers=workers, force=force,
    )  # fmt: skip
    engine.open_targets(targets, None, options)  # a fault in the configuration is told before the image is hashed
    providers = engine.open_targets(targets, engine.judge(path, options), options)
    plans = engine.make_plans(providers)
    if dry_run:
        told = json.dumps([plan.as_json() for plan in plans], indent=1)
        click.echo(told if as_json else engine.as_table(plans))
        return
    if not as_json:
        click.echo(engine.as_table(plans), err=True)
    done = engine.publish(providers, options)
    if as_json:
        click.echo(json.dumps([item.as_json() for item in done], indent=1))
        return
    for item in done:
        click.echo(str(item.receipt.path if item.receipt else item.recipe / "README.md"))


@click.command(short_help="List what was published, and verify its receipts.")
@click.argument("image", required=False, type=_FILE)
@click.option("--verify", is_flag=True, help="Check form, signature and name of each receipt.")
@_config_option
@_set_option
@_receipts_option
@_state_option
@_json_option
@pass_app
def published(
    app: App,
    image: Path | None,
    verify: bool,
    config: Path | None,
    overrides: tuple[str, ...],
    receipts: Path | None,
    state_dir: Path | None,
    as_json: bool,
) -> int:
    """List the receipts of what was published; with an IMAGE file, only those that are of exactly this file.

    Ends with status 11 when --verify finds one that was changed, or that nobody who may sign has signed.

    \b
    Examples:
      recvirt published
      recvirt published --verify
      recvirt published --verify build/default/disk.qcow2 --json
    """
    from recvirt.publish.listing import as_text, list_receipts

    options = _options(app, config, overrides, state_dir, receipts)
    found = list_receipts(options, image=image, verify=verify)
    click.echo(json.dumps([item.as_json() for item in found], indent=1) if as_json else as_text(found))
    from recvirt.errors import VerificationError

    return VerificationError.exit_code if any(item.problem for item in found) else 0


@click.command(short_help="Delete old images of ours at a provider.")
@click.argument("target", metavar="PROVIDER")
@click.option("--keep", type=click.IntRange(1), default=3, show_default=True, help="The newest N of each profile stay.")
@click.option(
    "--older-than", "days", type=click.FloatRange(min=0), default=30.0, show_default=True,
    help="Younger ones than so many DAYS stay.",
)  # fmt: skip
@_config_option
@_set_option
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be deleted.")
@_state_option
@_json_option
@pass_app
def prune(
    app: App,
    target: str,
    keep: int,
    days: float,
    config: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Delete old images at a PROVIDER: only what recvirt has tagged, never the newest of a profile, never one in use.

    \b
    Examples:
      recvirt prune aws --keep 5 --older-than 90 --dry-run
      recvirt prune openstack --keep 2
    """
    from recvirt.publish import engine

    (provider,) = engine.open_targets([target], None, _options(app, config, overrides, state_dir))
    chosen = engine.prune(provider, keep=keep, older_than_days=days, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps([{"id": r.identity, "name": r.name, "created": r.created.isoformat()} for r in chosen]))
        return
    for remote in chosen:
        click.echo(f"{remote.created:%Y-%m-%d %H:%M}  {remote.name}  {remote.identity}")
    click.echo(f"{len(chosen)} {'would be deleted' if dry_run else 'deleted'}")
