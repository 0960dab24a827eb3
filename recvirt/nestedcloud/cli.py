"""``recvirt-cloud``: what a person types, and what systemd starts."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from recvirt import __version__
from recvirt.nestedcloud.client.api import VARIABLE, Api, ApiError
from recvirt.nestedcloud.client.commands import COMMANDS
from recvirt.nestedcloud.client.completion import completion
from recvirt.nestedcloud.client.console_commands import CONSOLE_COMMANDS
from recvirt.nestedcloud.client.network_commands import NETWORK_COMMANDS
from recvirt.nestedcloud.client.output import fail
from recvirt.nestedcloud.client.people_commands import PEOPLE_COMMANDS
from recvirt.nestedcloud.client.sight_commands import SIGHT_COMMANDS
from recvirt.nestedcloud.client.storage_commands import STORAGE_COMMANDS
from recvirt.nestedcloud.client.time_commands import TIME_COMMANDS
from recvirt.nestedcloud.client.worker_commands import WORKER_COMMANDS
from recvirt.nestedcloud.host_commands import CENTRAL_ROOT_COMMANDS, WORKER_ROOT_COMMANDS, tunnel
from recvirt.nestedcloud.portmap_command import forwards
from recvirt.nestedcloud.statuses import ExitStatus


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; end quietly when whoever reads along has read enough, as ``| head -1``."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The interpreter must not try to say the rest when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(ExitStatus.OUTPUT_CLOSED) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="recvirt-cloud")
@click.option("--project", metavar="NAME", help="Another project than the access file's.")
def main_group(project: str | None) -> None:
    """Your own cloud inside one VM: instances, networks and volumes on workers that libvirt drives.

    \b
    Try it on this machine, without root and without a hypervisor:
      recvirt-cloud dev
    Then, in another shell, what it printed, and:
      recvirt-cloud launch web
      recvirt-cloud list
    """


for _command in (
    *COMMANDS, *CONSOLE_COMMANDS, *NETWORK_COMMANDS, *STORAGE_COMMANDS, *TIME_COMMANDS, *PEOPLE_COMMANDS,
    *SIGHT_COMMANDS,
):  # fmt: skip
    main_group.add_command(_command)


@main_group.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path, file_okay=False), help="Where it keeps everything.")
@click.option("--port", default=8780, show_default=True, help="Of the API, on 127.0.0.1.")
def dev(folder: Path | None, port: int) -> None:
    """Run a whole cloud on this machine, with libvirt's test driver in place of VMs.

    \b
    Example:
      recvirt-cloud dev
    """
    from recvirt.nestedcloud import dev as development

    place = development.Place((folder or development.default_folder()).absolute(), port)
    development.prepare(place)
    cloud = development.Cloud(place)
    try:
        cloud.start_all()
    except development.DevError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"The cloud runs; its files and logs are in {place.folder}. In another shell:\n")
    click.echo(f"  export {VARIABLE}={place.access}\n  recvirt-cloud launch web\n\nCtrl-C ends it.")
    try:
        while True:
            for name in cloud.watch():
                click.echo(f"{name} ended and was started again; see {place.folder / name}.log", err=True)
            time.sleep(1.0)
    except KeyboardInterrupt:
        pass
    finally:
        cloud.stop()


@main_group.group()
def central() -> None:
    """The central node's services, as systemd starts them, and what its administrator does there.

    \b
    Example:
      sudo -u recvirt-central recvirt-cloud central migrate
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "recvirt.nestedcloud.central.settings")


def _setup() -> None:
    import django

    from recvirt.nestedcloud.central.config import ConfigError

    try:
        django.setup()
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.CONFIG)


@central.command()
def migrate() -> None:
    """Bring the database's tables to this version: all the way, or not at all.

    \b
    Example:
      sudo -u recvirt-central recvirt-cloud central migrate
    """
    _setup()
    from recvirt.nestedcloud.central.upgrade import UnreachableError, UpgradeError, upgrade

    try:
        upgrade(click.echo)
    except UnreachableError as error:
        fail(str(error), "is PostgreSQL running? systemctl status 'postgresql@*'", ExitStatus.CONFIG)
    except UpgradeError as error:
        fail(
            f"the database can't be brought to version {__version__}: {error}",
            "nothing was changed: the version that wrote it can still use it, and pg_dump can still read it",
            ExitStatus.UPGRADE,
        )


