"""``recvirt build`` and ``recvirt plan``."""

from __future__ import annotations

import json
import time

import click

from recvirt.cli import App, pass_app
from recvirt.cli.completion import complete_target
from recvirt.ui import format_bytes, format_seconds, reporter

_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a value of the profile, as image.size=8G. The value is YAML. May be repeated.",
)  # fmt: skip
_until_option = click.option("--until", metavar="STAGE", help="Stop after this stage (and build only what it needs).")
_offline_option = click.option("--offline", is_flag=True, help="Use only what the cache holds; no network.")


@click.command(short_help="Say what a build would run and reuse, and why.")
@click.argument("profile", default="default", shell_complete=complete_target)
@_set_option
@_until_option
@_offline_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@pass_app
def plan(app: App, profile: str, overrides: tuple[str, ...], until: str | None, offline: bool, as_json: bool) -> None:
    """Say what a build of PROFILE would run, what it would reuse, and why not.

    The tools root, whose versions are part of the answer, is made first if it is not there.

    \b
    Examples:
      recvirt plan
      recvirt plan minimal --set image.size=8G --json
    """
    from recvirt import pipeline

    loaded = app.load(profile, overrides)
    pipeline.stages_for(loaded.model, until)  # a wrong name is told before the tools are made
    planned = pipeline.plan(loaded.model, app.store, app.context(offline=offline), until=until)
    if as_json:
        click.echo(json.dumps([item.as_json() for item in planned], indent=1))
        return
    for item in planned:
        click.echo(f"{item.stage.name:<14} {'reuse' if item.output else 'BUILD'}  {item.key[:12]}")
        for reason in item.reasons:
            click.echo(f"{'':<14}   because {reason}")


@click.command(short_help="Build an image from a profile.")
@click.argument("profile", default="default", shell_complete=complete_target)
@_set_option
@_until_option
@_offline_option
@click.option("-j", "--jobs", type=click.IntRange(1, 1024), help="Compile so many files at once.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
@pass_app
def build(
    app: App,
    profile: str,
    overrides: tuple[str, ...],
    until: str | None,
    offline: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build PROFILE (a name or a YAML file; default: "default") into build/<profile>/.

    What did not change since an earlier build is reused. A build that was interrupted carries on from its whole stages.

    \b
    Examples:
      recvirt build
      recvirt build minimal --set image.formats=[qcow2,vmdk]
      recvirt build ./my-profile.yaml --until kernel_build --jobs 4
    """
    from recvirt import pipeline

    started = time.monotonic()
    loaded = app.load(profile, overrides)
    pipeline.stages_for(loaded.model, until)
    context = app.context(jobs=jobs, offline=offline)
    planned = pipeline.plan(loaded.model, app.store, context, until=until)
    builder = pipeline.Builder(loaded.model, app.store, context, app.build_dir.absolute(), keep_failed=app.debug)
    outputs = builder.run(planned)
    products = builder.products
    if as_json:
        stages = [{**item.as_json(), "directory": str(outputs[item.stage.name].directory)} for item in planned]
        click.echo(json.dumps({"profile": loaded.model.name, "stages": stages, "products": [str(p) for p in products]}))
        return
    seconds = format_seconds(time.monotonic() - started)
    done = f"built {', '.join(builder.built)}" if builder.built else "nothing changed"
    reporter.info(f"{loaded.model.name}: {done} ({seconds})")
    for path in products:
        click.echo(f"{format_bytes(path.stat().st_size):>10}  {path}")
