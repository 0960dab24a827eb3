"""Installs packages, the kernel's above all, with dpkg into a tree that holds only what dpkg and the boot menu need.

The root archive is not unpacked: its dpkg database and a handful of files are, dpkg works on them for real, and what it
changed is found by comparing the tree before and after. Scripts of the tools root never run: the image's own hooks
belong to a running image, and the menu is written here explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recvirt.disk.packages import INSTALLED, parse_status
from recvirt.disk.tarmerge import Changes, TarIndex, compare, extract, snapshot
from recvirt.errors import StageError
from recvirt.sandbox import ToolsRoot

STATUS = "var/lib/dpkg/status"
UPDATE_BOOT = "usr/sbin/recvirt-update-boot"
#: Folders and files unpacked whole.
_WANTED = (
    "var/lib/dpkg", "boot", "etc/recvirt", "etc/dpkg", "etc/passwd", "etc/group", UPDATE_BOOT,
    "etc/initramfs-tools", "usr/lib/recvirt-boot", "usr/lib/os-release",
)  # fmt: skip
#: What dpkg leaves behind and no image needs: locks and the copies of the state before.
_LEFTOVERS = frozenset(
    f"var/lib/dpkg/{name}" for name in ("lock", "lock-frontend", "status-old", "available-old", "triggers/Lock")
)


def is_wanted(name: str) -> bool:
    """Whether a member (clean name) belongs into the sparse tree: see ``_WANTED``, and the links of the merged /usr."""
    if "/" not in name:
        return name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "boot", "etc", "var")
    return any(name == wanted or name.startswith(f"{wanted}/") for wanted in _WANTED)


def path_options(configs: Iterable[str]) -> list[str]:
    """dpkg's ``--path-exclude``/``--path-include`` words from the image's own dpkg.cfg files, order kept."""
    words = []
    for text in configs:
        for line in text.splitlines():
            stripped = line.strip()
            if stripped.startswith(("path-exclude", "path-include")):
                words.append(f"--{stripped}")
    return words


def dpkg_argv(tree: Path, package: Path, options: Iterable[str] = ()) -> list[str]:
    """dpkg(1)'s command line. ``script-chrootless`` runs maintainer scripts outside, with DPKG_ROOT set."""
    return [
        "dpkg", f"--root={tree}", "--force-script-chrootless", "--force-unsafe-io", "--log=/dev/null", "--no-triggers",
        *options, "--install", str(package),
    ]  # fmt: skip


def unsettled(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Packages that the installation left in another state than ``install ok installed``, or changed on the way."""
    problems = []
    for name, fields in sorted(after.items()):
        old = before.get(name)
        if fields.get("Status") != INSTALLED and (old is None or old.get("Status") != fields["Status"]):
            problems.append(f"{name} is {fields.get('Status')!r}")
        elif old is not None and old.get("Version") != fields.get("Version"):
            problems.append(f"{name} went from {old.get('Version')} to {fields.get('Version')}")
    return problems


@dataclass(frozen=True)
class SparseTree:
    """The tree that dpkg works on, and where programs log."""

    directory: Path
    index: TarIndex
    tools: ToolsRoot
    log: Path

    def unpack(self) -> None:
        """Unpack what is wanted. StageError when the archive is no Debian root with our boot package."""
        self.directory.mkdir(parents=True)
        extract(self.index, is_wanted, self.directory)
        for name, hint in ((STATUS, "is it a Debian root?"), (UPDATE_BOOT, "the package recvirt-boot is not in it")):
            if not (self.directory / name).is_file():
                raise StageError(f"the root archive has no {name}", hint=hint)

    def install(self, package: Path) -> None:
        """Install one package and check that every package is settled afterwards."""
        before = parse_status((self.directory / STATUS).read_text())
        configs = [p.read_text() for p in sorted((self.directory / "etc/dpkg").glob("dpkg.cfg.d/*")) if p.is_file()]
        empty = self.directory.parent / "no-hooks"
        empty.mkdir(exist_ok=True)
        hooks = [Path("/etc/kernel"), Path("/usr/share/kernel"), Path("/etc/initramfs")]
        cover = {path: empty for path in hooks if (self.tools.rootfs / str(path)[1:]).is_dir()}
        self.tools.run(
            dpkg_argv(self.directory, package, path_options(configs)), writable=[self.directory.parent],
            readable=[package], cover=cover, log_path=self.log,
        )  # fmt: skip
        problems = unsettled(before, parse_status((self.directory / STATUS).read_text()))
        if problems:
            raise StageError(f"{package.name} disturbed other packages: " + "; ".join(problems))

    def update_boot(self, *words: str) -> None:
        """Run the image's own recvirt-update-boot on the tree."""
        argv = ["sh", str(self.directory / UPDATE_BOOT), "--root", str(self.directory), *words]
        self.tools.run(argv, writable=[self.directory], log_path=self.log)

    def kernels(self) -> list[str]:
        """The kernel releases in /boot, newest first, as the menu has them."""
        argv = ["sh", str(self.directory / UPDATE_BOOT), "--root", str(self.directory), "--status"]
        done = self.tools.run(argv, readable=[self.directory])
        return [line.split(" ")[0] for line in done.stdout.splitlines() if line]

    def snapshot(self) -> Mapping[str, object]:
        """The state now, for :meth:`changes`."""
        return snapshot(self.directory)

    def changes(self, before: Mapping[str, object]) -> Changes:
        """What became different since ``before``, without the leftovers and without what belongs on the ESP."""
        changes = compare(before, snapshot(self.directory))  # type: ignore[arg-type]
        kept = tuple(n for n in changes.written if n not in _LEFTOVERS and not n.startswith("boot/efi/"))
        return Changes(kept, changes.removed)
