"""``recvirt test``, ``boot``, ``ssh`` and ``console``: virtual machines of a built image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recvirt.cli import App, pass_app
from recvirt.cli.completion import complete_target
from recvirt.errors import ConfigError, RecvirtError

if TYPE_CHECKING:
    from recvirt.model import Profile
    from recvirt.sandbox import ToolsRoot

_memory_option = click.option("--memory", metavar="SIZE", help="Memory of the VM, as 4G.  [default: the profile's]")
_cpus_option = click.option("--cpus", type=click.IntRange(1, 64), help="Virtual CPUs.  [default: the profile's]")
_target_argument = click.argument(
    "target", default="default", metavar="[PROFILE|IMAGE]", shell_complete=complete_target
)


def resolve_target(app: App, target: str, profile: str | None = None) -> tuple[Path, Profile]:
    """The image and the profile that TARGET names: a profile that was built, or an image file.

    An image file's profile is ``profile``, or the one that the image.json beside it names.
    """
    from recvirt.pipeline import built_image

    path = Path(target)
    if not path.is_file() or path.suffix in (".yaml", ".yml"):
        loaded = app.load(target)
        return built_image(loaded.model.name, app.build_dir.absolute()), loaded.model
    name = profile
    if name is None:
        try:
            name = str(json.loads((path.parent / "image.json").read_text())["profile"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"it is not known which profile {path} was built from", hint="name it: --profile PROFILE"
            ) from None
    return path.absolute(), app.load(name).model


#: The profile whose machines join a cloud.
WORKER_PROFILE = "nested-cloud-worker"


@click.command(short_help="Boot an image and VMs inside it: prove it.")
@_target_argument
@click.option("--profile", "profile_name", metavar="PROFILE", help="The profile that an IMAGE has to fulfil.")
@click.option("--deep", is_flag=True, help="Also boot the image inside itself as an L2, and an L3 in that.")
@click.option("--kernels", is_flag=True, help="Also install, lose and remove kernels, and open the rescue shell.")
@click.option("--matrix", is_flag=True, help="Also boot from each disk controller and through each network card.")
@click.option("--workers", is_flag=True, help="Also have a machine of the profile nested-cloud-worker join the cloud.")
@click.option(
    "--upgrade-from", "older_disk", metavar="DISK", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Also upgrade this older disk of a Nested Cloud to the profile's packages, while an instance runs.",
)  # fmt: skip
@click.option("--vmx", is_flag=True, help="Also run the kernel on an emulated Intel processor (Bochs; minutes).")
@click.option("--check", "names", multiple=True, metavar="NAME", help="Run only this check. May be repeated.")
@click.option("--list", "only_list", is_flag=True, help="List the checks that would run, and run none.")
@click.option("--parallel", type=click.IntRange(1, 16), help="Boots at once.  [default: as cores and memory allow]")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Where the reports go.  [default: build/<profile>/acceptance]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report (or the list) as JSON.")
@pass_app
def test(
    app: App,
    target: str,
    profile_name: str | None,
    deep: bool,
    kernels: bool,
    matrix: bool,
    workers: bool,
    older_disk: Path | None,
    vmx: bool,
    names: tuple[str, ...],
    only_list: bool,
    parallel: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Boot an image, check what its profile promises, and boot VMs inside it.

    The image is never written: each boot has an overlay of its own. Ends with status 7 unless all checks passed.
    Reports: report.html, report.json, junit.xml and the console logs.

    \b
    Examples:
      recvirt test
      recvirt test default --deep
      recvirt test nested-cloud --upgrade-from ./last-release.qcow2 --check cloud-upgrades-under-instances
      recvirt test build/minimal/disk.qcow2 --check l2-under-kvm --check no-failed-unit
      recvirt test --list --json
    """
    from recvirt.accept import Options, run_acceptance, select

    options = Options(
        deep=deep, kernels=kernels, matrix=matrix, vmx=vmx, workers=workers, upgrade=older_disk is not None,
        checks=names, parallel=parallel or 0,
    )  # fmt: skip
    if only_list:
        _print_list(options, as_json)
        return
    scenes = {item.scene for item in select(names, options.scenes)}
    if "upgrade" in scenes and older_disk is None:
        raise click.UsageError("the upgrade is tested on an older disk; name it: --upgrade-from DISK")
    image, profile = resolve_target(app, target, profile_name)
    from recvirt.accept.promise import promises_of

    folder = out or app.build_dir.absolute() / profile.name / "acceptance"
    promises = promises_of(profile, image.parent)
    extra, debs = for_vmx(app, profile) if "vmx" in scenes else ({}, {})
    worker_image = image_of_workers(app) if "workers" in scenes else None
    if older_disk is not None:
        older_disk = older_disk.resolve()
        debs |= for_upgrade(app, profile)
    try:
        run_acceptance(
            image, profile, app.tools(), folder, promises=promises, options=options, extra_tools=extra, debs=debs,
            worker_image=worker_image, older_disk=older_disk,
        )  # fmt: skip
    finally:
        if as_json and (folder / "report.json").exists():
            click.echo((folder / "report.json").read_text(), nl=False)


def image_of_workers(app: App) -> Path:
    """The image whose machines join a cloud. ConfigError when it was not built."""
    path = app.build_dir.absolute() / WORKER_PROFILE / "disk.qcow2"
    if not path.exists():
        raise ConfigError(f"{path} does not exist", hint=f"recvirt build {WORKER_PROFILE}")
    return path


