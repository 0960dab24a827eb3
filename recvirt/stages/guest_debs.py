"""Builds the Debian packages of our own that go into an image, from the folders in ``recvirt/resources/packages``.

Those in :data:`~recvirt.rootfs.selection.ALWAYS` go into every image, the others into those whose profile names them.

A package folder holds ``DEBIAN/`` (control and maintainer scripts), ``root/`` (the tree as installed), and optionally
``changelog`` (Debian's format; its date is the package's epoch), ``links`` (``TARGET NAME`` a line), ``modes``
(``MODE NAME`` a line, for what is neither 0644 nor, when executable, 0755) and ``src/`` (compiled programs).
The same sources and tools give the same bytes. Does not own: what the packages say (their folders), or where they go
(``stages/root.py``).
"""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recvirt.cpio import Entry, newc
from recvirt.data import RESOURCES_DIR, data_path, package_list_path
from recvirt.errors import StageError
from recvirt.rootfs.lists import read_lists
from recvirt.rootfs.selection import own_packages
from recvirt.stages.base import Context, Work
from recvirt.store import FileRef
from recvirt.ui import reporter

#: dpkg runs these as programs, so they are executable whatever a checkout or a wheel made of their modes.
_SCRIPTS = frozenset({"preinst", "postinst", "prerm", "postrm", "config"})
_TOP_FILES = frozenset({"changelog", "links", "modes"})
_TOP_FOLDERS = frozenset({"DEBIAN", "root", "src"})
#: The epoch of a package without a changelog: any fixed moment in the past serves.
_DEFAULT_EPOCH = 1_767_225_600  # 2026-01-01 00:00 UTC
#: Tools whose version may change the bytes.
_TOOLS = ("dpkg", "gcc", "binutils", "musl-dev", "musl-tools", "linux-libc-dev", "gzip", "xz-utils", "liblzma5")
#: Lines of ``links`` and ``modes``: names are relative to the package's root.
LINK_LINE = re.compile(r"^(\S+)\s+([^/\s]\S*)$")
MODE_LINE = re.compile(r"^([0-7]{3,4})\s+([^/\s]\S*)$")

#: Compiled programs: package -> installed path -> sources in ``src/``.
PROGRAMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "recvirt-nested-check": {
        "usr/bin/recvirt-nested-check": (
            "main.c", "util.c", "cpuid.c", "facts.c", "device.c", "l2.c", "guest.S", "hints.c", "verdict.c",
            "report.c", "initramfs.c",
        ),
        "usr/lib/recvirt/l2-init": ("init.c", "util.c", "cpuid.c"),
    }
}  # fmt: skip
#: initramfs images made of compiled programs: package -> installed path -> name in the archive -> installed path.
ARCHIVES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "recvirt-nested-check": {
        "usr/lib/recvirt/l2-initramfs.cpio": {
            "init": "usr/lib/recvirt/l2-init",
            "recvirt-nested-check": "usr/bin/recvirt-nested-check",
        }
    }
}
#: Parts of the Python package ``recvirt`` that a package installs: package -> installed path -> which modules.
PYTHON: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "recvirt-cloud": {"usr/lib/python3/dist-packages/recvirt": ("__init__.py", "py.typed", "nestedcloud/**/*.py")}
}
#: Programs that only an archive needs, not the installed package.
_ONLY_IN_ARCHIVES = frozenset({"usr/lib/recvirt/l2-init"})


@dataclass(frozen=True)
class SourceFile:
    """One file of a package folder. ``link`` is set (and ``ref`` not) for a symbolic link."""

    path: str
    executable: bool
    ref: FileRef | None = None
    link: str | None = None


@dataclass(frozen=True)
class PackageSource:
    """A package folder, frozen."""

    name: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class GuestDebsInputs:
    """Everything that decides about the packages' bytes."""

    packages: tuple[PackageSource, ...]
    tools: tuple[str, ...]


