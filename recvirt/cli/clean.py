"""``recvirt clean``: bound the cache by age and size."""

from __future__ import annotations

import json

import click

from recvirt.cli import App, pass_app
from recvirt.ui import format_bytes


@click.command(short_help="Bound the cache, clear up after killed builds.")
@click.option("--older-than", "days", type=click.FloatRange(min=0), help="Remove what was not used for so many DAYS.")
@click.option("--max-size", metavar="SIZE", help="Then remove the least recently used until SIZE (as 20G) is kept.")
@click.option("--all", "everything", is_flag=True, help="Remove the whole cache: outputs, packages, sources, ccache.")
@click.option("--tools", is_flag=True, help="Remove the tools roots, so that the next build makes them anew.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@pass_app
def clean(
    app: App,
    days: float | None,
    max_size: str | None,
    everything: bool,
    tools: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove old outputs from the cache, and what killed builds left. Never touches build/ or a build under way.

    Without an option: only what killed builds left, and outputs not used for 30 days.

    \b
    Examples:
      recvirt clean --dry-run
      recvirt clean --older-than 7 --max-size 20G
      recvirt clean --all
    """
    from recvirt.cleaning import clean_cache
    from recvirt.model import parse_size

    try:
        limit = parse_size(max_size) if max_size else None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-size") from None
    if days is None and limit is None and not everything and not tools:
        days = 30.0
    removed = clean_cache(app.store, days=days, max_bytes=limit, everything=everything, tools=tools, dry_run=dry_run)
    if as_json:
        click.echo(
            json.dumps([{"path": str(item.path), "bytes": item.size_bytes, "why": item.why} for item in removed])
        )
        return
    for item in removed:
        click.echo(f"{format_bytes(item.size_bytes):>10}  {item.path}  ({item.why})")
    verb = "would be freed" if dry_run else "freed"
    click.echo(f"{format_bytes(sum(item.size_bytes for item in removed))} {verb}")
