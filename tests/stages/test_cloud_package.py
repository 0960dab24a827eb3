"""The cloud's packages under the real dpkg: installed, upgraded, refused; systemd only takes notes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.run import Completed
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_debs import build_package, read_package
from tests.unit.test_cloud_package import CENTRAL, COMMON, PACKAGES, TAKE_OVER, WORKER, Machine

STOP = "systemctl stop recvirt-cloud.target"


class Dpkg:
    """A machine of dpkg's: a tree of its own, maintainer scripts that find our programs first."""

    def __init__(self, tools: ToolsRoot, base: Path) -> None:
        self.tools, self.base, self.machine = tools, base, Machine(base / "machine")
        # The real ones compare, know what is installed, and look at triggers.
        for name in ("dpkg", "dpkg-query", "dpkg-trigger"):
            (self.machine.folder / "bin" / name).unlink()
        (base / "root/var/lib/dpkg").mkdir(parents=True)
        (base / "root/var/lib/dpkg/status").touch()

    def build(self, version: str) -> list[Path]:
        """The packages of a version."""
        return [self.pack(name, self._sources(name, version)) for name in PACKAGES]

    def build_one(self) -> Path:
        """The one package that 0.1.0 was: all files, and scripts that know no triggers."""
        folder = self.base / "0.1.0" / COMMON
        for name in PACKAGES:
            shutil.copytree(data_path("packages") / name / "root", folder / "root", dirs_exist_ok=True)
        (folder / "DEBIAN").mkdir()
        control = (data_path("packages") / COMMON / "DEBIAN/control").read_text()
        (folder / "DEBIAN/control").write_text(re.sub(r"(?m)^Version: .*$", "Version: 0.1.0", control))
        (folder / "DEBIAN/prerm").write_text(_OLD_PRERM)
        return self.pack(COMMON, folder)

    def _sources(self, name: str, version: str) -> Path:
        folder = self.base / version / name
        shutil.copytree(data_path("packages") / name, folder)
        control = folder / "DEBIAN/control"
        # Of the package, and of the one that a role wants; not that of the split.
        text = re.sub(r"(?m)^Version: .*$", f"Version: {version}", control.read_text())
        control.write_text(re.sub(r"recvirt-cloud \(= .*?\)", f"recvirt-cloud (= {version})", text))
        return folder

    def pack(self, name: str, sources: Path) -> Path:
        """A package folder as a package."""
        out, scratch = sources.parent / f"out-{name}", sources.parent / f"scratch-{name}"
        for folder in (out, scratch):
            folder.mkdir()
        context = Context(tools=self.tools, cache_dir=self.base / "cache")
        build_package(read_package(sources), (), Work(out, scratch, sources.parent / "log", context))
        return out / f"{name}.deb"

    def install(self, *debs: Path) -> Completed:
        """As apt does it: what has to be taken out of service meanwhile is."""
        return self.run("--auto-deconfigure", "--install", *map(str, debs))

    def run(self, *words: str) -> Completed:
        """dpkg in the sandbox, on a machine that systemd runs."""
        self.machine.log.unlink(missing_ok=True)
        code = 'mkdir -p /run/systemd/system; export PATH="$1:$PATH"; shift; exec dpkg "$@"'
        argv = [f"--root={self.base}/root", "--force-script-chrootless", "--force-depends",
                "--path-include=/usr/share/man/*"]  # fmt: skip
        folder = self.machine.folder
        return self.tools.run(
            ["sh", "-c", code, "sh", f"{folder}/bin", *argv, *words], writable=[self.base], check=False,
            env={"LOG": str(self.machine.log), "STATE": f"{folder}/state"},
        )  # fmt: skip

    def state(self) -> set[str]:
        """Version and state of all packages: one word when they are alike."""
        root = self.base / "root"
        words = ["dpkg-query", f"--root={root}", "-W", "-f", "${Version} ${db:Status-Status}\\n"]
        return set(self.tools.run(words, readable=[root]).stdout.splitlines())


_OLD_PRERM = """\
#!/bin/sh
set -e
[ -d /run/systemd/system ] || exit 0
if [ "$1" = upgrade ] && systemctl is-active --quiet recvirt-cloud.target; then
    touch /run/recvirt-cloud-upgrade
    systemctl stop recvirt-cloud.target
fi
"""


@pytest.fixture
def dpkg(tools: ToolsRoot, tmp_path: Path) -> Dpkg:
    return Dpkg(tools, tmp_path)


def test_a_life_under_dpkg(dpkg: Dpkg) -> None:
    old, new = dpkg.build("0.1.1"), dpkg.build("0.2.0")
    machine = dpkg.machine
    done = dpkg.install(*old)
    assert done.status == 0 and dpkg.state() == {"0.1.1 installed"}, done.stderr
    assert machine.asked() == []
    tree = dpkg.base / "root/usr"
    assert (tree / "share/man/man1/recvirt-cloud.1.gz").is_file()
    assert (tree / "share/bash-completion/completions/recvirt-cloud").is_file()
    assert (tree / "lib/python3/dist-packages/recvirt/nestedcloud/central/migrations/0001_initial.py").is_file()
    assert os.access(tree / "lib/recvirt-cloud/firewall", os.X_OK)
    wants = tree / "lib/systemd/system/recvirt-cloud.target.wants"
    assert all(path.resolve().is_file() for path in wants.iterdir()) and len(list(wants.iterdir())) >= 8

    machine.active.touch()
    done = dpkg.install(*new)
    assert done.status == 0 and dpkg.state() == {"0.2.0 installed"}, done.stderr
    # Once for all three. The tmpfs of the sandbox, where the mark is left, is the same for all of one dpkg.
    assert machine.asked() == [STOP, *TAKE_OVER] and machine.active.exists()

    done = dpkg.install(*old)
    assert done.status != 0 and dpkg.state() == {"0.2.0 installed"}
    assert "can't take over from 0.2.0" in done.stderr
    # dpkg had the old scripts stop it, and then start it again.
    assert machine.active.exists()

    machine.broken.touch()
    done = dpkg.install(*new)
    assert done.status != 0 and "0.2.0 half-configured" in dpkg.state(), done.stderr
    assert "dpkg --configure -a" in done.stderr and not machine.active.exists()
    machine.broken.unlink()
    machine.active.touch()
    assert dpkg.run("--configure", "-a").status == 0 and dpkg.state() == {"0.2.0 installed"}
    assert machine.asked() == TAKE_OVER

    assert dpkg.run("--remove", WORKER).status == 0 and machine.active.exists()
    assert not any("target" in line for line in machine.asked())
    assert dpkg.run("--remove", COMMON, CENTRAL).status == 0
    assert any(line.startswith(STOP) for line in machine.asked())


@pytest.mark.parametrize("order", ["common first", "roles first"])
def test_the_one_package_of_the_first_version_becomes_three(dpkg: Dpkg, order: str) -> None:
    machine = dpkg.machine
    assert dpkg.install(dpkg.build_one()).status == 0 and dpkg.state() == {"0.1.0 installed"}
    machine.active.touch()
    new = dpkg.build("0.1.1")
    done = dpkg.install(*(new if order == "common first" else reversed(new)))
    assert done.status == 0 and dpkg.state() == {"0.1.1 installed"}, done.stderr
    assert machine.asked() == [STOP, *TAKE_OVER] and machine.active.exists()
    unit = "usr/lib/systemd/system/recvirt-cloud-worker.service"
    assert (dpkg.base / "root" / unit).is_file()
    owner = dpkg.run("--search", f"/{unit}")
    assert owner.stdout.startswith(f"{WORKER}: "), owner.stderr
