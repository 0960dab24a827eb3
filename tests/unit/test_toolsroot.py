"""The tools root: what goes into it, how it is made, and that a failed or killed making leaves nothing."""

from __future__ import annotations

import io
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from recvirt import toolsroot
from recvirt.data import RESOURCES_DIR
from recvirt.errors import SpaceError, StageError
from recvirt.run import find_tool
from recvirt.store import Store, key_of
from recvirt.toolsroot import EXTRAS, bootstrap_argv, ensure_tools, namespace_argv, parse_status, tools_inputs
from recvirt.ui import reporter

STATUS = """\
Package: apt
Status: install ok installed
Version: 3.0.3

Package: gone
Status: deinstall ok config-files
Version: 1.0

Package: half
Status: install ok half-configured
Version: 1.0

Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.41-12
Description: GNU C Library
 Version: not this one
"""

#: Stands for mmdebstrap: takes the folder $TMPDIR and the last argument but a mirror that ends in .tar.
_MMDEBSTRAP = """#!/bin/sh
echo "I: downloading packages with apt..."
echo run >> "{log}"
for word; do case "$word" in *.tar) tar="$word";; esac; done
tree=$(mktemp -d -p "$TMPDIR")
mkdir -p "$tree/var/lib/dpkg" "$tree/etc/apt/apt.conf.d" "$tree/usr/bin" "$tree/dev"
cp "{status}" "$tree/var/lib/dpkg/status"
echo deb http://archive.example.org/debian trixie main > "$tree/etc/apt/sources.list"
echo ours > "$tree/etc/apt/apt.conf.d/99mmdebstrap"
{extra}
tar -C "$tree" -cf "$tar" .
rm -rf "$tree"
"""
_UNSHARE = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'


