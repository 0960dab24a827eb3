"""apt's languages: source lines, configuration, printed URIs and errors (in apt's real words)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recvirt.apt import Package, apt_conf, parse_source, parse_uris, sources_lines, translate_apt_error
from recvirt.errors import CommandError, ConfigError, DownloadError, RecvirtError, SpaceError, VerificationError

#: What mmdebstrap leaves in a tools root, with names of no real machine.
DEFAULT = [
    "# written by a bootstrapper",
    "deb http://main.example.org/debian trixie main",
    "deb http://main.example.org/debian trixie-updates main",
    "deb [arch=amd64] http://security.example.org/debian-security trixie-security main",
    "",
]
SHA = "0123456789abcdef" * 4


def test_the_default_of_the_same_suite() -> None:
    assert sources_lines(DEFAULT, "trixie") == [
        "deb http://main.example.org/debian trixie main",
        "deb http://main.example.org/debian trixie-updates main",
        "deb http://security.example.org/debian-security trixie-security main",
    ]


def test_another_stable_suite_keeps_its_pockets() -> None:
    assert sources_lines(DEFAULT, "bookworm", components=("main", "contrib")) == [
        "deb http://main.example.org/debian bookworm main contrib",
        "deb http://main.example.org/debian bookworm-updates main contrib",
        "deb http://security.example.org/debian-security bookworm-security main contrib",
    ]


def test_backports_come_with_their_base() -> None:
    assert sources_lines(DEFAULT, "trixie-backports") == [
        "deb http://main.example.org/debian trixie main",
        "deb http://main.example.org/debian trixie-backports main",
        "deb http://main.example.org/debian trixie-updates main",
        "deb http://security.example.org/debian-security trixie-security main",
    ]


@pytest.mark.parametrize("suite", ["sid", "unstable", "experimental"])
def test_a_rolling_suite_has_no_pockets(suite: str) -> None:
    assert sources_lines(DEFAULT, suite) == [f"deb http://main.example.org/debian {suite} main"]


def test_a_mirror_stands_alone() -> None:
    assert sources_lines(DEFAULT, "trixie", mirror="https://mirror.example.org/debian") == [
        "deb https://mirror.example.org/debian trixie main"
    ]
    assert sources_lines(DEFAULT, "trixie-backports", mirror="http://m/debian") == [
        "deb http://m/debian trixie main",
        "deb http://m/debian trixie-backports main",
    ]


def test_a_snapshot_is_a_folder_of_its_mirror_and_may_be_old() -> None:
    stamp = "20260101T000000Z"
    wanted = [f"deb [check-valid-until=no] http://s.example.org/archive/{stamp} trixie main"]
    for mirror in ("http://s.example.org/archive", "http://s.example.org/archive/"):
        assert sources_lines(DEFAULT, "trixie", snapshot=stamp, snapshot_mirror=mirror) == wanted
        assert sources_lines(DEFAULT, "trixie", snapshot=stamp, mirror=mirror) == wanted
    # A mirror of today must not replace the snapshot.
    both = sources_lines(DEFAULT, "trixie", snapshot=stamp, mirror="http://m/", snapshot_mirror="http://s.example.org")
    assert both == [f"deb [check-valid-until=no] http://s.example.org/{stamp} trixie main"]


def test_a_snapshot_without_an_archive_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        sources_lines(DEFAULT, "trixie", snapshot="20260101T000000Z")
    assert "root.snapshot_mirror" in caught.value.hint


def test_a_keyring_signs_every_line() -> None:
    lines = sources_lines(DEFAULT, "trixie", keyring=Path("/tmp/k.gpg"))
    assert len(lines) == 3
    assert all(line.startswith("deb [signed-by=/tmp/k.gpg] http") for line in lines)
    (line,) = sources_lines(
        DEFAULT, "trixie", keyring=Path("/k.gpg"), snapshot="20260101T000000Z", snapshot_mirror="http://s"
    )
    assert line.startswith("deb [signed-by=/k.gpg check-valid-until=no] http://s/20260101T000000Z ")


@pytest.mark.parametrize(
    "mirror",
    [
        "[trusted=yes] http://evil.example.org", "http://m/debian sid main", "file:///debian", "copy:/debian", "debian",
        "http://m/\tx", "", "ftp://m/debian", "http://m/[x]",
    ],
)  # fmt: skip
def test_a_mirror_must_be_a_plain_url(mirror: str) -> None:
    if not mirror:
        assert sources_lines(DEFAULT, "trixie", mirror=mirror) == sources_lines(DEFAULT, "trixie")
        return
    with pytest.raises(ConfigError, match="not an archive's URL"):
        sources_lines(DEFAULT, "trixie", mirror=mirror)


def test_a_tools_root_without_sources_is_told() -> None:
    with pytest.raises(RecvirtError, match="names no archive"):
        sources_lines(["# nothing", "deb-src http://m/ x y"], "trixie")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("deb http://main.example.org/debian trixie main", "main.example.org_debian_dists_trixie_InRelease"),
        ("deb http://127.0.0.1:8080 sid main", "127.0.0.1:8080_dists_sid_InRelease"),
        ("deb https://m.example.org/a_b/ sid main", "m.example.org_a%5fb_dists_sid_InRelease"),
        ("deb http://me:secret@m/d~x sid main", "m_d%7ex_dists_sid_InRelease"),
    ],
)
def test_the_name_apt_gives_to_a_release_file(line: str, file: str) -> None:
    source = parse_source(line)
    assert source is not None
    assert source.release_file == file


def test_a_source_line_is_read() -> None:
    source = parse_source("deb [signed-by=/k check-valid-until=no] http://m/debian/ trixie main contrib\n")
    assert source is not None
    assert source.release_url == "http://m/debian/dists/trixie/InRelease"
    assert source.options == ("signed-by=/k", "check-valid-until=no")
    assert parse_source("# deb http://m x main") is None
    assert parse_source("deb-src http://m x main") is None


# -- apt.conf ----------------------------------------------------------------------------------------------------------


def test_apt_stays_below_its_own_folder() -> None:
    conf = apt_conf(Path("/cache/with space/apt/x"), timeout_seconds=7, retries=2)
    settings = dict(line.rstrip(";").split(" ", 1) for line in conf.splitlines())
    for name in ("Dir::State", "Dir::State::Lists", "Dir::State::status", "Dir::Cache", "Dir::Etc::SourceList"):
        assert settings[name].startswith('"/cache/with space/apt/x'), name
    assert settings["Dir::Etc::SourceParts"] == '"/dev/null"'
    assert settings["Acquire::http::Timeout"] == settings["Acquire::https::Timeout"] == '"7"'
    assert settings["Acquire::Retries"] == '"2"'
    # Signatures, validity dates and certificates are nobody's to switch off here.
    for word in ("AllowInsecure", "AllowUnauthenticated", "Check-Valid-Until", "Verify-Peer", "Verify-Host"):
        assert word not in conf


# -- printed URIs ------------------------------------------------------------------------------------------------------


def test_printed_uris_become_packages() -> None:
    text = "\n".join(
        [
            "Reading package lists...",
            f"'http://m/pool/z/zstd/zstd_1.5.7_amd64.deb' zstd_1.5.7_amd64.deb 100 SHA256:{SHA}",
            f"'http://m/pool/a/a/a_1.2%2b3-1_all.deb' a_1%3a1.2+3-1_all.deb 5 SHA256:{SHA}",
        ]
    )
    a, zstd = parse_uris(text)
    assert a == Package(
        "a", "1:1.2+3-1", "all", SHA, 5, "a_1%3a1.2+3-1_all.deb", "http://m/pool/a/a/a_1.2%2b3-1_all.deb"
    )
    assert (zstd.name, zstd.version, zstd.arch, zstd.size_bytes) == ("zstd", "1.5.7", "amd64", 100)


@pytest.mark.parametrize(
    "line",
    [
        f"'http://m/a.deb' ../../a_1_all.deb 5 SHA256:{SHA}",
        f"'http://m/a.deb' /etc/a_1_all.deb 5 SHA256:{SHA}",
        "'http://m/a.deb' a_1_all.deb 5 MD5Sum:0123",
        "'http://m/a.deb' a_1_all.deb 5 ",
    ],
)
def test_what_is_not_pinned_or_leaves_the_cache_is_no_package(line: str) -> None:
    assert parse_uris(line) == ()


def test_the_pin_follows_the_content_not_the_place() -> None:
    package = Package("a", "1", "all", SHA, 5, "a_1_all.deb", "http://m/a.deb")
    assert package.pin == dataclasses.replace(package, uri="http://other/a.deb").pin
    for change in ({"version": "2"}, {"sha256": SHA[::-1]}, {"arch": "amd64"}, {"name": "b"}):
        assert dataclasses.replace(package, **change).pin != package.pin  # type: ignore[arg-type]


# -- errors ------------------------------------------------------------------------------------------------------------

IGNORED = "E: Some index files failed to download. They have been ignored, or old ones used instead."
SAID = [
    (
        "E: Release file for http://m/dists/trixie/InRelease is expired (invalid since 24h 0min 0s). Updates for this "
        "repository will not be applied.",
        VerificationError, "out of date", "clock",
    ),
    (
        "E: Release file for http://m/dists/sid/InRelease is not valid yet (invalid for another 2h 3min 4s). Updates "
        "for this repository will not be applied.",
        VerificationError, "out of date", "clock",
    ),
    ("E: The repository 'http://m trixie Release' is not signed.", VerificationError, "signature", "keyring"),
    ("E: The repository 'http://m trixie Release' is no longer signed.", VerificationError, "signature", "keyring"),
    (
        "W: OpenPGP signature verification failed: http://m trixie InRelease: Sub-process /usr/bin/sqv returned an "
        "error code (1), error message is: Missing key A610835F43AE, which is needed to verify signature.\n"
        "E: The repository 'http://m trixie InRelease' is not signed.",
        VerificationError, "signature", "keyring",
    ),
    (
        "W: GPG error: http://m trixie InRelease: The following signatures couldn't be verified because the public key "
        "is not available: NO_PUBKEY 0123456789ABCDEF",
        VerificationError, "signature", "keyring",
    ),
    (
        "E: Failed to fetch http://m/Packages.gz  Hash Sum mismatch\n   Hashes of expected file:\n    - SHA256:30\n"
        "   Hashes of received file:\n    - SHA256:e0\n" + IGNORED,
        VerificationError, "something else", "mirror",
    ),
    (
        "E: Failed to fetch http://m/x.deb  File has unexpected size (4936 != 4932). Mirror sync in progress? [IP: 1]",
        VerificationError, "something else", "mirror",
    ),
    ("E: Failed to fetch http://m/x.deb  404  Not Found [IP: ::1 43309]", DownloadError, "not be read", "network"),
    ("E: Failed to fetch http://m/InRelease  Could not resolve 'm'\n" + IGNORED, DownloadError, "not be read", "proxy"),
    ("E: Failed to fetch http://m/Packages  Connection timed out [IP: 1 2]", DownloadError, "not be read", "network"),
    (
        "E: Failed to fetch http://m/P  Error reading from server. Remote end closed connection [IP: 127.0.0.1 37833]",
        DownloadError, "not be read", "--offline",
    ),
    (
        "E: The repository 'http://m trixie Release' does not have a Release file.",
        DownloadError, "no suite trixie", "root.suite",
    ),
    (
        "E: The repository 'http://m trixie Release' no longer has a Release file.",
        DownloadError, "no suite trixie", "root.mirror",
    ),
    (
        "E: Failed to fetch https://m/dists/trixie/InRelease  SSL connection failed: error:0A000086:SSL routines::"
        "certificate verify failed / Success [IP: 127.0.0.1 1]",
        DownloadError, "prove who it is", "SSL_CERT_FILE",
    ),
    (
        "E: Failed to fetch https://m/InRelease  Certificate verification failed: The certificate is NOT trusted.",
        DownloadError, "prove who it is", "SSL_CERT_FILE",
    ),
    ("E: Unable to locate package nope", ConfigError, "nope", "package lists"),
    ("E: Package 'nope' has no installation candidate", ConfigError, "nope", "package lists"),
    ("E: Version '9' for 'tool' was not found", ConfigError, "'tool'", "package lists"),
    (
        "E: Unable to correct problems, you have held broken packages.\nE: The following information from --solver 3.0 "
        "may provide additional context:\n   Unable to satisfy dependencies. Reached two conflicting decisions:\n"
        "   1. broken:amd64=1.0 is selected for install\n   2. broken:amd64 Depends nowhere\n",
        ConfigError, "Depends nowhere", "package lists",
    ),
    ("E: Write error - write (28: No space left on device)", SpaceError, "full", "--cache-dir"),
    # Names must not decide.
    ("E: Unable to locate package certificate-verifier", ConfigError, "certificate", "package lists"),
    ("E: Failed to fetch http://m/ca-certificates_1_all.deb  404  Not Found", DownloadError, "not be read", "network"),
    ("E: Failed to fetch http://m/sqv_1_amd64.deb  404  Not Found", DownloadError, "not be read", "network"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "kind", "words", "hint"), SAID)
def test_what_apt_says_becomes_an_error_with_a_next_step(
    said: str, kind: type[RecvirtError], words: str, hint: str
) -> None:
    error = translate_apt_error(CommandError(["apt-get"], 100, last_lines=said.splitlines()), "trixie")
    assert type(error) is kind
    assert words in error.message
    assert hint in error.hint
    assert "trixie" in error.message


def test_a_silent_apt_is_still_an_error() -> None:
    error = translate_apt_error(CommandError(["apt-get"], -9, last_lines=["no end after 900 s"]), "trixie")
    assert type(error) is DownloadError
    assert "no end after 900 s" in error.message