@central.command()
def restored() -> None:
    """Say that a backup of the database was restored, before the services start again.

    What was under way when it was taken is ended, so that nothing is done twice.

    \b
    Example:
      sudo -u recvirt-central recvirt-cloud central restored
    """
    _setup()
    from recvirt.nestedcloud.central.restore import settle

    click.echo(f"{settle()} operations were under way and are ended")


@central.command()
@click.option("--port", default=8780, show_default=True, help="Of 127.0.0.1.")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Listen here instead of on the port.")
def serve(port: int, socket_path: Path | None) -> None:
    """Serve the API on 127.0.0.1, or on a socket; a TLS front stands before it.

    \b
    Example:
      recvirt-cloud central serve --socket /run/recvirt-cloud/api.sock
    """
    _setup()
    import uvicorn

    from recvirt.nestedcloud.central.relay import SERVER_OPTIONS

    where: dict[str, Any] = {"uds": str(socket_path)} if socket_path else {"host": "127.0.0.1", "port": port}
    uvicorn.run(
        "recvirt.nestedcloud.central.asgi:application", **where, log_level="warning", server_header=False,
        lifespan="off", proxy_headers=True, forwarded_allow_ips="*" if socket_path else "127.0.0.1",
        # One, whatever WEB_CONCURRENCY says: both ends of a console meet in its memory.
        workers=1, **SERVER_OPTIONS,
    )  # fmt: skip


@central.command()
@click.option("--worker", "worker_uuid", help="The UUID of the worker on this machine, if there is one.")
@click.option("--name", default="local", show_default=True, help="Its name.")
def init(worker_uuid: str | None, name: str) -> None:
    """Write the first rows: a project, the administrator, the worker on this machine, and the images that packages
    brought to it. Again changes nothing.

    \b
    Example:
      recvirt-cloud central init --worker 11111111-1111-4111-8111-111111111111 --name local
    """
    _setup()
    from recvirt.nestedcloud.central.bundled import ensure_bundled
    from recvirt.nestedcloud.central.first import PROJECT, ensure_first_rows

    ensure_first_rows(worker_uuid, name)
    for said in ensure_bundled(worker_uuid, PROJECT) if worker_uuid else ():
        click.echo(said)


@central.command()
@click.option("--user", default="admin", show_default=True, help="Who gets it.")
@click.option("--name", default="command line", show_default=True, help="What it is for.")
def token(user: str, name: str) -> None:
    """Issue an API token for a user; it is shown this once.

    \b
    Example:
      sudo -u recvirt-central recvirt-cloud central token --user bob --name laptop
    """
    _setup()
    from django.db.utils import OperationalError

    from recvirt.nestedcloud.central.first import issue_token

    try:
        click.echo(issue_token(user, name))
    except LookupError as error:
        raise click.ClickException(str(error)) from None
    except OperationalError as error:
        fail(
            f"the database does not answer: {str(error).splitlines()[0]}",
            "is the set-up through? systemctl status recvirt-cloud-setup", ExitStatus.UNREACHABLE,
        )  # fmt: skip


@central.command()
def dispatch() -> None:
    """Tell the workers what is to be done.

    \b
    Example:
      recvirt-cloud central dispatch
    """
    _setup()
    import signal
    import threading

    from recvirt.nestedcloud.central import config, dispatcher
    from recvirt.nestedcloud.queue import Sender

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = config.load()
    dispatcher.run(Sender(settings.broker).command, stop=stop.is_set)


@central.command()
def consume() -> None:
    """Write down what the workers report.

    \b
    Example:
      recvirt-cloud central consume
    """
    _setup()
    from recvirt.nestedcloud.central import config, consumer

    consumer.run(config.load())


