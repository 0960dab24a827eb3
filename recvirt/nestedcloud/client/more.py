"""The verbs on time, people, and the cloud as a whole. Thin, as ``commands``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click

from recvirt.nestedcloud.client.api import Access, Api, ApiError, access_path, save_access
from recvirt.nestedcloud.client.commands import SIZE, api
from recvirt.nestedcloud.client.output import cell, fields, human_bytes, table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FOLLOW_PAUSE_SECONDS = 2.0


class Time(click.ParamType[str]):
    """A date and a time, as '2027-01-31 08:00', with an offset or in --zone."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As the API takes it."""
        try:
            return datetime.fromisoformat(str(value)).isoformat()
        except ValueError:
            self.fail(
                f"{value!r} is no time: '2027-01-31 08:00', or with an offset '2027-01-31T08:00+01:00'", param, ctx
            )


TIME = Time()


def _check_zone(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise click.BadParameter(f"there is no time zone called {value!r}") from None
    return value


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
    if not url.startswith(("https://", "http://127.0.0.1", "http://localhost", "http://[::1]")):
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


@click.group()
def schedule() -> None:
    """Operations at future times, in windows, and again and again."""


_SCHEDULES = (
    ("NAME", "name"), ("KIND", "kind"), ("INSTANCE", "instance"), ("NEXT", "next_at"), ("RULE", "rule"),
    ("ZONE", "zone"), ("PAUSED", "paused"),
)  # fmt: skip


@schedule.command("list")
@json_option
def schedule_list(as_json: bool) -> None:
    """List the schedules.

    \b
    Example:
      recvirt-cloud schedule list
    """
    table(api().pages(api().below("schedules")), _SCHEDULES, as_json=as_json)


def _settings(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r}: want NAME=VALUE, as vcpus=4")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@schedule.command("add")
@click.argument("name")
@click.argument("kind")
@click.argument("instance", required=False)
@click.option("--at", "begins", type=TIME, required=True, help="When, as '2027-01-31 08:00'.")
@click.option(
    "--to", "ends", type=TIME, help="The end of a window: then it is undone (start: stopped, launch: deleted)."
)
@click.option("--rule", default="", help="To come again: an iCalendar RRULE, as FREQ=WEEKLY;BYDAY=MO,TU.")
@click.option("--zone", default="UTC", show_default=True, callback=_check_zone, help="Of the times and the rule.")
@click.option("--grace", "grace_seconds", type=int, default=600, show_default=True, help="Seconds it is done late.")
@click.option("--set", "args", multiple=True, callback=_settings, help="NAME=VALUE of the operation, as vcpus=4.")
@json_option
def schedule_add(name: str, as_json: bool, **body: Any) -> None:
    """Do something at a time: KIND is launch, start, stop, rescale, snapshot, ...

    \b
    Examples:
      recvirt-cloud schedule add office start web --at "2027-01-04 08:00" --to "2027-01-04 18:00" \\
          --rule "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR" --zone Europe/Budapest
      recvirt-cloud schedule add more rescale web --at "2027-01-04 08:00" --set vcpus=4
      recvirt-cloud schedule add batch launch --at "2027-01-04 22:00" --set name=batch --set image=tiny
    """
    given = {key: value for key, value in body.items() if value is not None}
    made = api().call("POST", api().below("schedules"), {"name": name, **given})
    if as_json:
        fields(made, as_json=True)
    else:
        click.echo(f"{name} is due {made['next_at']}")


@schedule.command("show")
@click.argument("name")
@json_option
def schedule_show(name: str, as_json: bool) -> None:
    """Show a schedule and what became of it so far.

    \b
    Example:
      recvirt-cloud schedule show office
    """
    found = api().call("GET", api().below(f"schedules/{name}"))
    firings = api().call("GET", api().below(f"schedules/{name}/firings"), limit=20)["results"]
    if as_json:
        fields({**found, "firings": firings}, as_json=True)
        return
    fields(found, as_json=False)
    click.echo()
    table(firings, (("AT", "at"), ("END", "is_end"), ("OUTCOME", "outcome"), ("LEFT OUT", "left_out"),
                    ("MESSAGE", "message")), as_json=False)  # fmt: skip


def _simple(group: click.Group, name: str, text: str, path: str, method: str, said: str) -> None:
    def run(name: str) -> None:
        api().call(method, api().below(path.format(name)))
        click.echo(f"{name} {said}")

    example = f"\n\n\b\nExample:\n  recvirt-cloud {group.name} {name} office"
    group.command(name, help=text + example)(click.argument("name")(run))


_simple(schedule, "pause", "Let nothing be due until it is resumed.", "schedules/{}/pause", "POST", "is paused")
_simple(schedule, "resume", "Go on; what was due meanwhile is left out.", "schedules/{}/resume", "POST", "goes on")
_simple(schedule, "remove", "Forget a schedule, and the room kept for it.", "schedules/{}", "DELETE", "is removed")


@click.group()
def reservation() -> None:
    """Room for an instance, kept for a time."""


@reservation.command("list")
@json_option
def reservation_list(as_json: bool) -> None:
    """List the room that is kept.

    \b
    Example:
      recvirt-cloud reservation list
    """
    columns = (("UUID", "uuid"), ("FROM", "begins"), ("TO", "ends"), ("VCPUS", "vcpus"), ("MEMORY", "memory_bytes"),
               ("DISK", "disk_bytes"), ("WORKER", "worker"), ("SCHEDULE", "schedule"))  # fmt: skip
    table(api().pages(api().below("reservations")), columns, as_json=as_json)


@reservation.command("add")
@click.option("--from", "begins", type=TIME, required=True, help="As '2027-01-31 08:00'.")
@click.option("--to", "ends", type=TIME, help="[default: until it is used]")
@click.option("--vcpus", type=int, required=True, help="The most that the instance may grow to.")
@click.option("--memory", "memory_bytes", type=SIZE, required=True, help="The same, as 2G.")
@click.option("--disk", "disk_bytes", type=SIZE, required=True, help="As 10G.")
@click.option("--zone", default="UTC", show_default=True, callback=_check_zone, help="Of the times.")
@json_option
def reservation_add(as_json: bool, **body: Any) -> None:
    """Keep room. 'recvirt-cloud launch --reservation UUID' then uses it, and is deleted when it ends.

    \b
    Example:
      recvirt-cloud reservation add --from "2027-01-04 08:00" --to "2027-01-04 18:00" --vcpus 4 --memory 8G --disk 20G
    """
    given = {key: value for key, value in body.items() if value is not None}
    made = api().call("POST", api().below("reservations"), given)
    if as_json:
        fields(made, as_json=True)
    else:
        click.echo(made["uuid"])


_simple(reservation, "remove", "Give the room back.", "reservations/{}", "DELETE", "is given back")


@click.group()
def project() -> None:
    """Projects, their quotas and their members."""


_quotas = (
    click.option("--instances", "instances_max", type=int),
    click.option("--vcpus", "vcpus_max", type=int),
    click.option("--memory", "memory_bytes_max", type=SIZE, help="As 64G."),
    click.option("--disk", "disk_bytes_max", type=SIZE, help="As 1T."),
)
_role = click.option(
    "--role", type=click.Choice(["reader", "operator", "admin"]), default="operator", show_default=True
)


def _with_quotas(function: Any) -> Any:
    for option in reversed(_quotas):
        function = option(function)
    return function


def _quota_body(quotas: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in quotas.items() if value is not None}


@project.command("list")
@json_option
def project_list(as_json: bool) -> None:
    """List your projects with their quotas.

    \b
    Example:
      recvirt-cloud project list
    """
    columns = (("NAME", "name"), ("INSTANCES", "instances_max"), ("VCPUS", "vcpus_max"), ("MEMORY", "memory_bytes_max"),
               ("DISK", "disk_bytes_max"))  # fmt: skip
    rows = list(api().pages("projects"))
    if not as_json:
        for row in rows:
            row |= {name: human_bytes(row[name]) for name in ("memory_bytes_max", "disk_bytes_max")}
    table(rows, columns, as_json=as_json)


@project.command("create")
@click.argument("name")
@_with_quotas
def project_create(name: str, **quotas: int | None) -> None:
    """Make a project (administrators).

    \b
    Example:
      recvirt-cloud project create shop --vcpus 16 --memory 64G
    """
    api().call("POST", "projects", {"name": name, **_quota_body(quotas)})
    click.echo(f"{name} is made")


@project.command("set")
@click.argument("name")
@_with_quotas
def project_set(name: str, **quotas: int | None) -> None:
    """Set a project's quotas (administrators).

    \b
    Example:
      recvirt-cloud project set shop --instances 50
    """
    api().call("PATCH", f"projects/{name}", _quota_body(quotas))
    click.echo(f"{name} is changed")


@project.group("member")
def member() -> None:
    """Who is in the project."""


@member.command("list")
@json_option
def member_list(as_json: bool) -> None:
    """List the members.

    \b
    Example:
      recvirt-cloud --project shop project member list
    """
    table(api().pages(api().below("members")), (("USER", "user"), ("ROLE", "role")), as_json=as_json)


@member.command("add")
@click.argument("user")
@_role
def member_add(user: str, role: str) -> None:
    """Take a user into the project (its admins).

    \b
    Example:
      recvirt-cloud --project shop project member add bob --role admin
    """
    api().call("POST", api().below("members"), {"user": user, "role": role})
    click.echo(f"{user} is {role} in {api().access.project}")


@member.command("set")
@click.argument("user")
@_role
def member_set(user: str, role: str) -> None:
    """Give a member another role (its admins).

    \b
    Example:
      recvirt-cloud --project shop project member set bob --role reader
    """
    api().call("PATCH", api().below(f"members/{user}"), {"role": role})
    click.echo(f"{user} is {role} in {api().access.project}")


_simple(member, "remove", "Let a member go (its admins).", "members/{}", "DELETE", "is no member any more")


@click.group()
def user() -> None:
    """The users of the cloud (administrators)."""


@user.command("list")
@json_option
def user_list(as_json: bool) -> None:
    """List the users.

    \b
    Example:
      recvirt-cloud user list
    """
    table(api().pages("users"), (("NAME", "name"), ("ACTIVE", "active"), ("ADMINISTRATOR", "administrator")),
          as_json=as_json)  # fmt: skip


@user.command("create")
@click.argument("name")
@click.option("--administrator", is_flag=True, help="May do everything everywhere.")
def user_create(name: str, administrator: bool) -> None:
    """Make a user; 'token create --user NAME' then lets them in.

    \b
    Example:
      recvirt-cloud user create bob
    """
    api().call("POST", "users", {"name": name, "administrator": administrator})
    click.echo(f"{name} is made; recvirt-cloud token create laptop --user {name}")


def _lock(name: str, active: bool, text: str) -> None:
    def run(user: str) -> None:
        api().call("PATCH", f"users/{user}", {"active": active})
        click.echo(f"{user} is {name}ed")

    help_text = f"{text}\n\n\b\nExample:\n  recvirt-cloud user {name} bob"
    globals()["user"].command(name, help=help_text)(click.argument("user")(run))


_lock("lock", False, "Lock a user out at once, with all their tokens.")
_lock("unlock", True, "Let a user in again.")


@click.group()
def token() -> None:
    """Keys to the API."""


@token.command("list")
@json_option
def token_list(as_json: bool) -> None:
    """List your tokens; for administrators everybody's.

    \b
    Example:
      recvirt-cloud token list
    """
    columns = (("UUID", "uuid"), ("NAME", "name"), ("USER", "user"), ("PROJECT", "project"),
               ("READ ONLY", "read_only"), ("EXPIRES", "expires"), ("LAST USED", "last_used"))  # fmt: skip
    table(api().pages("tokens"), columns, as_json=as_json)


@token.command("create")
@click.argument("name")
@click.option("--user", help="For somebody else (administrators).")
@click.option("--for-project", "project", help="A key to this project alone.")
@click.option("--read-only", is_flag=True, help="One that changes nothing.")
@click.option("--days", type=int, help="It expires after so many. [default: never]")
@json_option
def token_create(name: str, as_json: bool, **body: Any) -> None:
    """Issue a token. Its secret is printed this once.

    \b
    Examples:
      recvirt-cloud token create ci --for-project shop --days 90
      recvirt-cloud token create prometheus --read-only
    """
    given = {key: value for key, value in body.items() if value is not None}
    made = api().call("POST", "tokens", {"name": name, **given})
    if as_json:
        fields(made, as_json=True)
    else:
        click.echo(made["secret"])
        click.echo(f"note: it is not shown again; {cell(made['uuid'], 'uuid')} revokes it", err=True)


@token.command("revoke")
@click.argument("uuid")
def token_revoke(uuid: str) -> None:
    """Revoke a token, at once.

    \b
    Example:
      recvirt-cloud token revoke 7d3f...
    """
    api().call("DELETE", f"tokens/{uuid}")
    click.echo(f"{uuid} is revoked")


MORE = (login, whoami, status, events, audit, schedule, reservation, project, user, token)
