"""The verbs on projects, members, users and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from recvirt.nestedcloud.client.commands import SIZE, api, json_option, plain_verb
from recvirt.nestedcloud.client.output import cell, fields, human_bytes, table


@click.group()
def project() -> None:
    """Projects, their quotas and their members.

    \b
    Example:
      recvirt-cloud project list
    """


_quotas = (
    click.option("--instances", "instances_max", type=int, help="As many at once."),
    click.option("--vcpus", "vcpus_max", type=int, help="Of all instances together, counted as far as they may grow."),
    click.option("--memory", "memory_bytes_max", type=SIZE, help="The same, as 64G."),
    click.option("--disk", "disk_bytes_max", type=SIZE, help="Of root disks, volumes and images, as 1T."),
    click.option("--forwards", "forwards_max", type=int, help="Ports of workers that lead to instances."),
)
_role = click.option(
    "--role", type=click.Choice(["reader", "operator", "admin"]), default="operator", show_default=True,
    help="A reader sees, an operator changes, an admin also says who is in.",
)  # fmt: skip


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
               ("DISK", "disk_bytes_max"), ("FORWARDS", "forwards_max"))  # fmt: skip
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
    """Who is in the project.

    \b
    Example:
      recvirt-cloud --project shop project member list
    """


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


plain_verb(member, "remove", "Let a member go (its admins).", "members/{}", "DELETE", "is no member any more",
           example="project member remove bob")  # fmt: skip


@click.group()
def user() -> None:
    """The users of the cloud (administrators).

    \b
    Example:
      recvirt-cloud user list
    """


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
    """Keys to the API.

    \b
    Example:
      recvirt-cloud token list
    """


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


PEOPLE_COMMANDS = (project, user, token)