@central.command()
@click.argument("name")
def administrator(name: str) -> None:
    """Make an administrator, and print a token for them: whoever has this machine has the cloud.

    \b
    Example:
      sudo -u recvirt-central recvirt-cloud central administrator ada
    """
    _setup()
    from recvirt.nestedcloud.central.people import make_administrator

    click.echo(make_administrator(name))


@main_group.command()
@click.option("--prepare", is_flag=True, help="Only what has to be there before the broker and the file server start.")
def setup(prepare: bool) -> None:
    """Set this machine up for the roles whose packages it has: what systemd does at each boot, as root. Does only what
    is missing.

    \b
    Example:
      sudo recvirt-cloud setup
    """
    from recvirt.nestedcloud import provision

    machine = provision.Machine(tell=click.echo)
    try:
        (provision.prepare if prepare else provision.setup)(machine)
    except provision.UpgradeFailedError as error:
        fail(str(error), "docs/operating.md, 'Upgrade', tells the ways on", ExitStatus.UPGRADE)
    except provision.ProvisionError as error:
        fail(str(error), "once that is put right, the next run goes on from there", ExitStatus.CONFIG)


@main_group.command("login-here")
def login_here() -> None:
    """On the central node itself: give the user who calls sudo access as the cloud's administrator.

    Waits until this boot's set-up is through and the services are up.

    \b
    Example:
      sudo recvirt-cloud login-here
    """
    from recvirt.nestedcloud import login
    from recvirt.nestedcloud.machine import Machine, ProvisionError

    machine = Machine(tell=click.echo)
    try:
        login.wait_for_setup(machine)
        path, access = login.login_here(machine)
    except ProvisionError as error:
        fail(str(error), "", ExitStatus.CONFIG)
    click.echo(f"{path} has the access; try: recvirt-cloud list")
    if not login.wait_until_ready(machine, Api(access)):
        click.echo("not all of it is up yet; recvirt-cloud status tells what is not", err=True)


@main_group.group()
def worker() -> None:
    """Workers: what administrators do with them, what a machine does to become one, and the worker's services.

    \b
    Examples:
      recvirt-cloud worker invite
      sudo recvirt-cloud worker join https://cloud.example.org --token rvj_...
    """


worker.add_command(forwards)

_config_option = click.option(
    "--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="Its configuration."
)


@worker.command("run")
@_config_option
def worker_run(path: Path | None) -> None:
    """Carry out what the central node asks for.

    \b
    Example:
      recvirt-cloud worker run --config /etc/recvirt-cloud/worker.toml
    """
    from recvirt.nestedcloud.worker import service

    service.Service(_worker_config(path)).run()


@worker.command("consoles")
@_config_option
def worker_consoles(path: Path | None) -> None:
    """Bring the instances' serial consoles to whom the central node names.

    \b
    Example:
      recvirt-cloud worker consoles --config /etc/recvirt-cloud/worker.toml
    """
    config = _worker_config(path)
    from recvirt.nestedcloud.worker import consoles

    consoles.ConsoleService(config).run()


def _worker_config(path: Path | None) -> Any:
    from recvirt.nestedcloud.worker import service

    try:
        return service.load(path or service.DEFAULT_PATH)
    except service.ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.CONFIG)


main_group.add_command(completion)
main_group.add_command(tunnel)
for _command in (*WORKER_COMMANDS, *WORKER_ROOT_COMMANDS):
    worker.add_command(_command)
for _command in CENTRAL_ROOT_COMMANDS:
    central.add_command(_command)


def main() -> None:
    """The entry point: errors as one line and a hint, with a status of their own."""
    kinds = {"unreachable": ExitStatus.UNREACHABLE, "timed-out": ExitStatus.TIMED_OUT}
    try:
        status = main_group.main(prog_name="recvirt-cloud", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else ExitStatus.DONE)
    except ApiError as error:
        fail(error.message, error.hint, kinds.get(error.kind, ExitStatus.REFUSED))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", "", ExitStatus.INTERRUPTED)
