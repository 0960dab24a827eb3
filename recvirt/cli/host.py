"""``recvirt doctor``."""

from __future__ import annotations

import json

import click

from recvirt.cli import App, pass_app
from recvirt.errors import MissingToolError
from recvirt.sandbox import ToolsRoot

_MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}


@click.command(short_help="Check whether this machine is ready.")
@click.option("--network", is_flag=True, help="Also ask Debian's archive, as a build would (a few seconds).")
@click.option("--tools", "make_tools", is_flag=True, help="Make the tools root if it is missing (a download, minutes).")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@pass_app
def doctor(app: App, network: bool, make_tools: bool, as_json: bool) -> int:
    """Check whether this machine can build and test images, and say what to install or change.

    The accelerator is found by running a tiny guest, once the tools root (which brings QEMU) is there.
    The exit status is 0 when a build can start, 4 when something is missing.

    \b
    Examples:
      recvirt doctor
      recvirt doctor --network --tools
      recvirt doctor --json | jq -r .install
    """
    from recvirt import doctor as host

    checks = host.examine(app.cache_dir, tools=_tools(app, make_tools), network=network)
    facts = host.as_json(checks)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{_MARKS[check.status]}  {check.name:<{width}}  {check.found}")
            if check.fix and check.status != "ok":
                click.echo(f"{'':<{width + 8}}{check.fix}")
        click.echo(f"\ninstall: {facts['install']}" if facts["install"] else "")
        click.echo("ready to build" if facts["ready"] else "not ready: see FAIL above")
    return 0 if facts["ready"] else MissingToolError.exit_code


def _tools(app: App, make: bool) -> ToolsRoot | None:
    """The tools root if it is in the cache; made first if that is asked for."""
    if make:
        return app.tools()
    from recvirt.store import key_of
    from recvirt.toolsroot import REVISION, tools_inputs

    output = app.store.get("tools", key_of("tools", REVISION, tools_inputs(mirror=app.tools_mirror)))
    return ToolsRoot(output.directory) if output else None
