"""Compiles the kernel that ``kernel_config`` resolved, and packs it as a Debian package.

Outputs: ``linux-image.deb``, ``vmlinuz``, ``config``, ``release`` (``uname -r``), ``build-info.json``.
The same configuration, source and tools give the same package: compiled at fixed paths inside the sandbox, with the
source's own time, a fixed builder, and no key made on the way. What was compiled is kept for the next kernel of the
same source, where kbuild compiles only what a changed symbol touches; ccache serves when there is no such copy.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

from recvirt.errors import StageError
from recvirt.kconfig import debpackage
from recvirt.kconfig.dotconfig import compare, count_values, parse_dotconfig
from recvirt.kconfig.origin import source_of
from recvirt.kconfig.resolve import INSIDE_BUILD, INSIDE_SOURCE, make_argv
from recvirt.kconfig.source import UNPACKED_BYTES, Source, Unpacked, ensure_source
from recvirt.kconfig.toolchain import build_tools, compiler
from recvirt.model import Profile
from recvirt.stages.base import Context, Work
from recvirt.store import Upstream, remove_tree
from recvirt.ui import format_bytes, format_seconds, reporter

ARCH = "x86_64"
INSIDE_CCACHE = Path("/kernel/ccache")
CCACHE_LOG = "ccache.log"
CCACHE_SIZE = "5G"
#: kbuild's quiet output: "  CC [M]  fs/ext4/super.o". Lines of other programs are not indented like this.
_STEP = re.compile(r"^  [A-Z][A-Z0-9_-]+ +(\[M\] +)?\S")
_TIMES = re.compile(r"^(\d+)m([\d.]+)s (\d+)m([\d.]+)s$")
#: What the compiler and linker say without being asked; a kernel of ours builds without a word.
_WARNING = re.compile(r"\bwarning:", re.I)
#: Steps a build takes for each symbol that is y or m: a first guess, until a build of this source was counted.
_STEPS_PER_SYMBOL = 2.6
_OBJECTS_BYTES = 3_000_000_000


@dataclass(frozen=True)
class KernelBuildInputs:
    """What decides about the kernel's bytes."""

    config: Upstream
    source: Source
    arch: str
    tools: tuple[str, ...]
    package_revision: int


@dataclass
class Meter:
    """What make says while it runs: steps for the progress, warnings, the CPU time at its end, ccache's words."""

    expected: float
    steps: int = 0
    warnings: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def line(self, text: str) -> None:
        """Take one line of output."""
        if _STEP.match(text):
            self.steps += 1
            reporter.progress("compile", min(self.steps, self.expected), self.expected, "steps")
        elif match := _TIMES.match(text):
            # The shell's own line comes first, its children's second.
            minutes, seconds = int(match[1]) + int(match[3]), float(match[2]) + float(match[4])
            self.cpu_seconds = minutes * 60 + seconds
        elif _WARNING.search(text):
            self.warnings.append(text)


class KernelBuild:
    """The stage."""

    name = "kernel_build"
    revision = 1
    needs: tuple[str, ...] = ("kernel_config",)

    def inputs(self, profile: Profile, upstream: Mapping[str, str], context: Context) -> KernelBuildInputs:
        """The configuration's key, the pinned source and the tools; nothing of the profile itself."""
        return KernelBuildInputs(
            Upstream("kernel_config", upstream["kernel_config"]), source_of(profile, context), ARCH,
            build_tools(context.tools), debpackage.REVISION,
        )  # fmt: skip

    def build(self, inputs: KernelBuildInputs, work: Work) -> None:
        """Compile and pack."""
        context = work.context
        source = ensure_source(inputs.source, context.tools, context.cache_dir, work.log, offline=context.offline)
        builder = _Builder(inputs, work, source)
        builder.configure()
        started = time.monotonic()
        meter = builder.compile()
        seconds = time.monotonic() - started
        builder.install_modules()
        deb = builder.pack()
        builder.write_outputs(deb, meter, seconds)
        builder.keep_objects()

    def space_bytes(self, inputs: KernelBuildInputs) -> int:
        """Room for the source and the objects."""
        del inputs
        return UNPACKED_BYTES + _OBJECTS_BYTES


class KeptObjects:
    """The objects of the last build of one source, made by the same tools.

    Taken and given by renaming: a build that is killed loses them and nothing half-made is ever left; of two builds at
    once, one takes them.
    """

    STAMP = "recvirt-tools"

    def __init__(self, folder: Path, tools: Sequence[str]) -> None:
        self.folder = folder
        self.stamp = "\n".join(tools) + "\n"

    def take(self, target: Path) -> bool:
        """Move the objects to ``target`` (which must not exist), or make it as an empty folder."""
        try:
            self.folder.rename(target)
        except FileNotFoundError:
            target.mkdir(parents=True)
            return False
        stamp = target / self.STAMP
        if stamp.is_file() and stamp.read_text() == self.stamp:
            stamp.unlink()
            return True
        remove_tree(target)
        target.mkdir()
        return False

    def give(self, source: Path) -> None:
        """Move a finished build's objects here, in place of older ones (which end beside ``source``)."""
        (source / self.STAMP).write_text(self.stamp)
        with suppress(FileNotFoundError):
            self.folder.rename(source.with_name("older-objects"))
        # Another build may have been quicker: one copy is enough.
        with suppress(OSError):
            source.rename(self.folder)


