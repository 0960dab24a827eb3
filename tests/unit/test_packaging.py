"""What people install: the metadata agrees with the code, and shipped data reaches a wheel and an sdist.

The slow ones build for real and install into a new virtual environment (they need the package index).
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from recvirt import __version__
from recvirt.data import SUFFIXES, data_path, fragment_path, package_list_path, shipped_names
from recvirt.errors import RecvirtError

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("profiles", "kernel-configs", "package-lists")


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


# --- data


def test_shipped_data_is_found_where_people_edit_it() -> None:
    for name in LINKED:
        link = ROOT / "recvirt/resources" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../../{name}"
        assert data_path(name) == ROOT / name


def test_names_become_files() -> None:
    assert fragment_path("15-systemd") == ROOT / "kernel-configs/15-systemd.config"
    assert package_list_path("base") == ROOT / "package-lists/base.list"
    assert fragment_path("/own/x.config") == Path("/own/x.config")
    assert "default" in shipped_names("profiles")


def test_missing_data_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("recvirt.data.RESOURCES_DIR", tmp_path)
    with pytest.raises(RecvirtError) as caught:
        data_path("profiles")
    assert "not whole" in caught.value.message
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("folder", LINKED)
def test_every_shipped_file_has_the_folders_suffix_and_is_called_by_name(folder: str) -> None:
    strangers = [p.name for p in (ROOT / folder).iterdir() if p.suffix != SUFFIXES[folder] and p.name[0] != "."]
    assert strangers == []


# --- metadata

_DISTRIBUTIONS = {
    "yaml": "pyyaml", "testinfra": "pytest-testinfra", "rest_framework": "djangorestframework",
    "libvirt": "libvirt-python", "dateutil": "python-dateutil",
    # What Django and Celery are made of comes with them.
    "asgiref": "django", "kombu": "celery",
    # Libraries of providers; boto3 stands on botocore.
    "botocore": "boto3", "google": "google-auth", "azure": "azure-storage-blob",
}  # fmt: skip


def third_party_imports(paths: Iterable[Path]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names and name not in ("recvirt", "__future__")}


def requirements(*extras: str) -> set[str]:
    lines = config()["options"]["install_requires"].split()
    for extra in extras:
        lines += config()["options.extras_require"][extra].split()
    return {re.split(r"[<>=!~;\[]", line)[0].lower() for line in lines}


def test_everything_imported_is_required() -> None:
    modules = set((ROOT / "recvirt").rglob("*.py"))
    inside = {path for path in modules if "nestedcloud" in path.parts}
    providers = set((ROOT / "recvirt/publish").rglob("*.py"))
    sdks = ("aws", "azure", "gcp", "openstack")
    for paths, extras in ((modules - inside - providers, ()), (inside, ("cloud",)), (providers, sdks)):
        needed = {_DISTRIBUTIONS.get(name, name) for name in third_party_imports(paths)}
        assert needed <= requirements(*extras)


def test_the_version_stands_in_one_place() -> None:
    assert config()["metadata"]["version"] == "attr: recvirt.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changes


def test_the_build_folder_is_not_where_images_lie() -> None:
    assert config()["build"]["build_base"].split("/")[0] != "build"


def test_no_file_names_a_package_registry_or_a_mirror() -> None:
    """The mirror is apt's, mmdebstrap's and pip's own business; a name here would override a site's choice."""
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    # In pieces, or this file would be found.
    names = ("deb" + r"\.debian\.", "pypi" + r"\.org", "python" + "hosted", "snapshot" + r"\.debian")
    hosts = re.compile("|".join(names))
    for name in filter(None, tracked):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            assert not hosts.search(path.read_text(errors="replace")), name


# --- for real


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would give to somebody else, with what is not committed yet."""
    target = tmp_path_factory.mktemp("source") / "recvirt"
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_symlink() or path.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the source, into which leftovers of an earlier build must not come."""
    for base in (source / "build/lib/recvirt", source / config()["build"]["build_base"] / "lib/recvirt"):
        base.mkdir(parents=True)
        (base / "stale.py").write_text("")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, source)
    return next(out.glob("recvirt-*.whl"))


def files_below(folder: Path) -> set[str]:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    return {name for name in found if not name.endswith(".pyc")}


@pytest.mark.slow
def test_the_wheel_holds_all_data_and_nothing_stale(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []
    for folder in LINKED:
        for name in files_below(source / folder):
            assert f"recvirt/resources/{folder}/{name}" in names
    for name in files_below(source / "recvirt"):
        assert f"recvirt/{name}" in names
    assert not any("stale" in name or name.startswith("tests/") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_installed_recvirt_works_in_a_new_environment(kind: str, source: Path, wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    if kind == "sdist":
        build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
        run(python, "-m", "pip", "install", "--quiet", "setuptools>=65")
        name = run(python, "-c", build, tmp_path, cwd=source).split()[-1]
        with tarfile.open(tmp_path / name) as archive:
            inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
        assert {"Makefile", "setup.cfg", "profiles/default.yaml", "recvirt/resources/profiles/default.yaml"} <= inside
        target: list[str | Path] = [tmp_path / name]
    else:
        target = [wheel] if kind == "wheel" else ["-e", source]
    run(python, "-m", "pip", "install", "--quiet", *target)
    recvirt = tmp_path / "env/bin/recvirt"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(recvirt, "--version", cwd=elsewhere).strip() == f"recvirt, version {__version__}"
    listed = run(recvirt, "profiles", cwd=elsewhere)
    for name in shipped_names("profiles"):
        assert re.search(rf"^{name} ", listed, re.MULTILINE)
    assert "faulty" not in listed
    shown = run(recvirt, "profile", "show", "default", cwd=elsewhere)
    assert "kvm-host" in shown
    assert str(ROOT) not in shown
