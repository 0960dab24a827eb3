"""The verbs on time: schedules and reservations."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click

from recvirt.nestedcloud.client.commands import SIZE, api, json_option, plain_verb
from recvirt.nestedcloud.client.output import fields, table

if TYPE_CHECKING:
    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # no generic before click 8.2


class Time(_Text):
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


@click.group()
def schedule() -> None:
    """Operations at future times, in windows, and again and again.

    \b
    Example:
      recvirt-cloud schedule list
    """


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


plain_verb(schedule, "pause", "Let nothing be due until it is resumed.", "schedules/{}/pause", "POST", "is paused")
plain_verb(schedule, "resume", "Go on; what was due meanwhile is left out.", "schedules/{}/resume", "POST", "goes on")
plain_verb(schedule, "remove", "Forget a schedule, and the room kept for it.", "schedules/{}", "DELETE", "is removed")


@click.group()
def reservation() -> None:
    """Room for an instance, kept for a time.

    \b
    Example:
      recvirt-cloud reservation list
    """


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


plain_verb(reservation, "remove", "Give the room back.", "reservations/{}", "DELETE", "is given back",
           example="reservation remove 7d3f...")  # fmt: skip


TIME_COMMANDS = (schedule, reservation)
