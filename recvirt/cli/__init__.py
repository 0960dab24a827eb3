"""The command line: options that all verbs share, and the one place that turns errors into exits.

Each verb lives in a module of its own and is imported when it is called, so that ``recvirt --help`` stays quick.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from recvirt import __version__
from recvirt.errors import RecvirtError, from_os_error
from recvirt.run import stop_all
from recvirt.ui import reporter

if TYPE_CHECKING:
    from recvirt.profile import LoadedProfile
    from recvirt.sandbox import ToolsRoot
    from recvirt.stages.base import Context
    from recvirt.store import Store

#: verb -> module:command
VERBS = {
    "doctor": "host:doctor",
    "profiles": "profiles:profiles",
    "profile": "profiles:profile",
    "plan": "build:plan",
    "build": "build:build",
    "kernel": "kernel:kernel",
    "test": "vm:test",
    "boot": "vm:boot",
    "ssh": "vm:ssh",
    "console": "vm:console",
    "inspect": "image:inspect",
    "diff": "image:diff",
    "sbom": "image:sbom",
    "publish": "publish:publish",
    "published": "publish:published",
    "prune": "publish:prune",
    "clean": "clean:clean",
    "completion": "completion:completion",
}
INTERRUPTED = 130
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: As a shell tells of a program that SIGPIPE ended.
OUTPUT_CLOSED = 141


class LazyGroup(click.Group):
    """Imports a verb's module when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(f"recvirt.cli.{module}"), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; end quietly when nobody reads what it says."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output went away (as `recvirt profiles | head -1` does). Nobody is left to tell.
            stop_all()
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise click.exceptions.Exit(OUTPUT_CLOSED) from None


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/recvirt``, else ``~/.cache/recvirt``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "recvirt"


@dataclass
class App:
    """What every verb gets: where things lie and how to reach the tools."""

    cache_dir: Path = field(default_factory=default_cache_dir)
    build_dir: Path = field(default_factory=lambda: Path("build"))
    debug: bool = False
    tools_mirror: str | None = None

    @cached_property
    def store(self) -> Store:
        """The cache. One object for the whole run: it holds what is in use."""
        from recvirt.store import Store

        return Store(self.cache_dir.absolute())

    def tools(self, extra: str | None = None) -> ToolsRoot:
        """The tools root, made first if it is not there."""
        from recvirt.toolsroot import ensure_tools

        return ensure_tools(self.store, extra=extra, mirror=self.tools_mirror)

    def context(self, *, jobs: int | None = None, offline: bool = False) -> Context:
        """What the stages get from the host."""
        from recvirt.stages.base import Context

        # The shared folders (packages, sources, apt's state) are in use from here on.
        self.store.hold("shared")
        count = jobs or len(os.sched_getaffinity(0))
        return Context(tools=self.tools(), cache_dir=self.store.directory, jobs=count, offline=offline)

    def load(self, name: str, overrides: tuple[str, ...] = ()) -> LoadedProfile:
        """A profile by name or path, with ``--set`` values applied."""
        from recvirt.profile import load_profile

        return load_profile(name, overrides=overrides)


pass_app = click.make_pass_decorator(App)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="recvirt")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), envvar="RECVIRT_CACHE_DIR",
    help="Where built stages, packages and tools are kept.  [default: $XDG_CACHE_HOME/recvirt]",
)  # fmt: skip
@click.option(
    "--build-dir", type=click.Path(path_type=Path, file_okay=False), envvar="RECVIRT_BUILD_DIR", default=Path("build"),
    show_default=True, help="Where images and logs land, a folder a profile.",
)  # fmt: skip
@click.option("--tools-mirror", metavar="URL", help="Debian archive for the tools root.  [default: mmdebstrap's own]")
@click.option(
    "--progress", type=click.Choice(["auto", "live", "plain", "json"]), default="auto", show_default=True,
    help="How progress is shown on stderr; json is an object a line.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Also show each command that is run.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
@click.option(
    "--debug", is_flag=True,
    help="Add the traceback to an error; keep the folder of a failed stage until the next build.",
)  # fmt: skip
@click.pass_context
def cli(
    ctx: click.Context,
    cache_dir: Path | None,
    build_dir: Path,
    tools_mirror: str | None,
    progress: str,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Build, prove and run Debian VM images that are hypervisors themselves.

    \b
    Examples:
      recvirt doctor                 is this machine ready?
      recvirt build                  build the default profile into build/default/
      recvirt test                   boot it, and boot VMs inside it
      recvirt boot --ssh             log in to it
    """
    reporter.mode, reporter.verbose, reporter.quiet = progress, verbose, quiet
    ctx.obj = App(
        cache_dir=cache_dir or default_cache_dir(), build_dir=build_dir, debug=debug, tools_mirror=tools_mirror
    )


def _on_terminate(_number: int, _frame: FrameType | None) -> None:
    # A second one ends us at once. What is left then the next run clears away, as after kill -9.
    for number in _ENDING:
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0, an error's own status, 2 for wrong usage, 130 when interrupted."""
    for number in _ENDING:
        # What was ignored when we were started (nohup(1), a shell's background) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_terminate)
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        status = cli.main(args=argv, prog_name="recvirt", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (RecvirtError, OSError) as error:
        if debug:
            traceback.print_exc()
        told = error if isinstance(error, RecvirtError) else from_os_error(error)
        reporter.error(told.message, told.hint)
        sys.exit(told.exit_code)
    except (KeyboardInterrupt, click.Abort):
        stop_all()
        reporter.error("interrupted", "what was whole is kept; the next run carries on from there")
        sys.exit(INTERRUPTED)
