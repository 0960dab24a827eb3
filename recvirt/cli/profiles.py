"""``recvirt profiles`` and ``recvirt profile show|schema|keys|new``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from recvirt.cli import App, pass_app
from recvirt.cli.completion import complete_target


@click.command(short_help="List the profiles.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@pass_app
def profiles(app: App, as_json: bool) -> None:
    """List the profiles that can be called by name: the shipped ones, and those in ./profiles (which win).

    \b
    Examples:
      recvirt profiles
      recvirt profiles --json
    """
    from recvirt.errors import ConfigError
    from recvirt.profile import profile_names

    rows: list[dict[str, Any]] = []
    for name, path in profile_names().items():
        row: dict[str, Any] = {"name": name, "file": str(path)}
        try:
            row["description"] = app.load(str(path)).model.description
        except ConfigError as error:
            # One broken file must not hide the others.
            row["problems"] = [str(problem) for problem in error.problems] or [error.message]
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        faults = row.get("problems")
        what = row["description"] if not faults else f"(faulty: recvirt profile show {row['name']})"
        click.echo(f"{row['name']:<{width}}  {what}".rstrip())


@click.group(short_help="Show profiles and their keys, start new ones.")
def profile() -> None:
    """Look at profiles, and start new ones.

    \b
    Examples:
      recvirt profile show default
      recvirt profile schema > profile.schema.json
      recvirt profile new mine
    """


@profile.command(short_help="Print a profile as merged, with origins.")
@click.argument("name", default="default", shell_complete=complete_target)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a value, as image.size=8G; root.packages+=vim appends, root.packages-=vim removes. May be repeated.",
)  # fmt: skip
@click.option("--no-defaults", is_flag=True, help="Leave out what no profile wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print the values, their origins and the files as JSON.")
@pass_app
def show(app: App, name: str, overrides: tuple[str, ...], no_defaults: bool, as_json: bool) -> None:
    """Print the profile NAME (a name or a YAML file) as merged, with the file and line each value comes from.

    The output is a profile itself: it can be built, and gives the same image.

    \b
    Examples:
      recvirt profile show default
      recvirt profile show ./mine.yaml --set image.size=8G --no-defaults
      recvirt profile show minimal --json | jq .origins
    """
    from recvirt.profile.show import as_yaml

    loaded = app.load(name, overrides)
    if as_json:
        origins = {path: {"file": file, "line": line} for path, (file, line) in loaded.origins.items()}
        files = [str(path) for path in loaded.files]
        click.echo(json.dumps({"profile": loaded.data, "origins": origins, "files": files}, indent=1))
        return
    click.echo(as_yaml(loaded, defaults=not no_defaults), nl=False)


@profile.command(short_help="Print the JSON schema for editors.")
def schema() -> None:
    """Print the JSON schema of a profile file, for editors and checkers.

    Save it and put this line at the top of a profile: "# yaml-language-server: $schema=profile.schema.json"

    \b
    Example:
      recvirt profile schema > profile.schema.json
    """
    from recvirt.profile import file_schema

    click.echo(json.dumps(file_schema(), indent=1))


@profile.command(short_help="Print every key of a profile.")
def keys() -> None:
    """Print every key of a profile with its type, default and meaning (Markdown tables, as in the manual).

    \b
    Example:
      recvirt profile keys | less
    """
    from recvirt.profile.reference import as_markdown

    click.echo(as_markdown(), nl=False)


@profile.command(short_help="Write a commented starter profile.")
@click.argument("name")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it.  [default: profiles/NAME.yaml]",
)  # fmt: skip
@click.option("--extends", "parent", default="default", show_default=True, help="The profile to start from.")
@pass_app
def new(app: App, name: str, output: Path | None, parent: str) -> None:
    """Write a commented starter file for the profile NAME. An existing file is never overwritten.

    \b
    Examples:
      recvirt profile new mine
      recvirt profile new small --extends minimal -o small.yaml
    """
    from recvirt.profile.starter import write_starter

    app.load(parent)
    path = write_starter(name, parent, output or Path("profiles") / f"{name}.yaml")
    click.echo(f"{path}: edit it, then: recvirt build {name if output is None else path}")
