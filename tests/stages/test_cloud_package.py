"""recvirt-cloud as a package under the real dpkg: installed, upgraded, refused; systemd only takes notes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recvirt.data import data_path
from recvirt.run import Completed
from recvirt.sandbox import ToolsRoot
from recvirt.stages.base import Context, Work
from recvirt.stages.guest_debs import build_package, read_package
from tests.unit.test_cloud_package import TAKE_OVER, Machine

NAME = "recvirt-cloud"


class Dpkg:
    """A machine of dpkg's: a tree of its own, maintainer scripts that find our programs first."""

    def __init__(self, tools: ToolsRoot, base: Path) -> None:
        self.tools, self.base, self.machine = tools, base, Machine(base / "machine")
        # The real one compares.
        (self.machine.folder / "bin/dpkg").unlink()
        (base / "root/var/lib/dpkg").mkdir(parents=True)
        (base / "root/var/lib/dpkg/status").touch()

    def build(self, version: str) -> Path:
        """The package of a version."""
        folder = self.base / version
        shutil.copytree(data_path("packages") / NAME, folder / NAME)
        control = folder / NAME / "DEBIAN/control"
        control.write_text(control.read_text().replace("Version: 0.1.0", f"Version: {version}"))
        for name in ("out", "scratch"):
            (folder / name).mkdir()
        context = Context(tools=self.tools, cache_dir=folder / "cache")
        build_package(
            read_package(folder / NAME), (), Work(folder / "out", folder / "scratch", folder / "log", context)
        )
        return folder / "out" / f"{NAME}.deb"

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

    def state(self) -> str:
        """Version and state."""
        root = self.base / "root"
        words = ["dpkg-query", f"--root={root}", "-W", "-f", "${Version} ${db:Status-Status}", NAME]
        return self.tools.run(words, readable=[root]).stdout


@pytest.fixture
def dpkg(tools: ToolsRoot, tmp_path: Path) -> Dpkg:
    return Dpkg(tools, tmp_path)


def test_a_life_under_dpkg(dpkg: Dpkg) -> None:
    old, new = dpkg.build("0.1.0"), dpkg.build("0.2.0")
    machine = dpkg.machine
    done = dpkg.run("--install", str(old))
    assert done.status == 0 and dpkg.state() == "0.1.0 installed", done.stderr
    assert machine.asked() == []
    tree = dpkg.base / "root/usr"
    assert (tree / "share/man/man1/recvirt-cloud.1.gz").is_file()
    assert (tree / "share/bash-completion/completions/recvirt-cloud").is_file()
    assert (tree / "lib/python3/dist-packages/recvirt/nestedcloud/central/migrations/0001_initial.py").is_file()

    machine.active.touch()
    done = dpkg.run("--install", str(new))
    assert done.status == 0 and dpkg.state() == "0.2.0 installed", done.stderr
    # The tmpfs of the sandbox, where the mark is left, is the same for all of one dpkg.
    assert machine.asked() == ["systemctl stop recvirt-cloud.target", *TAKE_OVER] and machine.active.exists()

    done = dpkg.run("--install", str(old))
    assert done.status != 0 and dpkg.state() == "0.2.0 installed"
    assert "can't take over from 0.2.0" in done.stderr
    # dpkg had the old scripts stop it, and then start it again.
    assert machine.active.exists()

    machine.broken.touch()
    done = dpkg.run("--install", str(new))
    assert done.status != 0 and dpkg.state() == "0.2.0 half-configured"
    assert "dpkg --configure -a" in done.stderr and not machine.active.exists()
    machine.broken.unlink()
    machine.active.touch()
    assert dpkg.run("--configure", "-a").status == 0 and dpkg.state() == "0.2.0 installed"
    assert machine.asked() == TAKE_OVER

    assert dpkg.run("--remove", NAME).status == 0
    assert machine.asked() == ["systemctl stop recvirt-cloud.target"]
