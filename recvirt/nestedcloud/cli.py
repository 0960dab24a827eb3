"""``recvirt-cloud``: what a person types, and what systemd starts."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from recvirt import __version__
from recvirt.nestedcloud.client.api import VARIABLE, ApiError
from recvirt.nestedcloud.client.commands import COMMANDS
from recvirt.nestedcloud.client.people_commands import PEOPLE_COMMANDS
from recvirt.nestedcloud.client.sight_commands import SIGHT_COMMANDS
from recvirt.nestedcloud.client.storage_commands import STORAGE_COMMANDS
from recvirt.nestedcloud.client.time_commands import TIME_COMMANDS

#: Exit statuses, one a class of error.
STATUS_USAGE, STATUS_REFUSED, STATUS_UNREACHABLE, STATUS_CONFIG = 2, 3, 4, 5


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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


for _command in (*COMMANDS, *STORAGE_COMMANDS, *TIME_COMMANDS, *PEOPLE_COMMANDS, *SIGHT_COMMANDS):
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
    """The central node's services, as systemd starts them."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "recvirt.nestedcloud.central.settings")


def _setup() -> None:
    import django

    from recvirt.nestedcloud.central.config import ConfigError

    try:
        django.setup()
    except ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(STATUS_CONFIG)


@central.command()
def migrate() -> None:
    """Bring the database's tables to this version."""
    _setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=1)


@central.command()
@click.option("--port", default=8780, show_default=True)
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Listen here instead of on the port.")
def serve(port: int, socket_path: Path | None) -> None:
    """Serve the API on 127.0.0.1, or on a socket; a TLS front stands before it."""
    _setup()
    import uvicorn

    where: dict[str, Any] = {"uds": str(socket_path)} if socket_path else {"host": "127.0.0.1", "port": port}
    uvicorn.run(
        "recvirt.nestedcloud.central.asgi:application", **where, log_level="warning", server_header=False,
        lifespan="off", proxy_headers=True, forwarded_allow_ips="*" if socket_path else "127.0.0.1",
    )  # fmt: skip


@central.command()
@click.option("--worker", "worker_uuid", required=True, help="The UUID of the worker on this machine.")
@click.option("--name", required=True, help="Its name.")
def init(worker_uuid: str, name: str) -> None:
    """Write the first rows: a project, the administrator, the worker on this machine, and the images that packages
    brought. Again changes nothing.
    """
    _setup()
    from recvirt.nestedcloud.central.bundled import ensure_bundled
    from recvirt.nestedcloud.central.first import PROJECT, ensure_first_rows

    ensure_first_rows(worker_uuid, name)
    for said in ensure_bundled(worker_uuid, PROJECT):
        click.echo(said)


@central.command()
@click.option("--user", default="admin", show_default=True)
@click.option("--name", default="command line", show_default=True, help="What it is for.")
def token(user: str, name: str) -> None:
    """Issue an API token for a user; it is shown this once."""
    _setup()
    from recvirt.nestedcloud.central.first import issue_token

    try:
        click.echo(issue_token(user, name))
    except LookupError as error:
        raise click.ClickException(str(error)) from None


@central.command()
def dispatch() -> None:
    """Tell the workers what is to be done."""
    _setup()
    import signal
    import threading

    from recvirt.nestedcloud.central import config, dispatcher
    from recvirt.nestedcloud.queue import Sender, make_app

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = config.load()
    dispatcher.run(Sender(make_app(settings.broker), settings.broker).command, stop=stop.is_set)


@central.command()
def consume() -> None:
    """Write down what the workers report."""
    _setup()
    from recvirt.nestedcloud.central import config, consumer

    consumer.run(config.load())


@central.command()
@click.argument("name")
def administrator(name: str) -> None:
    """Make an administrator, and print a token for them: whoever has this machine has the cloud."""
    _setup()
    from recvirt.nestedcloud.central.people import make_administrator

    click.echo(make_administrator(name))


@main_group.command()
def setup() -> None:
    """Set this machine up as a cloud: what systemd does at each boot, as root. Does only what is missing.

    \b
    Example:
      sudo recvirt-cloud setup
    """
    from recvirt.nestedcloud import provision

    try:
        provision.setup(provision.Machine(tell=click.echo))
    except provision.ProvisionError as error:
        click.echo(f"error: {error}", err=True)
        click.echo("hint: once that is put right, the next run goes on from there", err=True)
        sys.exit(STATUS_CONFIG)


@main_group.command("login-here")
def login_here() -> None:
    """On the central node itself: give the user who calls sudo access as the cloud's administrator.

    \b
    Example:
      sudo recvirt-cloud login-here
    """
    from recvirt.nestedcloud import provision

    try:
        path = provision.login_here(provision.Machine(tell=click.echo))
    except provision.ProvisionError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{path} has the access; try: recvirt-cloud list")


@main_group.group()
def worker() -> None:
    """A worker's service."""


@worker.command("run")
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="Its configuration.")
def worker_run(path: Path | None) -> None:
    """Carry out what the central node asks for."""
    from recvirt.nestedcloud.worker import service

    try:
        config = service.load(path or service.DEFAULT_PATH)
    except service.ConfigError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(STATUS_CONFIG)
    service.Service(config).run()


def main() -> None:
    """The entry point: errors as one line and a hint, with a status of their own."""
    try:
        main_group(prog_name="recvirt-cloud")
    except ApiError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(STATUS_UNREACHABLE if error.kind == "unreachable" else STATUS_REFUSED)
