"""``recvirt profiles``, ``profile show|schema|new`` and ``completion``, as a person or a script calls them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from recvirt.cli import cli
from recvirt.errors import ConfigError
from recvirt.profile import load_profile
from recvirt.profile.schema import at, file_schema, known_keys

KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
ROOT = Path(__file__).resolve().parents[2]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words, catch_exceptions=True)


def run_recvirt(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, from this checkout."""
    return subprocess.run(
        [sys.executable, "-c", "from recvirt.cli import main; main()", *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def output_of(*words: str) -> str:
    result = call(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_profiles_lists_names_and_descriptions() -> None:
    lines = output_of("profiles").splitlines()
    assert any(line.startswith("default ") and "libvirt" in line for line in lines)
    rows = json.loads(output_of("profiles", "--json"))
    assert {"default", "minimal"} <= {row["name"] for row in rows}
    assert all(Path(row["file"]).is_file() and row["description"] for row in rows)


def test_a_faulty_profile_does_not_hide_the_others() -> None:
    Path("profiles").mkdir()
    Path("profiles/bad.yaml").write_text("extends: minimal\nfoo: 1\n")
    lines = [line.split(maxsplit=1) for line in output_of("profiles").splitlines()]
    assert ["bad", "(faulty: recvirt profile show bad)"] in lines
    row = next(row for row in json.loads(output_of("profiles", "--json")) if row["name"] == "bad")
    assert row["problems"] == ["profiles/bad.yaml:2: foo: unknown key"]


@pytest.mark.parametrize("name", ["minimal", "default", "debian-kernel", "debug", "bench", "kernel-7", "bookworm"])
@pytest.mark.parametrize("flags", [[], ["--no-defaults"]])
def test_what_is_shown_loads_to_the_same_profile(name: str, flags: list[str]) -> None:
    Path("shown.yaml").write_text(output_of("profile", "show", name, *flags))
    assert load_profile("shown.yaml").model == load_profile(name).model


def test_odd_values_survive_being_shown() -> None:
    overrides = [
        'description="# not a comment: \'quoted\' \\"twice\\""', "root.hostname=x", 'root.sysctl."kernel.x"="a: b"',
        'kernel.cmdline=["console=ttyS0,115200", "no", "12", "1.5", "y"]',
        "root.users=[{name: a, groups: [sudo]}, {name: b}]",
    ]  # fmt: skip
    words = [word for text in overrides for word in ("--set", text)]
    Path("shown.yaml").write_text(output_of("profile", "show", "minimal", "--no-defaults", *words))
    assert load_profile("shown.yaml").model.model_dump(exclude={"name"}) == load_profile(
        "minimal", overrides
    ).model.model_dump(exclude={"name"})


def test_every_value_is_shown_with_its_origin() -> None:
    Path("p.yaml").write_text("extends: minimal\nimage:\n  size: 9G\n")
    lines = output_of("profile", "show", "p.yaml", "--set", "root.hostname=here").splitlines()
    assert any(line.strip().startswith("size: 9G") and line.endswith("# p.yaml:3") for line in lines)
    assert any("hostname: here" in line and line.endswith("# --set root.hostname=here") for line in lines)
    assert any("timezone: Etc/UTC" in line and line.endswith("# built-in default") for line in lines)
    for line in lines:
        value = line.partition("#")[0].strip()
        assert "#" in line or value.endswith(":"), line


def test_show_as_json_has_an_origin_for_every_leaf() -> None:
    data = json.loads(output_of("profile", "show", "default", "--json"))
    assert data["profile"]["image"]["filesystem"] == "ext4"
    assert data["origins"]["image.size"]["line"] > 0
    assert [Path(file).name for file in data["files"]] == ["minimal.yaml", "default.yaml"]
    leaves = len(list(_leaves(data["profile"])))
    assert leaves == len(data["origins"])


def _leaves(value: Any) -> Any:
    if isinstance(value, dict) and value:
        for child in value.values():
            yield from _leaves(child)
    elif isinstance(value, list) and value:
        for child in value:
            yield from _leaves(child)
    else:
        yield value


def test_a_faulty_profile_is_an_error_with_a_status() -> None:
    result = call("profile", "show", "minimal", "--set", "image.size=1X")
    assert isinstance(result.exception, ConfigError)
    done = run_recvirt("profile", "show", "no-such")
    assert done.returncode == ConfigError.exit_code
    assert done.stdout == ""
    assert "there is no profile 'no-such'" in done.stderr
    assert "recvirt profiles lists them" in done.stderr
    assert "Traceback" not in done.stderr


# --- new


def test_a_new_profile_loads_at_once_and_as_commented() -> None:
    assert "profiles/mine.yaml" in output_of("profile", "new", "mine")
    assert load_profile("mine").model.root == load_profile("default").model.root
    text = Path("profiles/mine.yaml").read_text()
    # Everything offered in the comments must be true: take the comment signs away and load it.
    opened = re.sub(r"^#(?=[a-z]|  [a-z-]|    )", "", text, flags=re.MULTILINE)
    opened = re.sub(r"^kernel: debian.*$", "", opened, flags=re.MULTILINE)  # offered as the other choice
    opened = opened.replace("AAAA...", KEY)
    assert {"kernel", "root", "image"} <= set(yaml.safe_load(opened))
    Path("profiles/overlay").mkdir()
    for name in ("my.config", "after.sh"):
        Path("profiles", name).write_text("")
    Path("profiles/mine.yaml").write_text(opened)
    model = load_profile("mine").model
    assert model.root.unattended_upgrades
    assert model.image.formats == ("qcow2", "vmdk")


def test_new_never_overwrites() -> None:
    output_of("profile", "new", "mine")
    Path("profiles/mine.yaml").write_text("precious")
    result = call("profile", "new", "mine")
    assert isinstance(result.exception, ConfigError)
    assert Path("profiles/mine.yaml").read_text() == "precious"


def test_new_with_a_parent_and_a_place() -> None:
    Path("sub").mkdir()
    Path("base.yaml").write_text("extends: minimal\nimage: {size: 7G}\n")
    output_of("profile", "new", "small", "--extends", "./base.yaml", "-o", "sub/x.yaml")
    assert load_profile("sub/x.yaml").model.image.size == "7G"


@pytest.mark.parametrize(("words"), [["Bad Name"], ["../x"], ["x", "--extends", "no-such"]])
def test_new_refuses(words: list[str]) -> None:
    assert isinstance(call("profile", "new", *words).exception, ConfigError)
    assert not Path("profiles").exists()


# --- schema


def test_the_schema_knows_files_as_people_write_them() -> None:
    schema = json.loads(output_of("profile", "schema"))
    assert schema["$schema"].endswith("2020-12/schema")
    root = schema["$defs"]["Root"]["properties"]
    assert {"packages", "packages+", "packages-"} <= set(root)
    assert "extends" in schema["properties"]
    assert schema["required"] == []
    assert schema["additionalProperties"] is False
    assert {"const": "debian"}.items() <= schema["properties"]["kernel"]["anyOf"][-1].items()
    assert {"type": "null"} in root["hostname"]["anyOf"]
    assert "hostname+" not in root


def test_every_reference_of_the_schema_resolves() -> None:
    schema = file_schema()

    def references(value: Any) -> Any:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            for child in value.values():
                yield from references(child)
        elif isinstance(value, list):
            for child in value:
                yield from references(child)

    names = {ref.removeprefix("#/$defs/") for ref in references(schema)}
    assert names == set(schema["$defs"])


def test_every_key_has_a_place_in_the_schema_of_files() -> None:
    for name in ("minimal", "default", "debian-kernel", "debug", "bench"):
        for path in load_profile(name).files:
            _check_against(yaml.safe_load(path.read_text()), file_schema(), file_schema()["$defs"])


def _check_against(value: Any, schema: Any, parts: dict[str, Any]) -> None:
    """Enough of JSON schema to see that an editor would accept our own files."""
    if "$ref" in schema:
        schema = parts[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        errors = []
        for choice in schema["anyOf"]:
            try:
                return _check_against(value, choice, parts)
            except AssertionError as error:
                errors.append(error)
        raise AssertionError(errors)
    if "const" in schema:
        assert value == schema["const"]
        return None
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    wanted = schema.get("type")
    if wanted:
        assert isinstance(value, tuple(kinds[kind] for kind in ([wanted] if isinstance(wanted, str) else wanted)))
    if isinstance(value, dict) and "properties" in schema:
        for key, child in value.items():
            assert key in schema["properties"], key
            _check_against(child, schema["properties"][key], parts)
    return None


def test_places_of_the_schema() -> None:
    assert "hostname" in known_keys(("root",))
    assert known_keys(("root", "users", 3)) == ["name", "groups", "ssh_keys", "sudo", "shell"]
    assert known_keys(("root", "nfs", "images")) == ["source", "options"]
    assert known_keys(("root", "sysctl")) == []
    assert at(("root", "nothing")) is None


# --- completion


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef recvirt"), ("fish", "complete ")]
)
def test_completion_scripts(shell: str, word: str) -> None:
    assert word in output_of("completion", shell)


def test_completion_answers() -> None:
    def complete(words: str, count: int) -> list[str]:
        said = run_recvirt(_RECVIRT_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(count))
        return [line.partition(",")[2] for line in said.stdout.splitlines()]

    assert "completion" in complete("recvirt comp", 1)
    assert complete("recvirt profile show debi", 3) == ["debian-kernel"]
    assert complete("recvirt completion z", 2) == ["zsh"]
    assert complete("recvirt build mini", 2) == ["minimal"]
    assert complete("recvirt test build/x", 2) == ["build/x"]  # a file: left to the shell
