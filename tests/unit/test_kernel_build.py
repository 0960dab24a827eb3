"""The kernel's package and the build's bookkeeping: names, scripts as dpkg runs them, progress."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from recvirt.errors import StageError
from recvirt.kconfig import debpackage
from recvirt.stages.kernel_build import KeptObjects, Meter, ccache_counts, make_env, set_modes

RELEASE = "6.12.117-recvirt-1a2b3c4d"


@pytest.mark.parametrize(
    ("source", "kernel", "wanted"),
    [
        ("6.12.117-1", "6.12.117", "6.12.117-1+recvirt1"),
        ("7.3.4-1~bpo13+1", "7.3.4", "7.3.4-1~bpo13+1+recvirt1"),
        ("", "6.12.117", "6.12.117-0+recvirt1"),
        ("", "7.4.0-rc3", "7.4.0~rc3-0+recvirt1"),
    ],
)
def test_versions_follow_the_source(source: str, kernel: str, wanted: str) -> None:
    assert debpackage.package_version(source, kernel) == wanted


@pytest.mark.parametrize("release", ["", "6", "6.12; rm -rf /", "../x", "6.12 x", "6.12$x", "6" + "x" * 70])
def test_a_release_that_could_do_harm_in_a_script_is_refused(release: str) -> None:
    with pytest.raises(StageError, match="can't be a kernel release"):
        debpackage.maintainer_scripts(release)


def run_script(tmp_path: Path, name: str, argument: str, **env: str) -> list[str]:
    """Run a maintainer script with a tree's hooks; what run-parts was asked to do."""
    text = debpackage.maintainer_scripts(RELEASE)[name]
    hooks = tmp_path / "etc/kernel"
    (hooks / f"{name}.d").mkdir(parents=True, exist_ok=True)
    script = tmp_path / name
    script.write_text(text.replace("/etc/kernel", str(hooks)).replace("/usr/", f"{tmp_path}/usr/"))
    binaries = tmp_path / "bin"
    binaries.mkdir(exist_ok=True)
    log = tmp_path / "log"
    log.write_text("")
    (binaries / "run-parts").write_text(f'#!/bin/sh\necho "$DEB_MAINT_PARAMS: $*" >> {log}\n')
    (binaries / "run-parts").chmod(0o755)
    path = f"{binaries}:{os.environ['PATH']}"
    subprocess.run(["sh", script, argument], env={"PATH": path, **env}, check=True)
    return log.read_text().replace(str(tmp_path), "").splitlines()


@pytest.mark.parametrize(
    ("name", "argument"), [("preinst", "install"), ("postinst", "configure"), ("prerm", "remove"), ("postrm", "remove")]
)
def test_scripts_run_the_hooks_of_the_tree_they_are_in(tmp_path: Path, name: str, argument: str) -> None:
    (line,) = run_script(tmp_path, name, argument)
    assert line.startswith(f"{argument}: ") and line.endswith(f" /etc/kernel/{name}.d")
    assert f"--arg={RELEASE} --arg=/boot/vmlinuz-{RELEASE}" in line


def test_scripts_do_nothing_from_outside_a_tree(tmp_path: Path) -> None:
    for name in ("preinst", "postinst", "prerm", "postrm"):
        assert run_script(tmp_path, name, "configure", DPKG_ROOT="/some/tree") == []


def test_removal_takes_what_depmod_left(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/modules" / RELEASE
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("")
    run_script(tmp_path, "postrm", "upgrade")
    assert folder.exists()
    run_script(tmp_path, "postrm", "remove")
    assert not folder.exists()
    (folder / "extra").mkdir(parents=True)
    run_script(tmp_path, "postrm", "purge")
    assert (folder / "extra").exists()


def test_the_control_file_is_one_paragraph() -> None:
    text = debpackage.control_text(
        release=RELEASE, version="1-1", kernel_version="6.12.117", installed_kb=7, source="linux-source-6.12\nx"
    )
    lines = text.splitlines()
    assert lines[0] == f"Package: linux-image-{RELEASE}" and "Installed-Size: 7" in lines
    assert all(line and (line[0] == " " or ": " in line) for line in lines)
    assert " Built from linux-source-6.12 x." in lines


def test_sums_and_sizes_leave_the_control_files_out(tmp_path: Path) -> None:
    (tmp_path / "DEBIAN").mkdir()
    (tmp_path / "DEBIAN/control").write_text("x" * 5000)
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/a").write_text("a" * 1025)
    (tmp_path / "boot/b").symlink_to("a")
    assert debpackage.installed_kb(tmp_path) == 1 + 2 + 1
    digest = hashlib.md5(b"a" * 1025).hexdigest()
    assert debpackage.md5sums_text(tmp_path) == f"{digest}  boot/a\n"
    set_modes(tmp_path)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("boot", "boot/a", "DEBIAN/control")]
    assert modes == [0o755, 0o644, 0o644]


def test_the_meter_counts_steps_warnings_and_time() -> None:
    meter = Meter(10)
    for line in (
        "make[1]: Entering directory '/kernel/build'", "  CC      init/main.o", "  CC [M]  fs/fuse/dev.o",
        "  OBJTOOL vmlinux.o", "  some text of another kind", "init/main.c:3:1: warning: unused x",
        "0m0.003s 0m0.001s", "61m10.250s 7m1.500s",
    ):  # fmt: skip
        meter.line(line)
    assert meter.steps == 3 and len(meter.warnings) == 1
    assert meter.cpu_seconds == pytest.approx(68 * 60 + 11.75)


def test_builds_depend_on_the_sources_time_and_the_compilers_package() -> None:
    env = make_env(0, "gcc-14=14.2.0-19")
    assert env["KBUILD_BUILD_TIMESTAMP"] == "Thu, 01 Jan 1970 00:00:00 GMT" and env["SOURCE_DATE_EPOCH"] == "0"
    assert env["CCACHE_COMPILERCHECK"] == "string:gcc-14=14.2.0-19"


def test_ccache_is_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ccache_counts(log) == {"hits": 0, "misses": 0}
    log.write_text("# a.c\ndirect_cache_hit\n# b.c\ndirect_cache_miss\npreprocessed_cache_hit\n# c.c\ncache_miss\n")
    assert ccache_counts(log) == {"hits": 2, "misses": 1}


def test_objects_are_kept_for_the_same_tools_only(tmp_path: Path) -> None:
    kept = KeptObjects(tmp_path / "kept", ("gcc-14=1",))
    assert not kept.take(tmp_path / "one/build")
    (tmp_path / "one/build/a.o").write_text("a")
    kept.give(tmp_path / "one/build")
    assert not (tmp_path / "one/build").exists()
    assert kept.take(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["a.o"]
    # Meanwhile there is nothing to take, and what comes back later replaces what came first.
    assert not kept.take(tmp_path / "three/build")
    kept.give(tmp_path / "two")
    kept.give(tmp_path / "three/build")
    assert KeptObjects(tmp_path / "kept", ("gcc-14=2",)).take(tmp_path / "four") is False
    assert list((tmp_path / "four").iterdir()) == [] and not (tmp_path / "kept").exists()


def test_objects_without_a_stamp_are_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a.o").write_text("half")
    assert not KeptObjects(tmp_path / "kept", ()).take(tmp_path / "build")
    assert list((tmp_path / "build").iterdir()) == []
