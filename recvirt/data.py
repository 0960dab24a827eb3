"""Finds the files that ship with recvirt: profiles, kernel fragments, package lists, templates, in-image packages.

They lie in ``recvirt/resources``. In a checkout (also an editable install) three of its folders are symlinks to the
top of the tree, where people edit them; a wheel holds the files themselves. Does not own: what the files mean.
"""

from __future__ import annotations

from pathlib import Path

from recvirt.errors import RecvirtError

RESOURCES_DIR = Path(__file__).resolve().parent / "resources"
#: What a name of a profile, a fragment or a list gets to become a file name.
SUFFIXES = {"profiles": ".yaml", "kernel-configs": ".config", "package-lists": ".list"}


def data_path(*parts: str) -> Path:
    """The real path of a shipped file or folder, as ``data_path("kernel-configs", "base.config")``.

    The path is resolved (``profiles/default.yaml``, not the symlink to it). It need not exist below the first part:
    callers that offer a choice of names list the folder; the first part itself is checked.
    """
    first = RESOURCES_DIR / parts[0] if parts else RESOURCES_DIR
    if not first.exists():
        raise RecvirtError(
            f"recvirt is not whole: {first} is missing",
            hint="install it again (pip install .), or fetch the checkout with its symbolic links",
        )
    return first.resolve().joinpath(*parts[1:])


def shipped_names(folder: str) -> tuple[str, ...]:
    """The names (without suffix) of everything in ``profiles``, ``kernel-configs`` or ``package-lists``, sorted."""
    suffix = SUFFIXES[folder]
    return tuple(sorted(p.name.removesuffix(suffix) for p in data_path(folder).glob(f"*{suffix}")))


def _named_path(folder: str, reference: str) -> Path:
    # The profile's loader has made paths absolute; anything else is the name of a shipped file.
    return Path(reference) if reference.startswith("/") else data_path(folder, reference + SUFFIXES[folder])


def fragment_path(reference: str) -> Path:
    """The file of one entry of ``kernel.fragments``: a shipped name, or the absolute path of another file."""
    return _named_path("kernel-configs", reference)


def package_list_path(reference: str) -> Path:
    """The file of one entry of ``root.package_lists``: a shipped name, or the absolute path of another file."""
    return _named_path("package-lists", reference)
