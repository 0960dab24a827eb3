"""``recvirt completion``: the script that teaches a shell our words."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

_WHERE = {
    "bash": "~/.local/share/bash-completion/completions/recvirt",
    "zsh": "a folder of $fpath, as _recvirt",
    "fish": "~/.config/fish/completions/recvirt.fish",
}


def complete_profile(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The names of profiles that begin with what was typed."""
    from recvirt.profile import profile_names

    return [name for name in profile_names() if name.startswith(incomplete)]


def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A profile's name, or a file."""
    names = [CompletionItem(name) for name in complete_profile(ctx, param, incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(sorted(_WHERE)))
def completion(shell: str) -> None:
    """Print the completion script for SHELL (bash, zsh or fish).

    \b
    Examples:
      recvirt completion bash > ~/.local/share/bash-completion/completions/recvirt
      recvirt completion zsh > ~/.zfunc/_recvirt
      recvirt completion fish > ~/.config/fish/completions/recvirt.fish
    """
    from recvirt.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None  # the choice holds only shells that click knows
    # Not .source(): for bash that starts bash to ask its version, and Debian's has been new enough since 2011.
    script = kind(cli, {}, "recvirt", "_RECVIRT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
