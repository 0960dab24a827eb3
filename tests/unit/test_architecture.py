"""The arrows of the design, read off the imports; and bounds that keep modules readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "recvirt"
#: Migrations are written by Django.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)
#: What runs inside the image; the builder installs it and never imports it.
INSIDE = "recvirt.nestedcloud"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, lazy: bool = True) -> set[str]:
    """The modules that a file imports (``from a import b`` counts as a and a.b); without ``lazy`` only at its top."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module or "") if part)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def below(prefix: str) -> list[Path]:
    return [path for path in MODULES if name_of(path) == prefix or name_of(path).startswith(prefix + ".")]


def offenders(paths: list[Path], *forbidden: str, lazy: bool = True) -> list[str]:
    return [
        f"{name_of(path)} imports {module}"
        for path in paths
        for module in sorted(imports_of(path, lazy=lazy))
        if any(module == word or module.startswith(word + ".") for word in forbidden)
    ]


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 20
    assert "recvirt.errors" in imports_of(PACKAGE / "run.py")
    assert "recvirt.errors.RecvirtError" in imports_of(PACKAGE / "run.py")


def test_errors_import_nothing_of_ours() -> None:
    assert offenders([PACKAGE / "errors.py"], "recvirt") == []


def test_the_ground_does_not_know_the_house() -> None:
    allowed = {"ui": ("errors",), "run": ("errors", "ui"), "data": ("errors",), "store": ("errors", "ui"), "model": ()}
    for name, may in allowed.items():
        ours = {word for word in imports_of(PACKAGE / f"{name}.py") if word.startswith("recvirt.")}
        extra = {word for word in ours if not any(word.startswith(f"recvirt.{part}") for part in may)}
        assert extra == set(), f"{name} imports {extra}"


def test_profiles_know_data_and_errors_only() -> None:
    known = {"recvirt", "recvirt.data", "recvirt.errors", "recvirt.model", "recvirt.profile"}
    for path in below("recvirt.profile"):
        modules = {word for word in imports_of(path) if word.startswith("recvirt")}
        extra = {word for word in modules if ".".join(word.split(".")[:2]) not in known}
        assert extra == set(), name_of(path)


STARTERS = {"Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput", "spawn", "fork"}


def started_by(path: Path) -> list[str]:
    """Calls that start a program without run.py. A handle's type and its constants may be named by anyone."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        module, _, name = function.rpartition(".")
        if (module in ("subprocess", "pty") and name in STARTERS) or function == "Popen":
            found.append(function)
        if module == "os" and name.startswith(("system", "popen", "fork", "exec", "spawn", "posix_spawn")):
            found.append(function)
    return found


def test_only_run_starts_programs() -> None:
    assert "subprocess.Popen" in started_by(PACKAGE / "run.py")
    # Replacing ourselves by an interactive program (ssh) starts nothing that could be left behind.
    allowed = {"os.execvp", "os.execvpe", "os.execv", "os.execve"}
    for path in MODULES:
        # What runs inside the image has no run.py: it is not the builder.
        if path != PACKAGE / "run.py" and not name_of(path).startswith(INSIDE):
            assert set(started_by(path)) <= allowed, name_of(path)


def test_stages_know_neither_each_other_nor_what_stands_above_them() -> None:
    stages = [path for path in below("recvirt.stages") if path.name not in ("__init__.py", "base.py")]
    assert len(stages) >= 2
    for path in stages:
        others = [name_of(other) for other in stages if other != path]
        assert offenders([path], *others) == []
    above = ("pipeline", "cli", "clouds", "publish", "accept", "profile")
    assert offenders(stages, *(f"recvirt.{name}" for name in above)) == []


def test_stages_take_types_of_the_store_and_nothing_that_acts() -> None:
    for path in below("recvirt.stages"):
        used = {word.rsplit(".", 1)[1] for word in imports_of(path) if word.startswith("recvirt.store.")}
        assert used <= {"FileRef", "Upstream", "canonical", "sha256_of", "remove_tree"}, name_of(path)


def test_the_command_line_stands_on_top() -> None:
    cli = {name_of(path) for path in below("recvirt.cli")}
    others = [path for path in MODULES if name_of(path) not in cli and path != PACKAGE / "__main__.py"]
    assert offenders(others, "recvirt.cli") == []


def test_a_running_vm_does_not_know_what_it_must_prove() -> None:
    assert offenders(below("recvirt.qemu"), "recvirt.accept", "recvirt.stages", "recvirt.pipeline") == []


def test_what_is_published_is_read_from_files() -> None:
    """Publishing knows images and reports, not how they come about; providers do not know each other."""
    assert offenders(below("recvirt.publish"), "recvirt.pipeline", "recvirt.stages", "recvirt.qemu") == []
    providers = [path for path in below("recvirt.publish.providers") if path.name != "__init__.py"]
    for path in providers:
        assert offenders([path], *(name_of(other) for other in providers if other != path)) == []
        assert offenders([path], "recvirt.publish.engine", "recvirt.publish.config") == []


def test_builder_and_image_do_not_import_each_other() -> None:
    inside = below(INSIDE)
    builder = [path for path in MODULES if path not in inside]
    assert offenders(builder, INSIDE) == []
    ours = [o for path in inside for o in offenders([path], "recvirt") if f" {INSIDE}" not in o]
    assert {o.split(" imports ")[1] for o in ours} <= {"recvirt", "recvirt.__version__"}


def test_help_stays_quick() -> None:
    """The command line imports what is heavy where it is used, so that ``--help`` and completion answer at once."""
    heavy = ["pydantic", "jinja2", "requests", "pytest", "testinfra"]
    heavy += [f"recvirt.{name}" for name in ("profile", "pipeline", "stages", "accept", "publish")]
    assert offenders(below("recvirt.cli"), *heavy, lazy=False) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= 400, f"{path.name}: {lines} lines; is it two things?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