def for_upgrade(app: App, profile: Profile) -> dict[str, Path]:
    """The profile's own packages of the Nested Cloud, by name. ConfigError when there are none."""
    from recvirt import pipeline

    planned = pipeline.plan(profile, app.store, app.context(offline=True))
    folders = [item.output.directory for item in planned if item.output and item.stage.name == "guest_debs"]
    found = {path.stem: path for folder in folders for path in sorted(folder.glob("recvirt-cloud*.deb"))}
    if not found:
        raise ConfigError(
            f"no packages of the Nested Cloud are built for {profile.name}", hint=f"recvirt build {profile.name}"
        )
    return found


def for_vmx(app: App, profile: Profile) -> tuple[dict[str, ToolsRoot], dict[str, Path]]:
    """Bochs, and the packages of the cache that its check boots."""
    from recvirt import pipeline

    planned = pipeline.plan(profile, app.store, app.context(offline=True))
    folders = {item.stage.name: item.output.directory for item in planned if item.output}
    debs = {}
    if "kernel_build" in folders:
        debs["kernel"] = folders["kernel_build"] / "linux-image.deb"
    if "guest_debs" in folders:
        debs["nested-check"] = folders["guest_debs"] / "recvirt-nested-check.deb"
    return {"bochs": app.tools("bochs")}, debs


def _print_list(options: object, as_json: bool) -> None:
    from recvirt.accept import Options, select

    assert isinstance(options, Options)
    checks = select(options.checks, options.scenes)
    if as_json:
        click.echo(json.dumps([{"name": c.name, "scene": c.scene, "title": c.title} for c in checks], indent=1))
        return
    for item in checks:
        click.echo(f"{item.name:<36} {item.scene:<9} {item.title}")


@click.command(short_help="Boot an image, with its console here.")
@_target_argument
@click.option("--profile", "profile_name", metavar="PROFILE", help="The profile of an IMAGE.")
@click.option("--ssh", "with_ssh", is_flag=True, help="Log in over SSH instead of showing the serial console.")
@click.option(
    "-p", "--forward", "forwards", multiple=True, metavar="[HOST:]GUEST",
    help="Forward a TCP port of 127.0.0.1 into the VM. Without HOST a free one is chosen and told.",
)  # fmt: skip
@click.option("--uefi/--bios", default=False, help="The firmware.  [default: --bios]")
@_memory_option
@_cpus_option
@click.option("--vnc", type=click.IntRange(0, 99), metavar="N", help="Show the screen by VNC on 127.0.0.1, display N.")
@click.option("--ephemeral", is_flag=True, help="Throw away what the VM wrote; else the next boot goes on from it.")
@click.option("--fresh", is_flag=True, help="Begin anew from the image, forgetting what earlier boots wrote.")
@click.option(
    "--seed", "seed_dir", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
    help="NoCloud data of your own (user-data, meta-data), instead of a login with a key made here.",
)  # fmt: skip
@pass_app
def boot(
    app: App,
    target: str,
    profile_name: str | None,
    with_ssh: bool,
    forwards: tuple[str, ...],
    uefi: bool,
    memory: str | None,
    cpus: int | None,
    vnc: int | None,
    ephemeral: bool,
    fresh: bool,
    seed_dir: Path | None,
) -> None:
    """Boot an image and show its serial console here; Ctrl-] leaves and shuts the VM down.

    The image is never written. What the VM writes is kept in build/<profile>/vm/ for the next boot. Log in over SSH
    as "recvirt" with a key made here ("recvirt ssh" in another terminal does).

    \b
    Examples:
      recvirt boot
      recvirt boot --ssh --memory 4G
      recvirt boot minimal --uefi -p 8080:80 --ephemeral
    """
    from recvirt import interactive

    image, profile = resolve_target(app, target, profile_name)
    wish = interactive.Wish(
        firmware="uefi" if uefi else "bios", memory=memory or profile.accept.memory, cpus=cpus or profile.accept.cpus,
        forwards=tuple(interactive.parse_forward(text) for text in forwards), vnc=vnc, ephemeral=ephemeral,
        fresh=fresh, seed_dir=seed_dir, with_ssh=with_ssh,
        groups=tuple(sorted({"kvm", *(group for user in profile.root.users[:1] for group in user.groups)})),
    )  # fmt: skip
    raise SystemExit(interactive.boot(app.tools, image, _vm_dir(app, profile.name), wish))


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Log in to the VM that is booted.",
)
@click.argument("profile", default="default", shell_complete=complete_target)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@pass_app
def ssh(app: App, profile: str, command: tuple[str, ...]) -> None:
    """Log in to the VM that "recvirt boot PROFILE" runs, or run a COMMAND in it.

    \b
    Examples:
      recvirt ssh
      recvirt ssh default -- systemctl --failed
    """
    from recvirt import interactive

    raise SystemExit(interactive.ssh(_vm_dir(app, profile), command))


@click.command(short_help="Attach to the console of the booted VM.")
@click.argument("profile", default="default", shell_complete=complete_target)
@pass_app
def console(app: App, profile: str) -> None:
    """Attach to the serial console of the VM that "recvirt boot PROFILE" runs; Ctrl-] detaches.

    \b
    Examples:
      recvirt console
      recvirt console minimal
    """
    from recvirt import interactive

    raise SystemExit(interactive.console(_vm_dir(app, profile)))


def _vm_dir(app: App, profile: str) -> Path:
    if "/" in profile or profile in ("", ".", ".."):
        raise RecvirtError(f"{profile!r} is not the name of a profile", hint="recvirt profiles lists them")
    return app.build_dir.absolute() / profile / "vm"
