"""Local kernel trees and git checkouts: a digest of what they hold, and a clean copy.

A checkout counts by its commit, what differs from it, and what is untracked; ignored files (objects of an earlier
build) do not count and are not copied. A tree without git counts by every file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from recvirt.errors import CommandError, ConfigError, StageError
from recvirt.sandbox import ToolsRoot
from recvirt.store import sha256_of

_SAFE = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
#: What a build in the tree itself leaves behind; kbuild refuses to build elsewhere then.
_BUILT = (".config", "include/config", "include/generated")
_FIXED_EPOCH = 1_577_836_800  # 2020-01-01 00:00 UTC, for trees without a commit


def is_git(tree: Path) -> bool:
    """Whether the tree's top is a git checkout (or a worktree of one)."""
    return (tree / ".git").exists()


def _git_folders(tree: Path) -> list[Path]:
    """The folders that git needs besides the checkout: a worktree's own one and the one that it shares."""
    pointer = tree / ".git"
    if pointer.is_dir():
        return []
    text = pointer.read_text().strip().removeprefix("gitdir:").strip()
    own = (tree / text).resolve()
    common = own / "commondir"
    shared = [(own / common.read_text().strip()).resolve()] if common.exists() else []
    return [own, *shared]


def _git(tools: ToolsRoot, tree: Path, *words: str) -> str:
    try:
        return tools.run(
            ["git", "-C", str(tree), *words], readable=[tree, *_git_folders(tree)], env=_SAFE
        ).stdout  # fmt: skip
    except CommandError as error:
        raise ConfigError(f"{tree} is no usable git checkout\n{error.message}", hint="kernel.tree") from error


def _names(text: str) -> list[str]:
    return sorted({name for name in text.split("\0") if name})


def _hash_files(tree: Path, names: Iterable[str]) -> str:
    """One digest over names, kinds, executable bits and contents; a name that is gone counts as gone."""
    digest = hashlib.sha256()
    for name in names:
        path = tree / name
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            digest.update(f"gone {name}\0".encode())
            continue
        if stat.S_ISLNK(mode):
            digest.update(f"link {name}\0{path.readlink()}\0".encode())
        elif stat.S_ISREG(mode):
            kind = "program" if mode & stat.S_IXUSR else "file"
            digest.update(f"{kind} {name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def _all_files(tree: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(tree):
        here = Path(folder)
        folders.sort()
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield str((here / name).relative_to(tree))


def digest_of(tools: ToolsRoot, tree: Path) -> tuple[str, str]:
    """The digest of the content, and words that name it. Raises ConfigError for what is no kernel tree."""
    if not (tree / "Makefile").is_file() or not (tree / "Kconfig").is_file():
        raise ConfigError(f"{tree} is no kernel tree", hint="kernel.tree must be the top of one (Makefile, Kconfig)")
    if not is_git(tree):
        built = [name for name in _BUILT if (tree / name).exists()]
        if built:
            raise ConfigError(
                f"{tree} holds the remains of a build ({', '.join(built)})", hint=f"make -C {tree} mrproper"
            )
        digest = _hash_files(tree, _all_files(tree))
        return digest, f"local tree {digest[:12]}"
    head = _git(tools, tree, "rev-parse", "HEAD").strip()
    changed = _names(_git(tools, tree, "diff", "HEAD", "--name-only", "--no-renames", "-z"))
    untracked = _names(_git(tools, tree, "ls-files", "--others", "--exclude-standard", "-z"))
    different = sorted({*changed, *untracked})
    state = _hash_files(tree, different) if different else ""
    label = f"git {head[:12]}" + (f" with {len(different)} changed files" if different else "")
    return hashlib.sha256(f"{head}\n{state}".encode()).hexdigest(), label


def copy(tools: ToolsRoot, tree: Path, target: Path, digest: str, log: Path) -> None:
    """Copy what the digest counts into the empty ``target``. StageError if the tree changed since it was looked at."""
    if is_git(tree):
        listed = _names(_git(tools, tree, "ls-files", "--cached", "--others", "--exclude-standard", "-z"))
        names: Sequence[str] = [name for name in listed if os.path.lexists(tree / name)]
    else:
        names = list(_all_files(tree))
    listing = target.parent / "files.list"
    listing.write_bytes(b"\0".join(os.fsencode(name) for name in names))
    script = 'set -o pipefail; tar -C "$1" --null --no-recursion -T "$3" -cf - | tar -C "$2" --no-same-owner -xf -'
    tools.run(
        ["bash", "-c", script, "bash", str(tree), str(target), str(listing)],
        readable=[tree, listing], writable=[target], log_path=log,
    )  # fmt: skip
    listing.unlink()
    if digest_of(tools, tree)[0] != digest:
        raise StageError(f"{tree} was changed while it was copied", hint="run it again when it is still")


def epoch_of(tools: ToolsRoot, tree: Path) -> int:
    """The commit's time in seconds, or a fixed moment for a tree without git."""
    return int(_git(tools, tree, "log", "-1", "--format=%ct").strip()) if is_git(tree) else _FIXED_EPOCH
