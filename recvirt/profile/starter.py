"""The commented file that ``recvirt profile new`` writes."""

from __future__ import annotations

import re
from pathlib import Path

from recvirt.errors import ConfigError

_NAME = re.compile(r"^[a-z0-9][a-z0-9._+-]{0,62}$")
_TEXT = """\
# A recvirt profile. Every key is optional; what is not said here comes from the profile that it extends.
#   recvirt profile show {shown}        the merged result, with the origin of every value
#   recvirt profile schema             every key, as JSON schema for your editor
#   recvirt build {shown}
description: "{name}"
extends: {parent}

# Lists are replaced, unless their key ends in + (append) or - (remove). null takes the built-in default back.
# Paths are relative to this file.

#kernel:
#  fragments+: [./my.config]          # a file of your own beside the shipped ones
#  cmdline: ["mitigations=auto"]
#kernel: debian                       # Debian's stock kernel instead; needs image.initramfs: small

#root:
#  packages+: [tmux]
#  hostname: {hostname}
#  users:
#    - name: admin
#      sudo: true
#      ssh_keys: ["ssh-ed25519 AAAA... you@example"]
#  nfs:
#    images:
#      source: "nfs.example:/export/images"
#    blocks:
#      source: "nfs.example:/export/blocks"
#  unattended_upgrades: true
#  overlays: [./overlay]              # a folder that is copied over the tree
#  hooks:
#    - where: chroot
#      path: ./after.sh

#image:
#  size: 8G
#  formats: [qcow2, vmdk]
"""


def write_starter(name: str, parent: str, path: Path) -> Path:
    """Write the starter file for ``name`` to ``path`` and return it; ConfigError if it exists or the name is bad."""
    if not _NAME.match(name):
        raise ConfigError(
            f"{name!r} can't be a profile's name", hint="small letters, digits and . _ + -, as in my-profile"
        )
    hostname = re.sub(r"[^a-z0-9-]+", "-", name).strip("-") or "recvirt"
    reference = name if path == Path("profiles") / f"{name}.yaml" else str(path)
    # A parent given by path was relative to where we stand; in the file it is relative to the file.
    above = str(Path(parent).absolute()) if "/" in parent or parent.endswith((".yaml", ".yml")) else parent
    text = _TEXT.format(name=name, shown=reference, parent=above, hostname=hostname)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", hint="choose another name, or --output") from None
    return path