class GuestDebs:
    """The stage: one ``<package>.deb`` a package folder."""

    name = "guest_debs"
    revision = 1
    needs: tuple[str, ...] = ()

    def inputs(self, profile: Any, upstream: Mapping[str, str], context: Context) -> GuestDebsInputs:
        """The package folders' files and the tools' versions. The profile only says which packages are wanted."""
        del upstream
        root = profile.root
        listed = read_lists([package_list_path(name) for name in root.package_lists], root.suite)
        wanted = own_packages([*listed, *root.packages])
        return GuestDebsInputs(
            tuple(package for package in read_packages(data_path("packages")) if package.name in wanted),
            context.tools.version_of(*_TOOLS),
        )

    def build(self, inputs: GuestDebsInputs, work: Work) -> None:
        """Write the packages."""
        for package in inputs.packages:
            build_package(package, inputs.tools, work)

    def space_bytes(self, inputs: GuestDebsInputs) -> int:
        """Room that a build wants."""
        del inputs
        return 64 * 1024**2


def read_packages(folder: Path) -> tuple[PackageSource, ...]:
    """Every package folder below ``folder``, sorted by name. Raises StageError for what can't become a package."""
    return tuple(read_package(path) for path in sorted(folder.iterdir()) if (path / "DEBIAN").is_dir())


def read_package(folder: Path) -> PackageSource:
    """One package folder. Raises StageError for an entry that no package folder has: it would be left out silently."""
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/", 1)[0]
        if top not in _TOP_FILES | _TOP_FOLDERS:
            raise StageError(
                f"{path} has no place in a package folder",
                hint=f"a package folder holds {', '.join(sorted(_TOP_FOLDERS | _TOP_FILES))}",
            )
        if path.is_symlink():
            files.append(SourceFile(name, False, link=str(path.readlink())))
        elif path.is_file():
            executable = bool(path.stat().st_mode & stat.S_IXUSR)
            files.append(SourceFile(name, executable, FileRef.of(path, name)))
    files += _python_files(folder.name)
    if not any(f.path == "DEBIAN/control" for f in files):
        raise StageError(f"{folder} has no DEBIAN/control", hint="every package needs one: see deb-control(5)")
    return PackageSource(folder.name, tuple(files))


def _python_files(package: str) -> list[SourceFile]:
    files = []
    for installed, patterns in PYTHON.get(package, {}).items():
        source = RESOURCES_DIR.parent
        for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
            target = f"root/{installed}/{path.relative_to(source).as_posix()}"
            files.append(SourceFile(target, False, FileRef.of(path, target)))
    return files


def parse_control(text: str, where: str) -> dict[str, str]:
    """The fields of a control file (continuation lines joined). StageError when a field that dpkg wants is missing."""
    fields: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if line[:1] in (" ", "\t") and last:
            fields[last] += "\n" + line
        elif ":" in line:
            last, value = line.split(":", 1)
            fields[last] = value.strip()
    missing = [n for n in ("Package", "Version", "Architecture", "Maintainer", "Description") if not fields.get(n)]
    if missing:
        raise StageError(f"{where} lacks {', '.join(missing)}", hint="see deb-control(5)")
    return fields


def changelog_epoch(text: str) -> int:
    """Seconds since 1970 of a Debian changelog's newest entry."""
    for line in text.splitlines():
        if line.startswith(" -- ") and ">  " in line:
            return int(email.utils.parsedate_to_datetime(line.split(">  ", 1)[1]).timestamp())
    raise StageError("a changelog has no line ' -- NAME <MAIL>  DATE'", hint="see deb-changelog(5)")


def parse_pairs(text: str, pattern: re.Pattern[str], where: str) -> list[tuple[str, str]]:
    """The lines of ``links`` or ``modes``; empty lines and comments are passed over."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = pattern.match(line.strip())
        if match is None or ".." in match[2].split("/"):
            raise StageError(f"{where}:{number}: {line!r} is not understood", hint="see docs/nested-check.md")
        pairs.append((match[1], match[2]))
    return pairs


def compile_argv(sources: Sequence[str], output: Path, version: str, *, extra: Sequence[str] = ()) -> list[str]:
    """musl-gcc's command line for a static program. Run it in the folder of the sources: no path enters the bytes."""
    return [
        "musl-gcc", "-std=gnu11", "-Os", "-static", "-s", "-fstack-protector-strong", "-Wall", "-Wextra",
        "-Wconversion", "-Wno-sign-conversion", "-ffile-prefix-map=.=.", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
        f'-DVERSION="{version}"',
        # musl-gcc leaves the kernel's headers (linux/kvm.h) out; musl's own must win.
        "-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu",
        *extra, "-o", str(output), *sources,
    ]  # fmt: skip


