"""``recvirt kernel``: look at a profile's kernel configuration. Thin: the work is :mod:`recvirt.kconfig`'s."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from recvirt.cli import App, pass_app
from recvirt.cli.completion import complete_target

if TYPE_CHECKING:
    from recvirt.kconfig.symbols import Index
    from recvirt.model import Profile
    from recvirt.stages.base import Context

_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the profile. May be repeated."
)
_offline_option = click.option("--offline", is_flag=True, help="Use only what the cache holds; no network.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True)
class _Configured:
    """A profile with its resolved configuration."""

    profile: Profile
    context: Context
    config_path: Path
    report: dict[str, Any]
    inputs: Any

    @property
    def text(self) -> str:
        return self.config_path.read_text(encoding="utf-8")

    def index(self) -> Index | None:
        """The symbols of its source; None for Debian's kernel, whose source is not fetched."""
        from recvirt.kconfig.source import ensure_source
        from recvirt.kconfig.symbols import read_index

        source = getattr(self.inputs, "source", None)
        if source is None:
            return None
        log = self.context.cache_dir / "sources" / "unpack.log"
        tree = ensure_source(source, self.context.tools, self.context.cache_dir, log, offline=self.context.offline)
        return read_index(tree.tree, self.inputs.arch)


def _configure(app: App, name: str, overrides: tuple[str, ...], offline: bool) -> _Configured:
    """Resolve a profile's configuration, or take it from the cache."""
    from recvirt import pipeline

    model = app.load(name, overrides).model
    context = app.context(offline=offline)
    planned = pipeline.plan(model, app.store, context, until="kernel_config")
    outputs = pipeline.Builder(model, app.store, context, app.build_dir.absolute()).run(planned)
    folder = outputs["kernel_config"].directory
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return _Configured(model, context, folder / "config", report, planned[-1].inputs)


class _PrintsByDefault(click.Group):
    """What names none of its commands is meant for ``print``: ``config minimal`` is ``config print minimal``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            # What is being completed may still become a command.
            args = [] if ctx.resilient_parsing else ["print"]
        elif args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["print", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [
            *super().shell_complete(ctx, incomplete),
            *complete_target(ctx, click.Argument(["profile"]), incomplete),
        ]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, short_help="Print, explain, compare and audit kernels."
)
def kernel() -> None:
    """Look at the kernel of a profile.

    \b
    Examples:
      recvirt kernel config
      recvirt kernel config explain KVM_INTEL
    """


@kernel.group(cls=_PrintsByDefault, short_help="Print, explain, compare and audit configurations.")
def config() -> None:
    """Look at the kernel configuration of a profile: what it is, why, and how it compares.

    Without a command, print it; a profile that is called like a command needs "print" before it.

    \b
    Examples:
      recvirt kernel config minimal > .config
      recvirt kernel config explain KVM_INTEL
      recvirt kernel config diff default debug
      recvirt kernel config audit
    """


@config.command("print", short_help="Print a resolved configuration.")
@click.argument("profile", default="default", shell_complete=complete_target)
@_set_option
@_offline_option
@click.option("--where", is_flag=True, help="Print the path of the file instead of its text.")
@_json_option
@pass_app
def print_config(app: App, profile: str, overrides: tuple[str, ...], offline: bool, where: bool, as_json: bool) -> None:
    """Print the resolved configuration of PROFILE (or its report, as JSON).

    \b
    Examples:
      recvirt kernel config minimal > .config
      recvirt kernel config --json | jq .counts
    """
    done = _configure(app, profile, overrides, offline)
    if as_json:
        click.echo(json.dumps({**done.report, "path": str(done.config_path)}, indent=1))
    elif where:
        click.echo(str(done.config_path))
    else:
        click.echo(done.text, nl=False)


@config.command(short_help="Say who asked for a symbol, and why.")
@click.argument("symbol")
@click.argument("profile", default="default", shell_complete=complete_target)
@_set_option
@_offline_option
@_json_option
@pass_app
def explain(app: App, symbol: str, profile: str, overrides: tuple[str, ...], offline: bool, as_json: bool) -> None:
    """Say what SYMBOL is in PROFILE's kernel, which fragment asked for it and why, and on what it depends.

    \b
    Examples:
      recvirt kernel config explain KVM_INTEL
      recvirt kernel config explain DEBUG_FS debug --json
    """
    from recvirt.kconfig.dotconfig import parse_dotconfig
    from recvirt.kconfig.explain import explain as facts_of
    from recvirt.kconfig.explain import explain_lines

    done = _configure(app, profile, overrides, offline)
    facts = facts_of(symbol, parse_dotconfig(done.text), done.report, done.index())
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(explain_lines(facts)))


@config.command(short_help="Compare two configurations.")
@click.argument("left")
@click.argument("right")
@_offline_option
@_json_option
@pass_app
def diff(app: App, left: str, right: str, offline: bool, as_json: bool) -> None:
    """Compare two configurations. LEFT and RIGHT are profiles, or files as .config or /boot/config-*.

    A symbol that is not set counts as n. The exit status is 0 whether they differ or not.

    \b
    Examples:
      recvirt kernel config diff default debug
      recvirt kernel config diff default /boot/config-6.12.0-amd64 --json
    """
    from recvirt.kconfig.dotconfig import compare, parse_dotconfig

    texts = [_config_text(app, name, offline) for name in (left, right)]
    found = compare(*(parse_dotconfig(text) for text in texts))
    if as_json:
        click.echo(json.dumps({d.symbol: {"left": d.left, "right": d.right} for d in found}, indent=1))
        return
    for difference in found:
        click.echo(f"{difference.symbol:<40} {difference.left} -> {difference.right}")
    click.echo(f"{len(found)} symbols differ ({left} -> {right})", err=True)


def _config_text(app: App, name: str, offline: bool) -> str:
    """The configuration that ``name`` means: a file that is no profile, else a profile's."""
    path = Path(name)
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return path.read_text(encoding="utf-8", errors="replace")
    return _configure(app, name, (), offline).text


