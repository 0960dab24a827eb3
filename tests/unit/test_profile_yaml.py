"""Reading one YAML file: lines, YAML 1.2 words, and everything that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recvirt.profile.nodes import MAX_BYTES, MAX_DEPTH, read_file, read_text


def plain(text: str) -> object:
    node, problems = read_text(text, "t.yaml", Path("/"))
    assert problems == []
    assert node is not None
    return node.plain()


def faults(text: str) -> list[str]:
    return [str(problem) for problem in read_text(text, "t.yaml", Path("/"))[1]]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("no", "no"), ("on", "on"), ("y", "y"), ("010", "010"), ("1:30", "1:30"), ("2026-01-02", "2026-01-02"),
        ("true", True), ("False", "False"), ("null", None), ("~", None), ("''", ""), ("12", 12), ("-3", -3),
        ("0x10", 16), ("6.12", 6.12), ("1_000", "1_000"), ("4G", "4G"), ("-recvirt", "-recvirt"), ("=", "="),
    ],
)  # fmt: skip
def test_words_have_their_yaml_1_2_meaning(word: str, value: object) -> None:
    assert repr(plain(f"k: {word}")) == repr({"k": value})


def test_lines_are_those_of_the_keys() -> None:
    node, _ = read_text("a: 1\nb:\n  - x\n  - y:\n      z\n", "t.yaml", Path("/"))
    assert node is not None
    lines = {path: child.origin.line for path, child in node.walk()}
    assert lines == {"": 1, "a": 1, "b": 2, "b[0]": 3, "b[1]": 4, "b[1].y": 4}


def test_a_key_with_a_dot_is_quoted_in_its_path() -> None:
    node, _ = read_text("sysctl: {net.ipv4.ip_forward: 1}", "t.yaml", Path("/"))
    assert node is not None
    assert 'sysctl."net.ipv4.ip_forward"' in dict(node.walk())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: 2\na: 3\n", "t.yaml:3: a: stands twice (first in line 1)"),
        ("x:\n  a: 1\n  'a': 3\n", "t.yaml:3: x.a: stands twice (first in line 2)"),
        ("a: [1\n", "t.yaml:2: not YAML: "),
        ("a: 1\n\tb: 2\n", "t.yaml:2: not YAML: "),
        ("a: !!python/object/apply:os.system [id]\n", "t.yaml:1: the tag tag:yaml.org,2002:python"),
        ("a: 1\nb: !x 2\n", "t.yaml:2: the tag !x has no meaning here"),
        ("a: 1\n---\nb: 2\n", "t.yaml:2: holds a second document"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", "t.yaml:3: c.<<: merge keys are not taken: use extends"),
        ("? [a, b]\n: 1\n", "t.yaml:1: a key must be a word"),
        ("a: &a [*a]\n", "t.yaml:1: its aliases nest without end"),
        ("a: *nothing\n", "t.yaml:1: not YAML: "),
        ("kernel:\nroot:\n  x: 1\n", "t.yaml:1: kernel: has no value"),
        ("l:\n  - a\n  -\n", "t.yaml:3: l[1]: has no value"),
        ("a: " + "9" * 5000, "t.yaml:1: a: is not a number that can be read"),
        ("a: \x07\n", "t.yaml: not YAML: "),
    ],
)
def test_refused(text: str, wanted: str) -> None:
    found = faults(text)
    assert any(fault.startswith(wanted) for fault in found), found


def test_an_alias_of_ordinary_size_is_taken() -> None:
    assert plain("a: &a [x]\nb: *a\n") == {"a": ["x"], "b": ["x"]}


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "its aliases unfold to more than" in faults("\n".join(lines))[0]


def test_deep_nesting_is_refused_before_recursion() -> None:
    assert f"nested deeper than {MAX_DEPTH} levels" in faults("[" * 20_000)[0]
    assert plain("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_a_huge_file_is_not_even_parsed(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("#" * (MAX_BYTES + 1))
    node, problems = read_file(path, "p.yaml")
    assert node is None
    assert "too many" in problems[0].message


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "p.yaml:1: is empty"),
        (b"- a\n", "p.yaml:1: must hold keys"),
        (b"a: 1\nb: \xff\n", "p.yaml:2: is not UTF-8"),
    ],
)
def test_files_that_hold_no_mapping(tmp_path: Path, content: bytes, wanted: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    node, problems = read_file(path, "p.yaml")
    assert node is None
    assert str(problems[0]).startswith(wanted)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "can't be read" in read_file(tmp_path, "p.yaml")[1][0].message


@given(st.text(max_size=200))
def test_any_text_gives_a_value_or_a_fault(text: str) -> None:
    node, problems = read_text(text, "t.yaml", Path("/"))
    assert node is not None or problems
