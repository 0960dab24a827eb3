"""What the command line asks for; the API's own documents say whether that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recvirt.nestedcloud.central.storage_serializers import AllocateSerializer, ImportSerializer
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.client.api import Access, Api
from recvirt.nestedcloud.model import GIB


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Each request that was made."""
    calls: list[tuple[Any, ...]] = []

    def call(_self: Api, method: str, path: str, body: Any = None, *, data: bytes | None = None, **query: Any) -> Any:
        calls.append((method, path.removeprefix("projects/default/"), data if data is not None else body, query))
        there = query.get("offset", 3 if "upload_bytes" in (body or {}) else 0) + len(data or b"")
        return {"uuid": "u", "uploaded_bytes": there, "there": there}

    monkeypatch.setattr(Api, "call", call)
    access = Access("http://cloud", "t")
    monkeypatch.setattr("recvirt.nestedcloud.client.commands.load_access", lambda _project: access)
    return calls


def run(*words: str) -> str:
    result = CliRunner().invoke(main_group, [*words, "--no-wait"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    "words",
    [("--size", "2G"), ("--size", "300M", "--fs", "xfs", "--format", "qcow2"), ("--size", "1G", "--fs", "none")],
)
def test_an_allocation_is_a_valid_document(asked: list[tuple[Any, ...]], words: tuple[str, ...]) -> None:
    run("volume", "allocate", "data", *words)
    ((method, path, body, _),) = asked
    assert (method, path) == ("POST", "volumes")
    assert AllocateSerializer(data=body).is_valid(raise_exception=True)


@pytest.mark.parametrize("words", [(), ("--sha256", "A" * 64), ("--format", "raw", "--max-size", "2G")])
def test_an_import_is_a_valid_document(asked: list[tuple[Any, ...]], words: tuple[str, ...]) -> None:
    run("image", "import", "mine", "https://example.org/x", *words)
    ((method, path, body, _),) = asked
    assert (method, path) == ("POST", "images")
    assert ImportSerializer(data=body).is_valid(raise_exception=True)


def test_an_upload_goes_on_where_it_was(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(b"abcdef")
    run("image", "upload", "mine", str(file))
    begin, piece, complete = asked
    assert ImportSerializer(data=begin[2]).is_valid(raise_exception=True)
    assert piece == ("PUT", "images/mine/content", b"def", {"offset": 3})
    assert complete == ("POST", "images/mine/complete", {}, {})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ("volume", "allocate", "data", "--size", "1G", "--on", "w2"),
            ("POST", "volumes", {"name": "data", "size_bytes": GIB, "filesystem": "ext4", "on": "w2"}),
        ),
        (("volume", "attach", "data", "web"), ("POST", "volumes/data/attach", {"instance": "web"})),
        (("volume", "detach", "data"), ("POST", "volumes/data/detach", {})),
        (("volume", "resize", "data", "1G"), ("POST", "volumes/data/resize", {"size_bytes": GIB})),
        (("volume", "snapshot", "data", "a"), ("POST", "volumes/data/snapshot", {"snapshot": "a"})),
        (("volume", "snapshot-remove", "data", "a"), ("POST", "volumes/data/snapshot-remove", {"snapshot": "a"})),
        (("volume", "remove", "data"), ("DELETE", "volumes/data", None)),
        (("image", "delete", "mine"), ("DELETE", "images/mine", None)),
        (("export", "web", "golden"), ("POST", "instances/web/export", {"image": "golden"})),
        (("clone", "web", "two"), ("POST", "instances/web/clone", {"name": "two"})),
    ],
)
def test_each_verb_is_one_request(
    asked: list[tuple[Any, ...]], words: tuple[str, ...], wanted: tuple[Any, ...]
) -> None:
    assert run(*words).strip() == "u"
    assert [call[:3] for call in asked] == [wanted]