@config.command(short_help="Judge a kernel's hardening, beside Debian's.")
@click.argument("profile", default="default", shell_complete=complete_target)
@_set_option
@_offline_option
@_json_option
@pass_app
def audit(app: App, profile: str, overrides: tuple[str, ...], offline: bool, as_json: bool) -> None:
    """Let kernel-hardening-checker judge PROFILE's kernel, beside Debian's cloud kernel.

    The checker and Debian's configuration are fetched from the archive. Advice that contradicts the purpose (no
    modules, no user namespaces ...) is listed with the reason of the fragment that decides otherwise.

    \b
    Examples:
      recvirt kernel config audit
      recvirt kernel config audit kernel-7 --json
    """
    from recvirt.kconfig.audit import audit_lines

    facts = _audit(_configure(app, profile, overrides, offline))
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(audit_lines(facts)))


def _audit(done: _Configured) -> dict[str, Any]:
    from recvirt.archive import Archive
    from recvirt.kconfig import audit as auditing
    from recvirt.kconfig.origin import archive_for

    context, scratch = done.context, done.context.cache_dir / "downloads"
    scratch.mkdir(parents=True, exist_ok=True)
    suite = auditing.CHECKER_SUITE
    archive = Archive(context.tools, context.cache_dir, suite=suite, offline=context.offline)
    checker = auditing.Checker(context.tools, archive, scratch)
    facts: dict[str, Any] = {
        "release": done.report["release"], "ours": done.text, "findings": checker.check(done.config_path),
        "checker": f"{auditing.CHECKER} {checker.version} (Debian {suite})",
        "reasons": {name: entry["reason"] for name, entry in done.report["symbols"].items()},
    }  # fmt: skip
    choice = done.profile.kernel
    # A tarball's or tree's kernel is set beside the suite's: another version, but the same choices.
    name = auditing.debian_config_package(choice.package.package) if choice.source != "debian" else ""
    if name:
        debian_archive = archive_for(done.profile, choice.package.suite, context)
        package = debian_archive.find(name)
        text = auditing.debian_cloud_config(context.tools, debian_archive, package)
        path = scratch / f"{package.name}_{package.version}.config"
        path.write_text(text)
        facts |= {
            "debian": text, "debian_name": f"Debian's cloud kernel {package.version}",
            "debian_findings": checker.check(path),
        }  # fmt: skip
    return auditing.audit_facts(**facts)