def built_using(tools: Sequence[str]) -> str:
    """Policy 7.8: the source package and version of what the programs were linked with statically."""
    version = dict(tool.split("=", 1) for tool in tools).get("musl-dev", "")
    if not version:
        raise StageError("the tools root has no musl-dev", hint="make it anew: it must hold the package musl-tools")
    return f"musl (= {re.sub(r'[+]b[0-9]+$', '', version)})"


def dpkg_deb_argv(tree: Path, output: Path) -> list[str]:
    """dpkg-deb(1)'s command line. One thread: several would cut the compressed stream by their number."""
    return ["dpkg-deb", "--root-owner-group", "--threads-max=1", "-Zxz", "--build", str(tree), str(output)]


def build_package(package: PackageSource, tools: Sequence[str], work: Work) -> None:
    """Lay out one package's tree in the scratch folder, compile what it has, and pack it.

    ``tools`` are ``name=version``: a statically linked library is named in the package (Static-Built-Using).
    """
    folder = work.scratch / package.name
    copy_sources(package, folder / "source")
    source, tree = folder / "source", folder / "tree"
    fields = parse_control((source / "DEBIAN/control").read_text(), f"{package.name}/DEBIAN/control")
    if fields["Package"] != package.name:
        raise StageError(f"{package.name}/DEBIAN/control names the package {fields['Package']!r}")
    changelog = source / "changelog"
    epoch = changelog_epoch(changelog.read_text()) if changelog.exists() else _DEFAULT_EPOCH
    (source / "root").mkdir(exist_ok=True)
    shutil.copytree(source / "root", tree, symlinks=True)
    shutil.copytree(source / "DEBIAN", tree / "DEBIAN")
    _compile(package.name, source / "src", tree, fields["Version"], epoch, work)
    if changelog.exists():
        target = tree / f"usr/share/doc/{package.name}/changelog"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(changelog, target)
    _make_links(source, tree, package.name)
    _compress(tree, work)
    _set_modes(source, tree, package.name)
    if package.name in PROGRAMS:
        fields["Static-Built-Using"] = built_using(tools)
    write_control(tree, fields)
    set_times(tree, epoch)
    _run(dpkg_deb_argv(tree, work.out / f"{package.name}.deb"), work, epoch=epoch, writable=[work.out])
    reporter.detail(f"packed {package.name}.deb")


def copy_sources(package: PackageSource, target: Path) -> None:
    """Copy a package folder. StageError if a file is no longer what its digest says: the key would lie."""
    for item in package.files:
        path = target / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if item.link is not None:
            path.symlink_to(item.link)
            continue
        assert item.ref is not None
        data = item.ref.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != item.ref.sha256:
            raise StageError(f"{item.ref.path} changed during the build", hint="run the build again")
        path.write_bytes(data)
        script = item.path.startswith("DEBIAN/") and path.name in _SCRIPTS
        path.chmod(0o755 if item.executable or script else 0o644)


def _run(
    argv: Sequence[str], work: Work, *, epoch: int, writable: Sequence[Path] = (), cwd: Path | None = None
) -> None:
    work.context.tools.run(
        argv, writable=[work.scratch, *writable], cwd=cwd or work.scratch, log_path=work.log,
        env={"SOURCE_DATE_EPOCH": str(epoch)}, timeout_seconds=300,
    )  # fmt: skip


