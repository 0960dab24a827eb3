"""The sandbox's command lines, and what they hold and keep out when run (on the host's own tree as the tools root)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recvirt import sandbox
from recvirt.errors import CommandError
from recvirt.run import quote, run
from recvirt.sandbox import ToolsRoot


@pytest.fixture
def tools(tmp_path: Path) -> ToolsRoot:
    """A tools root that is only a skeleton."""
    directory = tmp_path / "tools"
    for name in ("usr/bin", "etc", "var/lib/dpkg"):
        (directory / "rootfs" / name).mkdir(parents=True)
    (directory / "rootfs" / "bin").symlink_to("usr/bin")
    (directory / "packages.json").write_text(json.dumps({"gcc": "14.2", "qemu": "10.0"}))
    return ToolsRoot(directory)


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox, "find_tool", lambda name: f"/usr/bin/{name}")


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sandbox, "find_tool", lambda name: f"/usr/bin/{name}")


def has(argv: list[str], *words: str) -> bool:
    """Whether ``words`` follow each other in ``argv``."""
    return any(tuple(argv[i : i + len(words)]) == words for i in range(len(argv)))


def test_versions_are_for_cache_keys(tools: ToolsRoot) -> None:
    assert tools.version_of("gcc", "clang") == ("gcc=14.2", "clang=")


@pytest.mark.usefixtures("as_root")
def test_as_root_no_user_namespace_is_made(tools: ToolsRoot) -> None:
    argv = tools.argv(["true"])
    assert argv[0] == "/usr/bin/bwrap"
    assert argv[-2:] == ["--", "true"]
    assert "--unshare-user" not in argv
    for word in ("--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"):
        assert word in argv


@pytest.mark.usefixtures("as_user")
def test_as_a_user_only_one_id_is_mapped_unless_all_are_wanted(tools: ToolsRoot) -> None:
    assert has(tools.argv(["true"]), "--unshare-user", "--uid", "0", "--gid", "0")
    argv = tools.argv(["true"], all_ids=True)
    assert argv[:4] == ["/usr/bin/unshare", "--user", "--map-auto", "--map-root-user"]
    assert "--unshare-user" not in argv
    assert has(argv, "--kill-child", "--mount-proc", "--", "/usr/bin/bwrap")


@pytest.mark.usefixtures("as_root")
def test_all_ids_as_root_maps_nothing(tools: ToolsRoot) -> None:
    argv = tools.argv(["true"], all_ids=True)
    assert argv[0] == "/usr/bin/unshare"
    assert "--user" not in argv[: argv.index("--")]


@pytest.mark.usefixtures("as_root")
def test_the_tree_is_read_only_and_paths_stay_the_same(tools: ToolsRoot, tmp_path: Path) -> None:
    argv = tools.argv(["true"], writable=[tmp_path / "w"], readable=[tmp_path / "r"], cwd=tmp_path / "w")
    assert has(argv, "--ro-bind", f"{tools.rootfs}/usr", "/usr")
    assert has(argv, "--ro-bind", f"{tools.rootfs}/etc", "/etc")
    assert has(argv, "--symlink", "usr/bin", "/bin")
    assert not has(argv, "--symlink", "usr/lib32", "/lib32")
    assert has(argv, "--bind", f"{tmp_path}/w", f"{tmp_path}/w")
    assert has(argv, "--ro-bind", f"{tmp_path}/r", f"{tmp_path}/r")
    assert has(argv, "--chdir", f"{tmp_path}/w")


@pytest.mark.usefixtures("as_root")
def test_the_network_comes_with_names_and_only_when_asked_for(tools: ToolsRoot) -> None:
    assert "--unshare-net" not in tools.argv(["true"], network=True)
    if Path("/etc/hosts").exists():
        assert "/etc/hosts" in tools.argv(["true"], network=True)
    assert "/etc/hosts" not in tools.argv(["true"])


@pytest.mark.usefixtures("as_root")
def test_devices_and_covers(tools: ToolsRoot) -> None:
    argv = tools.argv(["true"], devices=[Path("/dev/kvm")], cover={Path("/etc/x"): Path("/host/x")})
    assert has(argv, "--dev-bind-try", "/dev/kvm", "/dev/kvm")
    assert has(argv, "--ro-bind", "/host/x", "/etc/x")


@pytest.mark.usefixtures("as_root")
def test_the_environment_inside(tools: ToolsRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("MAKEFLAGS", "-n")
    argv = tools.argv(["true"], env={"LC_ALL": "C", "X": "1"})
    assert has(argv, "--setenv", "https_proxy", "http://proxy:3128")
    assert has(argv, "--setenv", "X", "1")
    assert has(argv, "--setenv", "LC_ALL", "C")
    assert has(argv, "--setenv", "PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    assert "MAKEFLAGS" not in argv


# --- for real


@pytest.fixture
def host(tmp_path: Path) -> ToolsRoot:
    """The host's own tree in the role of a tools root."""
    directory = tmp_path / "host"
    directory.mkdir()
    (directory / "rootfs").symlink_to("/")
    (directory / "packages.json").write_text("{}")
    return ToolsRoot(directory)


def test_only_what_is_bound_can_be_written(host: ToolsRoot, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "r").mkdir()
    host.run(["sh", "-c", f"echo hi > {tmp_path}/w/file"], writable=[tmp_path / "w"])
    assert (tmp_path / "w/file").read_text() == "hi\n"
    for target in (f"{tmp_path}/r/file", "/usr/file", "/etc/file"):
        with pytest.raises(CommandError):
            host.run(["sh", "-c", f"echo hi > {target}"], writable=[tmp_path / "w"], readable=[tmp_path / "r"])


def test_host_files_that_were_not_bound_are_not_seen(host: ToolsRoot, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    assert host.run(["cat", f"{tmp_path}/secret"], check=False).status != 0
    assert host.run(["ls", "/root"]).stdout == ""


def test_there_is_no_network_and_no_other_process(host: ToolsRoot) -> None:
    routes = host.run(["cat", "/proc/net/route"]).stdout.splitlines()
    assert len(routes) <= 1
    pids = host.run(["sh", "-c", "ls -d /proc/[0-9]*"]).stdout.split()
    assert len(pids) < 6


def test_it_is_root_inside(host: ToolsRoot) -> None:
    assert host.run(["id", "-u"]).stdout == "0\n"


def test_all_ids_can_own_files(host: ToolsRoot, tmp_path: Path) -> None:
    script = f"touch {tmp_path}/w/f && chown 33:44 {tmp_path}/w/f && stat -c %u:%g {tmp_path}/w/f && rm {tmp_path}/w/f"
    (tmp_path / "w").mkdir()
    assert host.run(["sh", "-c", script], writable=[tmp_path / "w"], all_ids=True).stdout == "33:44\n"


def test_all_ids_do_not_depend_on_what_runs_outside(host: ToolsRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container number 2 may be nobody: bwrap must find its child in a /proc of the same PID namespace."""
    mapping = [] if os.geteuid() == 0 else ["--user", "--map-auto", "--map-root-user"]
    container = ["unshare", *mapping, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # as it is in the container
    inner = quote(host.argv(["true"], all_ids=True))
    done = run([*container, "sh", "-c", f"/bin/true; /bin/true; {inner}; status=$?; exit $status"], check=False)
    assert (done.status, done.stderr) == (0, "")
