"""Command lines of the bootstrappers, and that pruning agrees with dpkg's own rules."""

from __future__ import annotations

import fnmatch
import subprocess
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.model import Root
from recvirt.rootfs.bootstrap import (
    ConfiguredCounter,
    debootstrap_script,
    inside_namespace,
    mmdebstrap_argv,
    prune_command,
)
from recvirt.rootfs.files import Facts, render_files


def policy(locale: str = "C.UTF-8") -> str:
    facts = Facts("p", Root(locale=locale), frozenset(), "ext4", False, (), {})
    return next(
        file.data.decode()
        for file in render_files(facts, data_path("templates", "root"))
        if file.path == "etc/dpkg/dpkg.cfg.d/recvirt"
    )


def argv(suite: str = "trixie") -> list[str]:
    return mmdebstrap_argv(
        suite=suite, names=["a", "b"], dpkg_cfg=policy(), scratch="/s p", tar_path="/o/root.tar",
        preseed_tar="/s p/p.tar",
    )  # fmt: skip


def test_mmdebstrap_installs_from_the_pinned_repository_alone() -> None:
    words = argv()
    assert words[0] == "mmdebstrap" and "--mode=root" in words and "--variant=apt" in words
    assert "--include=a,b" in words
    assert words[-3:] == ["trixie", "/o/root.tar", "deb [trusted=yes] file:/run/packages trixie main"]
    assert not [word for word in words if "://" in word]


def test_paths_with_blanks_are_quoted_for_the_hooks() -> None:
    assert "--customize-hook=sh '/s p'/outside.sh \"$1\"" in argv()


def test_unsafe_io_is_for_the_build_alone() -> None:
    assert "--dpkgopt=force-unsafe-io" in argv()
    assert "unsafe" not in policy()


def test_bookworm_is_merged_from_the_start() -> None:
    hook = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
    assert hook in argv("bookworm") and hook not in argv("trixie")


def test_the_repository_stands_at_its_mount_point() -> None:
    words = inside_namespace(["true"], "/some where/repo")
    assert words[-2:] == ["/some where/repo", "true"] and "/run/packages" in words[2]


def test_debootstrap_s_script_is_shell_and_cleans_up() -> None:
    text = debootstrap_script(
        suite="sid", names=["a", "b+c"], dpkg_cfg=policy(), scratch="/s p", tar_path="/o p/root.tar",
        preseed_tar="/s p/p.tar", epoch=12,
    )  # fmt: skip
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert "--mtime=@12 " in text and "'/o p/root.tar'" in text and "install a b+c\n" in text
    assert text.index("trap put_away EXIT") < text.index("debootstrap --variant")


def kept_by_dpkg(path: str, is_file: bool, cfg: str) -> bool:
    """dpkg's rule (dpkg(1), --path-exclude): the last match decides; folders and links above an include stay."""
    keep = True
    for line in cfg.splitlines():
        name, _, pattern = line.partition("=")
        if name in ("path-exclude", "path-include") and fnmatch.fnmatchcase(path, pattern):
            keep = name == "path-include"
    if not keep and not is_file:
        parents = [
            p.rpartition("/")[0] for n, _, p in (x.partition("=") for x in cfg.splitlines()) if n == "path-include"
        ]
        keep = any(fnmatch.fnmatchcase(path, parent) for parent in parents)
    return keep


FILES = (
    "usr/share/doc/bash/copyright", "usr/share/doc/bash/README", "usr/share/doc/bash/examples/x",
    "usr/share/man/man1/a.1.gz", "usr/share/man/de/man1/a.1.gz", "usr/share/info/dir", "usr/share/i18n/locales/de_DE",
    "usr/share/locale/de/LC_MESSAGES/x.mo", "usr/share/locale/locale.alias", "usr/share/locale/fr/LC_MESSAGES/x.mo",
    "usr/share/zoneinfo/UTC", "usr/share/qemu/openbios-ppc", "usr/share/qemu/bios.bin", "usr/share/lintian/overrides/x",
    "usr/bin/man", "usr/share/doc/a b'c/copyright", "usr/share/doc/a b'c/NEWS",
)  # fmt: skip
LINKS = ("usr/share/doc/libx", "usr/share/man/man1/b.1.gz", "usr/share/zoneinfo/Zulu")


@pytest.mark.parametrize("locale", ["C.UTF-8", "de_DE.UTF-8"])
def test_pruning_agrees_with_dpkg(tmp_path: Path, locale: str) -> None:
    cfg = policy(locale)
    tree = tmp_path / "a tree"
    for name in FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    for name in LINKS:
        (tree / name).symlink_to("nowhere")
    subprocess.run(["sh", "-euc", prune_command(cfg, '"$1"'), "sh", str(tree)], check=True)
    left = {p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_symlink() or p.is_file()}
    expected = {name for name in FILES if kept_by_dpkg(f"/{name}", True, cfg)}
    expected |= {name for name in LINKS if kept_by_dpkg(f"/{name}", False, cfg)}
    assert left == expected
    assert "usr/share/doc/bash/copyright" in left and "usr/share/doc/libx" in left
    assert ("usr/share/locale/de/LC_MESSAGES/x.mo" in left) == (locale != "C.UTF-8")


def test_no_policy_prunes_nothing() -> None:
    assert prune_command("# nothing\n", '"$1"') == ":"


def test_every_include_follows_its_exclude() -> None:
    """What prune_command relies on."""
    lines = [line for line in policy("de_DE.UTF-8").splitlines() if line.startswith("path-")]
    for index, line in enumerate(lines):
        name, _, pattern = line.partition("=")
        later = [other.partition("=")[2] for other in lines[index + 1 :] if other.startswith("path-exclude=")]
        assert name == "path-exclude" or not [p for p in later if fnmatch.fnmatchcase(pattern.replace("*", "x"), p)]


def test_progress_counts_configured_packages() -> None:
    seen: list[tuple[float, float | None]] = []
    counter = ConfiguredCounter(2, lambda name, done, total, unit: seen.append((done, total)))
    for line in ("Unpacking a", "Setting up a (1) ...", "Setting up b (1) ...", "Setting up ours (1) ..."):
        counter(line)
    assert seen == [(1, 2), (2, 2), (2, 2)]