def _compile(name: str, sources: Path, tree: Path, version: str, epoch: int, work: Work) -> None:
    for installed, parts in PROGRAMS.get(name, {}).items():
        target = tree / installed
        target.parent.mkdir(parents=True, exist_ok=True)
        _run(compile_argv(parts, target, version), work, epoch=epoch, cwd=sources)
        target.chmod(0o755)
    for installed, members in ARCHIVES.get(name, {}).items():
        target = tree / installed
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(newc(archive_entries({n: (tree / p).read_bytes() for n, p in members.items()})))
    for installed in PROGRAMS.get(name, {}):
        if installed in _ONLY_IN_ARCHIVES:
            (tree / installed).unlink()


def archive_entries(programs: Mapping[str, bytes]) -> list[Entry]:
    """What an initramfs of ours holds: the programs, mount points, and the console that the kernel opens for init."""
    folders = [Entry(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys", "modules")]
    console = Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    files = [Entry(name, stat.S_IFREG | 0o755, data) for name, data in sorted(programs.items())]
    return [*folders, console, *files]


def _make_links(source: Path, tree: Path, package: str) -> None:
    path = source / "links"
    for target, name in parse_pairs(path.read_text(), LINK_LINE, f"{package}/links") if path.exists() else ():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(target)


def _compress(tree: Path, work: Work) -> None:
    """Manual pages and changelogs are compressed, without name and time, as Debian's policy wants them."""
    names = [p for p in sorted(tree.glob("usr/share/man/**/*.[0-9]")) if p.is_file() and not p.is_symlink()]
    names += sorted(tree.glob("usr/share/doc/*/changelog"))
    if names:
        _run(["gzip", "-9n", *map(str, names)], work, epoch=0)


def _set_modes(source: Path, tree: Path, package: str) -> None:
    # The umask of whoever builds must not matter.
    for path in _walk(tree):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    modes = source / "modes"
    for mode, name in parse_pairs(modes.read_text(), MODE_LINE, f"{package}/modes") if modes.exists() else ():
        if not (tree / name).exists():
            raise StageError(f"{package}/modes names {name}, which is not in the package")
        (tree / name).chmod(int(mode, 8))


def _walk(tree: Path) -> list[Path]:
    return [tree, *sorted(tree.rglob("*"))]


def installed_kib(tree: Path) -> int:
    """Installed-Size as dpkg-gencontrol(1) counts: each file rounded up to KiB, 1 for anything else."""
    total = 0
    for path in tree.rglob("*"):
        if path.relative_to(tree).parts[0] == "DEBIAN":
            continue
        regular = path.is_file() and not path.is_symlink()
        total += (path.stat().st_size + 1023) // 1024 if regular else 1
    return total


def write_control(tree: Path, fields: Mapping[str, str]) -> None:
    """Complete ``DEBIAN/``: Installed-Size, md5sums (dpkg --verify reads them), and conffiles for all below /etc."""
    control = tree / "DEBIAN/control"
    lines = [f"{name}: {value}" for name, value in fields.items() if name not in ("Installed-Size", "Description")]
    lines += [f"Installed-Size: {installed_kib(tree)}", f"Description: {fields['Description']}"]
    control.write_text("\n".join(lines) + "\n")
    files = [p for p in _walk(tree) if p.is_file() and not p.is_symlink() and "DEBIAN" not in p.relative_to(tree).parts]
    names = [p.relative_to(tree).as_posix() for p in files]
    conffiles = sorted(f"/{name}" for name in names if name.startswith("etc/"))
    if conffiles and not (tree / "DEBIAN/conffiles").exists():
        (tree / "DEBIAN/conffiles").write_text("".join(f"{name}\n" for name in conffiles))
    sums = {
        n: hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest() for n, p in zip(names, files, strict=True)
    }
    known = "".join(f"{digest}  {name}\n" for name, digest in sums.items() if f"/{name}" not in conffiles)
    (tree / "DEBIAN/md5sums").write_text(known)
    for path in (control, tree / "DEBIAN/md5sums", tree / "DEBIAN/conffiles"):
        if path.exists():
            path.chmod(0o644)


def set_times(tree: Path, epoch: int) -> None:
    """Give everything the same time, deepest first (a folder's own changes with its entries)."""
    paths: Iterable[Path] = reversed(_walk(tree))
    for path in paths:
        os.utime(path, (epoch, epoch), follow_symlinks=False)