def make_env(epoch: int, compiler_pin: str) -> dict[str, str]:
    """The environment of a reproducible build (Documentation/kbuild/reproducible-builds.rst)."""
    return {
        "KBUILD_BUILD_TIMESTAMP": formatdate(epoch, usegmt=True),
        "KBUILD_BUILD_USER": "recvirt",
        "KBUILD_BUILD_HOST": "recvirt",
        "KBUILD_BUILD_VERSION": "1",
        "SOURCE_DATE_EPOCH": str(epoch),
        "CCACHE_DIR": str(INSIDE_CCACHE),
        "CCACHE_MAXSIZE": CCACHE_SIZE,
        # Without the preprocessor: running it costs half as much as compiling. Objects are then found by the contents
        # of all that they include, the configuration among it; when that changes, the kept objects serve.
        "CCACHE_DEPEND": "1",
        # The compiler's package is a better witness than its file's time, which each tools root sets anew.
        "CCACHE_COMPILERCHECK": f"string:{compiler_pin}",
        "CCACHE_STATSLOG": str(INSIDE_BUILD / CCACHE_LOG),
    }


class _Builder:
    """One build: the folders and the steps."""

    def __init__(self, inputs: KernelBuildInputs, work: Work, source: Unpacked) -> None:
        self.inputs, self.work, self.source = inputs, work, source
        self.config_path = work.upstream_dirs["kernel_config"] / "config"
        self.build_dir = work.scratch / "build"
        self.package_dir = self.build_dir / "package"
        self.kept = KeptObjects(work.context.cache_dir / "sources" / f"{inputs.source.key}.objects", inputs.tools)
        self.kept.take(self.build_dir)
        self.package_dir.mkdir()
        self.ccache_dir = work.context.cache_dir / "ccache"
        self.ccache_dir.mkdir(parents=True, exist_ok=True)
        self.steps_path = self.ccache_dir / f"steps-{inputs.source.key}"
        self.ccache_log = self.build_dir / CCACHE_LOG
        self.release = ""

    def _make(self, *words: str, meter: Meter | None = None, jobs: int | None = None) -> list[str]:
        """Run make inside; returns what it said on lines that are no steps."""
        said: list[str] = []

        def take(line: str) -> None:
            if meter is not None:
                meter.line(line)
            said.append(line)

        argv = make_argv(self.inputs.arch, "CC=ccache gcc", "HOSTCC=ccache gcc", *words, jobs=jobs)
        self._run(["bash", "-c", '"$@"; status=$?; times; exit $status', "bash", *argv], take)
        return said

    def _run(self, argv: list[str], take: Any = None) -> None:
        tools = self.work.context.tools
        tools.run(
            argv, writable_at={INSIDE_BUILD: self.build_dir, INSIDE_CCACHE: self.ccache_dir},
            cover={INSIDE_SOURCE: self.source.tree}, cwd=INSIDE_BUILD, log_path=self.work.log, on_line=take,
            env=make_env(self.source.epoch, compiler(tools)),
        )  # fmt: skip

    def configure(self) -> None:
        """Put the configuration in place; StageError if this tree would answer it differently now."""
        target = self.build_dir / ".config"
        shutil.copyfile(self.config_path, target)
        # The second rewrites include/config, where kernelrelease looks: kept objects brought another configuration's.
        self._make("-s", "olddefconfig")
        self._make("-s", "syncconfig")
        before, after = (parse_dotconfig(p.read_text(encoding="utf-8")) for p in (self.config_path, target))
        if changes := compare(before, after):
            names = ", ".join(f"{c.symbol} {c.left} to {c.right}" for c in changes[:5])
            raise StageError(f"the tree changes the resolved configuration: {names}", hint="recvirt clean, build again")
        words = self._make("-s", "kernelrelease")
        self.release = debpackage.checked_release(next(word for word in words if word and not _TIMES.match(word)))

    def expected_steps(self) -> float:
        """How many steps a build takes: as many as the last one of this source, else a guess from the symbols."""
        try:
            return float(self.steps_path.read_text())
        except (OSError, ValueError):
            counts = count_values(parse_dotconfig(self.config_path.read_text(encoding="utf-8")))
            return _STEPS_PER_SYMBOL * (counts["y"] + counts["m"])

    def compile(self) -> Meter:
        """``make bzImage modules``."""
        meter = Meter(self.expected_steps())
        # So far the compiler was only asked what it can do (Kconfig's cc-option), the second time from the cache.
        self.ccache_log.unlink(missing_ok=True)
        self._make("bzImage", "modules", meter=meter, jobs=self.work.context.jobs)
        if meter.steps > 100:
            self.steps_path.write_text(str(meter.steps))
        return meter

    def install_modules(self) -> None:
        """Modules, stripped and compressed, with depmod's files, below ``usr/lib/modules``."""
        target = INSIDE_BUILD / self.package_dir.name / "usr"
        self._make(f"INSTALL_MOD_PATH={target}", "INSTALL_MOD_STRIP=1", "modules_install", jobs=self.work.context.jobs)
        folder = self.package_dir / "usr/lib/modules" / self.release
        for name in ("build", "source"):
            (folder / name).unlink(missing_ok=True)
        if not (folder / "modules.dep.bin").exists():
            raise StageError("depmod left no index of the modules", hint=f"the log: {self.work.log}")

    def pack(self) -> Path:
        """Write the package's other files and build it; returns its path."""
        root, release, source = self.package_dir, self.release, self.inputs.source
        name = debpackage.package_name(release)
        (root / "boot").mkdir()
        shutil.copyfile(self.build_dir / "arch/x86/boot/bzImage", root / f"boot/vmlinuz-{release}")
        shutil.copyfile(self.config_path, root / f"boot/config-{release}")
        facts = {"release": release, "kernel_version": self.source.version, "source": source.label}
        doc = root / "usr/share/doc" / name
        doc.mkdir(parents=True)
        patches = {patch.name: patch.sha256 for patch in source.patches}
        (doc / "copyright").write_text(debpackage.copyright_text(**facts, patches=patches))
        control = root / "DEBIAN"
        control.mkdir()
        for script, text in debpackage.maintainer_scripts(release).items():
            (control / script).write_text(text)
        (control / "md5sums").write_text(debpackage.md5sums_text(root))
        version = debpackage.package_version(source.version, self.source.version)
        size = debpackage.installed_kb(root)
        (control / "control").write_text(debpackage.control_text(**facts, version=version, installed_kb=size))
        set_modes(root)
        inside = INSIDE_BUILD / root.name
        # Modules and image are compressed already: a light pass is enough, and quick to undo when an image is made.
        self._run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z3", "-b", str(inside), f"{inside}.deb"])
        return root.with_name(f"{root.name}.deb")

    def write_outputs(self, deb: Path, meter: Meter, seconds: float) -> None:
        """Move what counts into ``work.out``."""
        out, root = self.work.out, self.package_dir
        deb.rename(out / "linux-image.deb")
        shutil.copyfile(root / f"boot/vmlinuz-{self.release}", out / "vmlinuz")
        shutil.copyfile(self.config_path, out / "config")
        (out / "release").write_text(self.release + "\n")
        info = self._info(meter, seconds)
        (out / "build-info.json").write_text(json.dumps(info, indent=1) + "\n")
        for warning in meter.warnings:
            reporter.detail(f"kernel: {warning}")
        sizes = info["bytes"]
        reporter.info(
            f"{self.release}: image {format_bytes(sizes['vmlinuz'])}, {info['modules']} modules "
            f"{format_bytes(sizes['modules'])}, package {format_bytes(sizes['package'])}; "
            f"{format_seconds(meter.cpu_seconds)} of CPU time"
        )

    def keep_objects(self) -> None:
        """Leave what was compiled to the next build, unless debug information makes it huge."""
        config = parse_dotconfig(self.config_path.read_text(encoding="utf-8"))
        if config.get("DEBUG_INFO", "n") == "n":
            remove_tree(self.package_dir)
            self.ccache_log.unlink(missing_ok=True)
            self.kept.give(self.build_dir)

    def _info(self, meter: Meter, seconds: float) -> dict[str, Any]:
        source = self.inputs.source
        modules = sorted(self.package_dir.rglob("*.ko*"))
        return {
            "format": 1,
            "release": self.release,
            "package": debpackage.package_name(self.release),
            "version": debpackage.package_version(source.version, self.source.version),
            "kernel_version": self.source.version,
            "source": source.label,
            "source_sha256": source.digest,
            "patches": [{"name": patch.name, "sha256": patch.sha256} for patch in source.patches],
            "compiler": compiler(self.work.context.tools),
            "modules": len(modules),
            "bytes": {
                "vmlinuz": (self.work.out / "vmlinuz").stat().st_size,
                "modules": sum(path.stat().st_size for path in modules),
                "package": (self.work.out / "linux-image.deb").stat().st_size,
            },
            "steps": meter.steps,
            "warnings": meter.warnings,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(meter.cpu_seconds, 1),
            "ccache": ccache_counts(self.ccache_log),
        }


def ccache_counts(statslog: Path) -> dict[str, int]:
    """Hits and misses of one build, from ccache's CCACHE_STATSLOG."""
    try:
        words = statslog.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        words = []
    hits = sum(word in ("direct_cache_hit", "preprocessed_cache_hit") for word in words)
    return {"hits": hits, "misses": sum(word == "cache_miss" for word in words)}


def set_modes(root: Path) -> None:
    """Ordinary modes everywhere, whatever the umask was: folders and scripts 0755, files 0644."""
    for path in [root, *root.rglob("*")]:
        if path.is_symlink():
            continue
        script = path.parent.name == "DEBIAN" and path.name in ("preinst", "postinst", "prerm", "postrm")
        path.chmod(0o755 if path.is_dir() or script else 0o644)
