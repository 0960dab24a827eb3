"""Uploads in pieces: the same piece twice, a hole, too much, and what somebody else left in the folder."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from recvirt.nestedcloud import spool
from recvirt.nestedcloud.model import ModelError

KEY = "6f1c3a52-8f3e-4a57-9b1d-2c40f6a7d9e1"


def test_pieces_come_in_order_and_may_come_twice(tmp_path: Path) -> None:
    assert spool.write(tmp_path, KEY, 0, b"abc", 6) == 3
    assert spool.write(tmp_path, KEY, 0, b"abc", 6) == 3
    assert spool.write(tmp_path, KEY, 3, b"def", 6) == 6
    assert spool.size(tmp_path, KEY) == 6
    with spool.read(tmp_path, KEY) as stream:
        assert stream.read() == b"abcdef"
    spool.remove(tmp_path, KEY)
    spool.remove(tmp_path, KEY)
    assert spool.size(tmp_path, KEY) == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("offset", "data", "words"), [(4, b"x", "starts at 3"), (-1, b"x", "starts at 3"),
                                                       (3, b"xxxx", "7 bytes are more than the 6")])  # fmt: skip
def test_a_hole_or_too_much_is_refused(tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    spool.write(tmp_path, KEY, 0, b"abc", 6)
    with pytest.raises(spool.SpoolError, match=words):
        spool.write(tmp_path, KEY, offset, data, 6)
    assert spool.size(tmp_path, KEY) == 3


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / f"{KEY}.upload").symlink_to(secret)
    with pytest.raises(spool.SpoolError):
        spool.read(tmp_path, KEY)
    with pytest.raises(spool.SpoolError):
        spool.write(tmp_path, KEY, 0, b"x", 6)
    assert secret.read_text() == "secret" and spool.size(tmp_path, KEY) == 0


def test_a_pipe_or_a_folder_is_no_upload_and_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{KEY}.upload")
    with pytest.raises(spool.SpoolError, match="is no file"):
        spool.read(tmp_path, KEY)
    other = str(uuid.uuid4())
    (tmp_path / f"{other}.upload").mkdir()
    with pytest.raises(spool.SpoolError, match="is no file"):
        spool.read(tmp_path, other)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", "a/b", KEY.upper(), KEY + "\n", "json:{}"])
def test_a_name_that_is_no_uuid_is_refused(tmp_path: Path, name: str) -> None:
    for attempt in (spool.read, spool.remove):
        with pytest.raises(ModelError):
            attempt(tmp_path, name)
    with pytest.raises(ModelError):
        spool.write(tmp_path, name, 0, b"x", 1)


def test_both_sides_of_a_folder_agree_which_it_is(tmp_path: Path) -> None:
    one = spool.identity(tmp_path / "spool")
    assert spool.identity(tmp_path / "spool") == one != spool.identity(tmp_path / "other")
    assert len(list((tmp_path / "spool").iterdir())) == 1
