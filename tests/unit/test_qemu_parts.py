"""QMP, seeds and SSH configuration, without any QEMU."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
import yaml

from recvirt.qemu import CloudConfig, QmpClient, QmpError, SshAccess, make_key
from recvirt.qemu.qmp import connect_unix, parse_forwards

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": "Debian"}}}


def client_for(*messages: object) -> tuple[QmpClient, io.BytesIO]:
    lines = b"".join(json.dumps(m).encode() + b"\n" for m in (GREETING, {"return": {}}, *messages))
    sent = io.BytesIO()
    return QmpClient(io.BytesIO(lines), sent), sent


def test_qmp_greets_negotiates_and_returns() -> None:
    qmp, sent = client_for({"return": {"running": True}})
    assert qmp.version == "10.0.13" and qmp.package == "Debian"
    assert qmp.execute("query-status") == {"running": True}
    assert [json.loads(line)["execute"] for line in sent.getvalue().splitlines()] == [
        "qmp_capabilities",
        "query-status",
    ]


def test_qmp_keeps_events_that_arrive_before_an_answer() -> None:
    qmp, _ = client_for({"event": "RESUME"}, {"event": "SHUTDOWN", "data": {"guest": True}}, {"return": 1})
    assert qmp.execute("cont") == 1
    assert qmp.wait_event("SHUTDOWN")["data"] == {"guest": True}
    assert [event["event"] for event in qmp.events] == ["RESUME"]


def test_qmp_refusal_and_end_are_errors() -> None:
    qmp, _ = client_for({"error": {"class": "GenericError", "desc": "no such disk"}})
    with pytest.raises(QmpError, match="refused eject: no such disk"):
        qmp.execute("eject")
    with pytest.raises(QmpError, match="closed its control connection"):
        qmp.execute("quit")


def test_a_socket_is_reached_however_long_its_path(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    here = Path.cwd()
    server = socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    try:
        server.bind("s")
    finally:
        os.chdir(here)
    server.listen()
    threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"), daemon=True).start()
    with connect_unix(folder, "s", seconds=5) as client:
        assert client.recv(5) == b"hello"
    server.close()


def test_a_socket_that_never_appears_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        connect_unix(tmp_path, "absent", seconds=0.1)


def test_forwards_are_read_off_the_monitor() -> None:
    text = (
        "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]  11       127.0.0.1 39995       10.0.2.15    22     0     0\r\n"
        "  TCP[ESTABLISHED]   12       127.0.0.1 39995       10.0.2.15    80     0     0\r\n"
    )
    assert parse_forwards(text) == {22: 39995}


def test_user_data_is_yaml_whatever_the_values_hold() -> None:
    nasty = 'x: "y"\n- {{ z }}\n#!'
    config = CloudConfig("i", "h", "u", ("ssh-ed25519 AAAA c",), ("kvm",), (("/etc/f", nasty),), (("touch", "/x"),))
    text = config.user_data()
    assert text.startswith("#cloud-config\n")
    data = yaml.safe_load(text)
    assert data["write_files"] == [{"path": "/etc/f", "content": nasty}]
    user = data["users"][1]
    assert user["lock_passwd"] is True and user["ssh_authorized_keys"] == ["ssh-ed25519 AAAA c"]
    assert data["runcmd"] == [["touch", "/x"]]
    assert yaml.safe_load(config.meta_data()) == {"instance-id": "i", "local-hostname": "h"}


def test_without_a_host_name_none_is_said() -> None:
    config = CloudConfig("i", user="u")
    assert "hostname" not in yaml.safe_load(config.user_data())
    assert yaml.safe_load(config.meta_data()) == {"instance-id": "i"}


def test_a_key_is_private_and_made_anew(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    first = key.read_text()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert make_key(tmp_path).read_text() != first


def test_ssh_config_uses_only_the_key_and_no_agent(tmp_path: Path) -> None:
    text = SshAccess(tmp_path, 2200, "u", tmp_path / "k").write().config_path.read_text()
    for line in ("Port 2200", "IdentitiesOnly yes", "IdentityAgent none", "BatchMode yes"):
        assert f"  {line}\n" in text
    assert int(text.split("ConnectTimeout ")[1].split()[0]) >= 30


def test_a_control_path_that_would_not_fit_is_left_out(tmp_path: Path) -> None:
    short = SshAccess(Path("/run/x"), 1, "u", Path("/k")).config_text()
    deep = SshAccess(tmp_path / ("d" * 110), 1, "u", Path("/k")).config_text()
    assert "ControlPath" in short and "ControlPath" not in deep


def test_commands_around_reboots_do_not_share_a_connection() -> None:
    access = SshAccess(Path("/run/x"), 1, "u", Path("/k"))
    assert "ControlPath=none" in access.argv("true", shared=False)
    assert "ControlPath=none" not in access.argv("true")


def test_a_guest_in_a_guest_is_reached_through_the_outer_one() -> None:
    text = SshAccess(Path("/run/x"), 22, "u", Path("/k"), "192.168.123.5", Path("/run/o/ssh_config")).config_text()
    assert "HostName 192.168.123.5" in text
    assert "ProxyCommand ssh -F '/run/o/ssh_config' -W %h:%p guest" in text


def test_banner_needs_an_ssh_server(tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def serve() -> None:
        for words in (b"SSH-2.0-x\r\n", b"220 mail\r\n"):
            connection = server.accept()[0]
            connection.sendall(words)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    access = SshAccess(tmp_path, port, "u", tmp_path / "k")
    assert access.banner() is True
    assert access.banner() is False
    server.close()
    assert access.banner(0.5) is False