class Fakes:
    """Programs that come before the host's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        folder.mkdir()
        (folder / "status").write_text(STATUS)
        self.write("unshare", _UNSHARE)
        self.write("newuidmap", "#!/bin/sh\n")
        self.bootstrapper()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def bootstrapper(self, extra: str = "") -> None:
        self.write("mmdebstrap", _MMDEBSTRAP.format(log=self.log, status=self.folder / "status", extra=extra))

    @property
    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path / "fake bin")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(toolsroot, "_SPACE_BYTES", 1)
    monkeypatch.setattr(toolsroot, "_EXTRA_SPACE_BYTES", 1)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(reporter, "stream", stream)
    return stream


# -- what and how ------------------------------------------------------------------------------------------------------


def test_the_inputs_are_sorted_and_unique() -> None:
    packages = tools_inputs().packages
    assert list(packages) == sorted(set(packages))
    assert {"apt", "mmdebstrap", "gpgv", "build-essential", "qemu-system-x86", "ca-certificates"} <= set(packages)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_set_is_a_tools_root_of_its_own(extra: str) -> None:
    inputs = tools_inputs(extra)
    assert set(EXTRAS[extra]) <= set(inputs.packages)
    assert {"apt", "ca-certificates"} <= set(inputs.packages)
    assert key_of("tools", 1, inputs) != key_of("tools", 1, tools_inputs())


def test_the_clouds_tests_run_on_the_python_packages_that_its_own_package_wants() -> None:
    controls = (RESOURCES_DIR / "packages").glob("recvirt-cloud*/DEBIAN/control")
    wanted = {name for control in controls for name in re.findall(r"python3-[a-z0-9]+", control.read_text())}
    assert len(wanted) > 5 and wanted <= set(EXTRAS["cloud"])


def test_every_input_changes_the_key() -> None:
    inputs = tools_inputs()
    keys = {
        key_of("tools", 1, changed)
        for changed in (
            inputs,
            replace(inputs, suite="sid"),
            replace(inputs, mirror="http://m"),
            replace(inputs, packages=inputs.packages[1:]),
        )
    }
    assert len(keys) == 4


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fakes: Fakes) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    argv = bootstrap_argv(tools_inputs(), tmp_path / "t.tar")
    assert argv[0] == find_tool("mmdebstrap")
    assert argv[-2:] == ["trixie", str(tmp_path / "t.tar")]
    assert f'--aptopt=Acquire::https::CaInfo "{bundle}"' in argv
    (include,) = [word for word in argv if word.startswith("--include=")]
    assert include.removeprefix("--include=").split(",") == list(tools_inputs().packages)
    mirrored = bootstrap_argv(tools_inputs(mirror="http://m/debian"), tmp_path / "t.tar")
    assert mirrored == [*argv, "http://m/debian"]
    assert not [word for word in argv if "insecure" in word.lower() or "unauthenticated" in word.lower()]


def test_its_programs_die_with_the_namespace(fakes: Fakes) -> None:
    for as_root in (True, False):
        argv = namespace_argv(as_root=as_root)
        assert {"--pid", "--fork", "--kill-child", "--mount", "--mount-proc"} <= set(argv)
        assert ("--map-auto" in argv) != as_root
        assert argv[-1] == "--"


def test_only_installed_packages_count() -> None:
    assert parse_status(STATUS) == {"apt": "3.0.3", "libc6": "2.41-12"}
    assert parse_status("") == {}


# -- making ------------------------------------------------------------------------------------------------------------


def test_it_is_made_once(tmp_path: Path, fakes: Fakes, said: io.StringIO) -> None:
    tools = ensure_tools(Store(tmp_path / "cache"))
    assert tools.versions == {"apt": "3.0.3", "libc6": "2.41-12"}
    assert tools.version_of("apt", "none") == ("apt=3.0.3", "none=")
    assert (tools.rootfs / "etc/resolv.conf").exists()
    assert (tools.rootfs / "etc/hosts").exists(), "the sandbox binds over it"
    assert not (tools.rootfs / "etc/apt/apt.conf.d/99mmdebstrap").exists()
    assert "downloading packages with apt" in said.getvalue()
    assert ensure_tools(Store(tmp_path / "cache")) == tools
    assert fakes.runs == 1
    assert ensure_tools(Store(tmp_path / "cache"), extra=next(iter(EXTRAS))) != tools
    assert fakes.runs == 2
    assert list((tmp_path / "cache" / "work").iterdir()) == []


def test_a_failure_is_told_with_the_last_lines_and_leaves_nothing(
    tmp_path: Path, fakes: Fakes, said: io.StringIO
) -> None:
    fakes.bootstrapper("echo 'E: no such mirror' >&2; exit 25")
    store = Store(tmp_path / "cache")
    with pytest.raises(StageError, match="E: no such mirror") as caught:
        ensure_tools(store)
    assert "--tools-mirror" in caught.value.hint
    assert str(tmp_path / "cache/logs/tools-main.log") in caught.value.message
    assert list((tmp_path / "cache" / "work").iterdir()) == []
    fakes.bootstrapper()
    assert ensure_tools(store).versions


def test_a_full_disk_is_told(tmp_path: Path, fakes: Fakes, said: io.StringIO) -> None:
    fakes.bootstrapper("echo 'tar: write error: No space left on device' >&2; exit 1")
    with pytest.raises(SpaceError):
        ensure_tools(Store(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "work").iterdir()) == []


def test_too_little_room_is_found_first(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, said: io.StringIO
) -> None:
    monkeypatch.setattr(toolsroot, "_SPACE_BYTES", 10**18)
    with pytest.raises(SpaceError, match="are needed below"):
        ensure_tools(Store(tmp_path / "cache"))
    assert fakes.runs == 0


def test_two_at_once_make_it_once(tmp_path: Path, fakes: Fakes, said: io.StringIO) -> None:
    fakes.bootstrapper("sleep 0.5")
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_tools(Store(tmp_path / "cache")).directory))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert fakes.runs == 1


def test_what_a_killed_one_left_is_not_reused(tmp_path: Path, fakes: Fakes, said: io.StringIO) -> None:
    key = key_of("tools", toolsroot.REVISION, tools_inputs())
    left = tmp_path / "cache" / "work" / f"tools-{key}" / "out" / "rootfs" / "usr"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    tools = ensure_tools(Store(tmp_path / "cache"))
    assert not (tools.rootfs / "usr/half").exists()
    assert list((tmp_path / "cache" / "work").iterdir()) == []
