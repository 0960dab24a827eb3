"""The verbs on the cloud as a whole: log in, look around, follow what happens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from recvirt.nestedcloud.client.api import Access, Api, ApiError, access_path, save_access
from recvirt.nestedcloud.client.commands import api, json_option
from recvirt.nestedcloud.client.output import fields, human_bytes
from recvirt.nestedcloud.console import is_safe_url

_FOLLOW_PAUSE_SECONDS = 2.0


@click.command()
@click.argument("url")
@click.option("--project", default="default", show_default=True, help="The project to work in.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, resolve_path=True), help="The cloud's certificate.")
def login(url: str, project: str, ca: str | None) -> None:
    """Keep the access to a cloud: asks for a token, checks it, and writes the access file.

    \b
    Examples:
      recvirt-cloud login https://cloud.example.org
      recvirt-cloud login https://cloud.example.org --project shop < token-file
    """
    if not is_safe_url(url):
        raise click.ClickException("want https://...: a token is not sent where others can read it")
    token = str(click.prompt("Token", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise click.ClickException("that is no token; it begins with rvc_")
    access = Access(url.rstrip("/"), token, project, ca or "")
    who = Api(access).call("GET", "whoami")
    if project not in who["projects"]:
        names = ", ".join(who["projects"]) or "none yet: ask an administrator"
        click.echo(f"note: {who['name']} is in no project called {project}; --project takes another: {names}", err=True)
    path = access_path()
    save_access(access, path)
    click.echo(f"logged in to {access.url} as {who['name']}; {path} has the token")


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Show who you are to the cloud, and what you are in which project.

    \b
    Example:
      recvirt-cloud whoami
    """
    fields(api().call("GET", "whoami"), as_json=as_json)


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show the cloud as a whole: health, capacity, workers, operations. Exits with 1 when something is wrong.

    \b
    Example:
      recvirt-cloud status
    """
    found = api().call("GET", "status")
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(f"recvirt {found['version']}: {'healthy' if found['healthy'] else 'NOT HEALTHY'}")
        for name, text in found["health"].items():
            click.echo(f"  {name.ljust(11)}{text}")
        workers = found["workers"]
        click.echo(f"workers      {workers['up']} of {workers['total']} up, {workers['draining']} being emptied")
        for name, values in found["capacity"].items():
            shown = {part: human_bytes(value) if name.endswith("_bytes") else value for part, value in values.items()}
            label = name.removesuffix("_bytes").ljust(13)
            click.echo(f"{label}{shown['free']} free, {shown['promised']} promised, {shown['total']} in all")
        for name in ("instances", "operations"):
            words = ", ".join(f"{count} {state}" for state, count in found[name].items()) or "none"
            click.echo(f"{name.ljust(13)}{words}")
        click.echo(f"schedules    {found['schedules']}")
    if not found["healthy"]:
        raise SystemExit(1)


def _line(event: Mapping[str, Any]) -> str:
    words = " ".join(f"{name}={value}" for name, value in event["data"].items() if value not in (None, ""))
    at = event["at"][:19].replace("T", " ")
    # What others have named must not move the terminal's cursor.
    return "".join(
        char if char.isprintable() else "?" for char in f"{at}  {event['kind']}  {event['user'] or '-'}  {words}"
    )


def follow(cloud: Api, last: str) -> Iterator[dict[str, Any]]:
    """The project's events from ``last`` on, for ever: a connection that ends is made again where it ended."""
    trouble = False
    while True:
        try:
            for number, event in cloud.stream(cloud.below("events/stream"), last):
                trouble, last = False, number
                yield event
        except ApiError as error:
            if error.kind != "unreachable":
                raise
            if not trouble:
                click.echo(f"note: {error.message}; trying again", err=True)
            trouble = True
            time.sleep(_FOLLOW_PAUSE_SECONDS)


@click.command()
@click.option("--follow", "-f", "followed", is_flag=True, help="Go on, as they happen.")
@click.option("--after", default=0, help="The id of the event to go on from.")
@json_option
def events(followed: bool, after: int, as_json: bool) -> None:
    """Show what happened in the project.

    \b
    Examples:
      recvirt-cloud events
      recvirt-cloud events --follow
    """
    cloud = api()
    for event in cloud.pages(cloud.below("events"), after=after):
        after = event["id"]
        click.echo(json.dumps(event) if as_json else _line(event))
    if followed:
        for event in follow(cloud, str(after)):
            click.echo(json.dumps(event) if as_json else _line(event))


@click.command()
@click.option("--user", help="Only what this user did.")
@click.option("--kind", help="Only kinds that begin so, as token.")
@click.option("--in-project", "project", help="Only in this project.")
@click.option("--limit", default=100, show_default=True, help="As many, newest first.")
@json_option
def audit(limit: int, as_json: bool, **chosen: str | None) -> None:
    """Show who did what (administrators).

    \b
    Example:
      recvirt-cloud audit --kind token --user ada
    """
    words: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    found = api().call("GET", "audit", limit=limit, **words)["results"]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for event in found:
            click.echo(_line(event))


SIGHT_COMMANDS = (login, whoami, status, events, audit)
