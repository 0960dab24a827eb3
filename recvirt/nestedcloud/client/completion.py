"""``recvirt-cloud completion``: the script that teaches a shell our words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL (bash, zsh or fish).

    \b
    Examples:
      recvirt-cloud completion bash > ~/.local/share/bash-completion/completions/recvirt-cloud
      recvirt-cloud completion zsh > ~/.zfunc/_recvirt-cloud
      recvirt-cloud completion fish > ~/.config/fish/completions/recvirt-cloud.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # the choice holds only shells that click knows
    # Not .source(): for bash that starts bash to ask its version, and Debian's has been new enough since 2011.
    script = kind(ctx.find_root().command, {}, "recvirt-cloud", "_RECVIRT_CLOUD_COMPLETE")
    click.echo(script.source_template % script.source_vars())
