"""A machine becomes a worker, stays one and leaves: against the real API, with programs that only pretend."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rest_framework.test import APIClient

from recvirt.nestedcloud import credentials, join, membership, pinned, tunnel
from recvirt.nestedcloud.central.models import Peer, Worker
from recvirt.nestedcloud.cli import main_group
from recvirt.nestedcloud.credentials import Token
from recvirt.nestedcloud.join import Times
from recvirt.nestedcloud.pinned import Answer, LinkError, Place
from recvirt.nestedcloud.provision import Machine, ProvisionError, read
from recvirt.nestedcloud.statuses import ExitStatus
from recvirt.nestedcloud.worker import consoles, service
from tests.cloud.test_peers import CERTIFICATE, CLOUD, _tunnel, invited, key_of, root
from tests.cloud.test_tunnel import Programs

__all__ = ["_tunnel", "root"]
URL = "https://192.0.2.7"


class Killed(BaseException):
    """As kill -9: nothing catches it."""


class Host(Programs):
    """A machine that would be a worker, and the wire to the API."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.running = ""
        self.told: list[str] = []
        self.handshake = self.login = True
        self.lost: list[str] = []
        self.dead: set[str] = set()
        self.clock = 0.0
        self.asked: list[tuple[str, str]] = []
        self.die_at = ""
        owner = (os.geteuid(), os.getegid())
        self.machine = Machine(root, self, lambda _user: owner, self.told.append, self.can_log_in)
        (root / "run").mkdir(parents=True)
        (root / "etc/recvirt").mkdir(parents=True)
        (root / "etc/recvirt/nfs.conf").write_text("# kept\nIMAGES_SOURCE=\nIMAGES_OPTIONS=\nBLOCKS_SOURCE=a:/b\n")

    def __call__(self, argv: Sequence[str], text: str, user: str | None) -> str:
        words = " ".join(argv)
        if self.die_at and self.die_at in words:
            raise Killed(words)
        if argv[0] == "virsh":
            return self.running
        if words.endswith("dump"):
            age = "0" if not self.handshake else "99999999999"
            return f"private\tpublic\t1\toff\nkey\t(none)\t192.0.2.7:51820\tfd00::1/128\t{age}\t1\t2\t25\n"
        return super().__call__(argv, text, user)

    def can_log_in(self, url: str) -> bool:
        self.urls = url
        return self.login

    def ask(self, place: Place, path: str, body: Mapping[str, Any], context: Any, seconds: float = 0.0,
            device: str = "") -> Answer:  # fmt: skip
        """``pinned.ask``, into the API."""
        way = "tunnel" if device else "public"
        if way in self.dead:
            raise LinkError(f"{place} can't be reached", "look")
        self.asked.append((way, path))
        answer = APIClient().post(f"/api/v1/{path}", dict(body), format="json")
        if self.lost:
            raise Killed(self.lost.pop())
        if answer.status_code != 200:
            raise pinned._refusal(answer.status_code, answer.data)
        return Answer(dict(answer.data), self.clock)

    def secrets(self) -> list[str]:
        data = json.loads(membership.path_of(self.machine).read_text())
        return [data["current"]["password"], (tunnel.folder(self.machine) / "key").read_text().strip()]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path / "host")
    monkeypatch.setattr(pinned, "ask", made.ask)
    monkeypatch.setattr(pinned, "certificate_of", lambda _place, _fingerprint: f"PEM {_fingerprint}")
    monkeypatch.setattr(pinned, "pinned_context", lambda _pem: None)
    return made


def times() -> Times:
    clock = iter(range(10**6))
    return Times(3, 3, lambda _seconds: None, lambda: next(clock))


def go(host: Host, token: str, url: str = URL, **words: Any) -> None:
    join.join(host.machine, url, credentials.parse_token(token), times=times(), **words)


def test_one_command_makes_a_worker_of_a_machine(host: Host, root: APIClient) -> None:
    token = invited(root)
    go(host, token, name="shelf")
    config = service.load(host.machine.worker)
    worker = Worker.objects.get(name="shelf")
    central = tunnel.central_address(CLOUD)
    assert (config.uuid, config.cloud, config.domain_type) == (str(worker.pk), str(CLOUD), "kvm")
    password = host.secrets()[0]
    assert config.broker == f"amqp://{config.uuid}:{password}@[{central}]:5672//" == host.urls
    assert credentials.opens(password, Peer.objects.get().password_hash)
    assert (config.api, config.api_pinned, config.spool_dir) == (f"https://[{central}]", True, "/var/lib/recvirt/spool")
    assert Path(config.api_ca).read_text() == f"PEM {CERTIFICATE}"
    assert f"Endpoint = 192.0.2.7:{tunnel.PORT}" in host.synced and key_of("central") in host.synced
    assert (host.machine.root / "etc/recvirt/nfs.conf").read_text().splitlines() == [
        "# kept", "BLOCKS_SOURCE=a:/b", f"IMAGES_SOURCE=[{central}]:/var/lib/recvirt/images",
        "IMAGES_OPTIONS=vers=4.2,hard", f"SPOOL_SOURCE=[{central}]:/var/lib/recvirt-cloud-spool",
        "SPOOL_OPTIONS=vers=4.2,hard",
    ]  # fmt: skip
    assert host.named("restart", "recvirt-nfs.service")
    units = [argv[-1] for argv in host.named("systemctl") if "recvirt-nfs.service" not in argv]
    assert units == ["recvirt-cloud-tunnel.service", "recvirt-cloud-setup.service", "recvirt-cloud.target"]
    said = [" ".join(argv) for argv in host.calls] + host.told
    assert not [line for line in said for secret in [*host.secrets(), token] if secret in line]
    modes = {stat.S_IMODE((tunnel.folder(host.machine) / name).stat().st_mode) for name in ("key", "worker.json")}
    assert modes == {0o600} and stat.S_IMODE(host.machine.worker.stat().st_mode) == 0o640


def test_the_generator_of_mounts_takes_what_is_written(host: Host, root: APIClient, tmp_path: Path) -> None:
    go(host, invited(root))
    script = (
        Path(__file__).parents[2] / "recvirt/resources/templates/root/usr/lib/systemd/system-generators/recvirt-nfs"
    )
    out = tmp_path / "units"
    out.mkdir()
    conf = host.machine.root / "etc/recvirt/nfs.conf"
    environment = {**os.environ, "RECVIRT_NFS_CONF": str(conf), "RECVIRT_NFS_LOG": str(tmp_path / "log")}
    subprocess.run(["sh", str(script), str(out)], env=environment, check=True)
    unit = (out / "var-lib-recvirt-images.mount").read_text()
    assert f"What=[{tunnel.central_address(CLOUD)}]:/var/lib/recvirt/images" in unit and "vers=4.2,hard" in unit
    unit = (out / "var-lib-recvirt-spool.mount").read_text()
    assert f"What=[{tunnel.central_address(CLOUD)}]:/var/lib/recvirt-cloud-spool\n" in unit
    assert (out / "remote-fs.target.wants/var-lib-recvirt-spool.automount").is_symlink()


STEPS = ["wg genkey", "join", "wg syncconf", "address replace", "recvirt-nested-check", "recvirt-nfs.service", "enable"]


@pytest.mark.parametrize("step", STEPS)
def test_killed_anywhere_the_same_command_goes_on(host: Host, root: APIClient, step: str) -> None:
    token = invited(root)
    if step == "join":
        host.lost.append("the answer")
    else:
        host.die_at = step
    with pytest.raises(Killed):
        go(host, token)
    host.die_at = ""
    go(host, token)
    before = host.secrets()
    go(host, token)
    assert host.secrets() == before and Peer.objects.count() == 1
    assert service.load(host.machine.worker).uuid == str(Peer.objects.get().worker_id)
    assert host.asked[-1] == ("tunnel", "peer")


@pytest.mark.parametrize(
    ("change", "text", "hint"),
    [({"handshake": False}, "no handshake", "UDP port 51820"), ({"login": False}, "did not let", "recvirt-cloud-peers"),
     ({"handshake": False, "clock": 900.0}, "no handshake", "clocks are 900 s apart"),
     ({"dead": {"public"}}, "can't be reached", "look")],
)  # fmt: skip
def test_what_does_not_work_is_told_with_what_to_do(
    host: Host, root: APIClient, change: dict[str, Any], text: str, hint: str
) -> None:
    for name, value in change.items():
        setattr(host, name, value)
    with pytest.raises(LinkError, match=text) as caught:
        go(host, invited(root))
    assert hint in caught.value.hint
    for secret in host.secrets():
        assert secret not in str(caught.value) + caught.value.hint


def test_a_refusal_says_what_to_do(host: Host, root: APIClient) -> None:
    with pytest.raises(LinkError, match="not valid") as caught:
        go(host, str(credentials.new_token(CERTIFICATE)))
    assert caught.value.status is ExitStatus.REFUSED and "worker invite" in caught.value.hint
    with pytest.raises(LinkError, match="called w1") as caught:
        go(host, invited(root), name="w1")
    assert "--name" in caught.value.hint
    # It was only called otherwise.
    go(host, invited(root), name="w2")


@pytest.mark.parametrize(
    "changes",
    [{"uuid": "x"}, {"address": "fd00::9"}, {"central_address": "::1"}, {"cloud": "../x"}, {"port": 0}, {"port": "x"},
     {"central_public_key": "k\nx"}, {"address": None}, {"address": f"{tunnel.peer_address(CLOUD, 2)}%\nx"}],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_changes_nothing(
    host: Host, root: APIClient, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def ask(*words: Any, **more: Any) -> Answer:
        answer = host.ask(*words, **more)
        return replace(answer, data={**answer.data, **changes})

    monkeypatch.setattr(pinned, "ask", ask)
    with pytest.raises(LinkError, match="no sense"):
        go(host, invited(root))
    assert not host.machine.worker.exists() and not host.synced


def test_who_is_somebody_already_does_not_become_somebody_else(host: Host, root: APIClient) -> None:
    go(host, invited(root))
    with pytest.raises(LinkError, match="another cloud"):
        go(host, invited(root), url="https://192.0.2.8")
    host.machine.central.write_text("")
    with pytest.raises(LinkError, match="central node"):
        go(host, invited(root))
    with pytest.raises(LinkError, match="central node"):
        join.leave(host.machine)


def test_without_nfs_its_file_is_left_alone(host: Host, root: APIClient) -> None:
    before = (host.machine.root / "etc/recvirt/nfs.conf").read_text()
    go(host, invited(root), nfs=False)
    assert (host.machine.root / "etc/recvirt/nfs.conf").read_text() == before


# --- where disks are


def sources(host: Host) -> dict[str, str]:
    lines = (host.machine.root / "etc/recvirt/nfs.conf").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def bare(host: Host) -> Host:
    """A machine whose disks are its own."""
    (host.machine.root / "etc/recvirt/nfs.conf").write_text("IMAGES_SOURCE=\nBLOCKS_SOURCE=\n")
    return host


def test_disks_are_shared_if_that_is_wanted_and_stay_so(bare: Host, root: APIClient) -> None:
    token = invited(root)
    go(bare, token, disks="shared")
    wanted = f"[{tunnel.central_address(CLOUD)}]:/var/lib/recvirt/blocks"
    found = sources(bare)
    assert (found["BLOCKS_SOURCE"], found["BLOCKS_OPTIONS"]) == (wanted, "vers=4.2,hard,lookupcache=positive")
    # All in one go: a mount is not made twice.
    assert len(bare.named("restart", "recvirt-nfs.service")) == 1
    bare.running = "web-12345678"
    for again in ("", "shared"):
        go(bare, token, disks=again)
    assert sources(bare) == found
    join.leave(bare.machine, force=True)
    assert sources(bare)["BLOCKS_SOURCE"] == sources(bare)["SPOOL_SOURCE"] == ""


def test_disks_that_are_there_are_not_hidden(bare: Host, root: APIClient) -> None:
    folder = bare.machine.root / "var/lib/recvirt/blocks"
    folder.mkdir(parents=True)
    (folder / "identity").write_text("x")
    token = invited(root)
    (folder / "0.qcow2").write_text("")
    with pytest.raises(LinkError, match=r"1 disks lie in .*hidden: 0.qcow2"):
        go(bare, token, disks="shared")
    assert bare.asked == []
    go(bare, token, disks="local")
    (folder / "0.qcow2").unlink()
    go(bare, token, disks="shared")
    assert sources(bare)["BLOCKS_SOURCE"] != ""


def test_shared_disks_that_are_used_are_not_left_behind(bare: Host, root: APIClient) -> None:
    token = invited(root)
    go(bare, token, disks="shared")
    bare.running = "web-12345678"
    with pytest.raises(LinkError, match="1 instances have their disks here: web-12345678"):
        go(bare, token, disks="local")
    bare.running = ""
    go(bare, token, disks="local")
    assert sources(bare)["BLOCKS_SOURCE"] == sources(bare)["BLOCKS_OPTIONS"] == ""


def test_a_file_server_of_the_owner_s_stays(host: Host, root: APIClient) -> None:
    token = invited(root)
    with pytest.raises(LinkError, match="come from a:/b already") as caught:
        go(host, token, disks="shared")
    assert "--disks local" in caught.value.hint
    go(host, token, disks="local")
    assert sources(host)["BLOCKS_SOURCE"] == "a:/b"


# --- another address of the central node

NEW = "https://cloud.example.org"


def test_the_central_node_is_found_at_another_url(member: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "resolve", lambda _host, _port: "192.0.2.99")
    monkeypatch.setattr(tunnel.up, "__defaults__", (tunnel.resolve,))
    member.dead.add("tunnel")
    join.move_central(member.machine, NEW, times=times())
    assert membership.required(member.machine).url == NEW
    config = tunnel.config(member.machine)
    assert config is not None and config["central"]["host"] == "cloud.example.org"
    assert f"Endpoint = 192.0.2.99:{tunnel.PORT}" in member.synced
    # A session that was there before proves nothing.
    assert member.named("ip", "link", "delete")
    assert not join.refresh(member.machine)
    for secret in member.secrets():
        assert not [line for line in member.told if secret in line]


def test_another_central_node_gets_no_password(member: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(place: Place, _fingerprint: str) -> str:
        raise LinkError(f"{place} shows another certificate", "look", kind="fingerprint", status=ExitStatus.REFUSED)

    monkeypatch.setattr(pinned, "certificate_of", another)
    with pytest.raises(LinkError, match="another certificate"):
        join.move_central(member.machine, NEW, times=times())
    assert member.asked == [] and member.calls == [] and membership.required(member.machine).url == URL


def test_a_certificate_that_has_changed_as_well_can_be_named(member: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(pinned, "certificate_of", lambda _place, wanted: shown.append(wanted) or "PEM")  # type: ignore[func-returns-value]
    join.move_central(member.machine, NEW, fingerprint="cd" * 32, times=times())
    assert shown[0] == "cd" * 32


def test_another_cloud_with_this_worker_in_it_is_refused(member: Host) -> None:
    config = read(member.machine.worker)
    text = member.machine.worker.read_text().replace(config["cloud"], "11111111-1111-4111-8111-111111111111")
    member.machine.worker.write_text(text)
    with pytest.raises(LinkError, match="of another cloud"):
        join.move_central(member.machine, NEW, times=times())
    assert membership.required(member.machine).url == URL and not member.synced.count("cloud.example.org")


def test_without_a_handshake_there_everything_is_as_it_was(member: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    member.handshake = False
    with pytest.raises(LinkError, match="no handshake"):
        join.move_central(member.machine, NEW, times=times())
    config = tunnel.config(member.machine)
    assert membership.required(member.machine).url == URL
    assert config is not None and config["central"]["host"] == "192.0.2.7" and "still looked for" in member.told[-1]


# --- afterwards


@pytest.fixture
def member(host: Host, root: APIClient) -> Host:
    go(host, invited(root), name="shelf")
    host.asked.clear()
    host.calls.clear()
    return host


def test_a_refresh_changes_nothing_when_nothing_has_changed(member: Host) -> None:
    assert not join.refresh(member.machine)
    assert member.asked == [("tunnel", "peer")] and not member.named("syncconf")


def test_another_key_of_the_central_node_is_found_by_its_public_address(
    member: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "public.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "public_key": key_of("new")}))
    member.dead.add("tunnel")
    member.handshake = False
    assert join.refresh(member.machine)
    assert key_of("new") in member.synced and member.asked == [("public", "peer")]


def test_another_certificate_is_found_through_the_tunnel(member: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from recvirt.nestedcloud.central import peers

    monkeypatch.setattr(peers, "certificate_fingerprint", lambda: "cd" * 32)
    assert join.refresh(member.machine)
    assert membership.required(member.machine).fingerprint == "cd" * 32
    assert join.certificate_path(member.machine).read_text() == "PEM " + "cd" * 32
    assert not join.refresh(member.machine)


def test_a_tunnel_that_was_silent_is_made_anew(member: Host) -> None:
    member.handshake = False
    assert not join.refresh(member.machine)
    assert member.named("syncconf")


def test_a_worker_that_was_revoked_hears_it(member: Host, root: APIClient) -> None:
    root.post("/api/v1/workers/shelf/revoke", {}, format="json")
    with pytest.raises(LinkError, match="revoked") as caught:
        join.refresh(member.machine)
    assert "leave" in caught.value.hint and member.asked == [("tunnel", "peer")]


def test_key_and_password_are_changed(member: Host) -> None:
    before = member.secrets()
    join.rotate(member.machine, times())
    after = member.secrets()
    assert not set(before) & set(after)
    peer = Peer.objects.get()
    assert credentials.opens(after[0], peer.password_hash) and peer.public_key == key_of(after[1])
    assert f":{after[0]}@" in read(member.machine.worker)["broker"] and after[1] in member.synced
    assert member.named("try-restart", "recvirt-cloud-worker.service")
    assert not join.refresh(member.machine)
    assert Peer.objects.get().previous_hash == ""


@pytest.mark.parametrize("step", ["genkey", "pubkey", "the answer", "syncconf", "try-restart"])
@pytest.mark.parametrize("again", ["rotate", "refresh"])
def test_a_change_that_was_cut_short_is_finished(member: Host, step: str, again: str) -> None:
    if step == "the answer":
        member.lost.append(step)
    else:
        member.die_at = step
    with pytest.raises(Killed):
        join.rotate(member.machine, times())
    member.die_at = ""
    if again == "rotate":
        join.rotate(member.machine, times())
    else:
        join.refresh(member.machine)
    peer, now = Peer.objects.get(), member.secrets()
    assert credentials.opens(now[0], peer.password_hash) and peer.public_key == key_of(now[1])
    assert f":{now[0]}@" in read(member.machine.worker)["broker"]
    assert not join.refresh(member.machine)


def test_who_leaves_leaves_nothing(member: Host) -> None:
    join.leave(member.machine)
    assert Worker.objects.get(name="shelf").revoked
    assert not member.machine.worker.exists() and not list(tunnel.folder(member.machine).iterdir())
    conf = (member.machine.root / "etc/recvirt/nfs.conf").read_text()
    assert "# kept" in conf and "BLOCKS_SOURCE=a:/b" in conf and str(tunnel.central_address(CLOUD)) not in conf
    assert member.named("disable", "--now", "recvirt-cloud.target", "recvirt-cloud-tunnel.service")
    join.leave(member.machine)
    with pytest.raises(LinkError, match="no worker"):
        join.refresh(member.machine)


def test_nobody_leaves_running_instances_behind_unasked(member: Host, root: APIClient) -> None:
    member.running = "web\ndb\n"
    with pytest.raises(LinkError, match="2 instances run here: web, db"):
        join.leave(member.machine)
    assert member.machine.worker.exists() and not Worker.objects.get(name="shelf").revoked
    member.fails = "virsh"
    member.dead = {"tunnel", "public"}
    join.leave(member.machine, force=True)
    assert "recvirt-cloud worker revoke" in " ".join(member.told) and not member.machine.worker.exists()
    assert not Worker.objects.get(name="shelf").revoked
    # And comes in anew, as somebody else.
    member.dead, member.running, member.fails = set(), "", ""
    go(member, invited(root), name="shelf-2")
    assert Peer.objects.count() == 2


def test_a_damaged_file_is_told(member: Host) -> None:
    membership.path_of(member.machine).write_text("{")
    with pytest.raises(LinkError, match="damaged"):
        join.refresh(member.machine)
    join.leave(member.machine)
    assert not membership.path_of(member.machine).exists()


# --- the wire


class Server:
    """An HTTPS server of a test's own."""

    def __init__(self, folder: Path, answer: bytes = b"{}", status: int = 200, days: int = 1) -> None:
        key, cert = folder / "key.pem", folder / "cert.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc",
                        "-keyout", str(key), "-out", str(cert), "-days", str(days), "-subj", "/CN=x"],
                       check=True, capture_output=True)  # fmt: skip
        self.fingerprint = credentials.fingerprint_of(cert.read_text())
        self.got: list[bytes] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.place = Place("127.0.0.1", self.server.server_port)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_the_one_certificate_is_taken_whatever_is_in_it(server: Server) -> None:
    pem = pinned.certificate_of(server.place, server.fingerprint)
    answer = pinned.ask(server.place, "join", {"token": "secret"}, pinned.pinned_context(pem))
    assert answer.data == {} and abs(answer.clock_seconds) < 60 and server.got == [b'{"token": "secret"}']


def test_to_another_certificate_nothing_is_sent(server: Server, tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="another certificate") as caught:
        pinned.certificate_of(server.place, "ab" * 32)
    assert caught.value.kind == "fingerprint" and server.fingerprint in str(caught.value)
    other = tmp_path / "other"
    other.mkdir()
    second = Server(other)
    pem = pinned.certificate_of(second.place, second.fingerprint)
    second.server.shutdown()
    for context in (pinned.pinned_context(pem), ssl.create_default_context()):
        with pytest.raises(LinkError, match="not good"):
            pinned.ask(server.place, "join", {"token": "secret"}, context)
    assert server.got == []


def test_a_console_takes_the_pinned_certificate(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "central.pem"
    path.write_text(pinned.certificate_of(server.place, server.fingerprint))
    config = service.Config("u", "n", "c", "b", "l", "kvm", "i", "b", "r", api="https://[fd00::1]", api_ca=str(path),
                            api_pinned=True)  # fmt: skip
    context = consoles.tls_context(config)
    assert context is not None
    assert pinned.ask(server.place, "x", {}, context).data == {}
    unpinned = consoles.tls_context(replace(config, api_pinned=False))
    assert unpinned is not None and unpinned.check_hostname


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [(b"<html>", 502, "answered 502"), (b"[]", 200, "nothing that"),
     (b'{"title": "no", "type": "throttled"}', 429, "says: no")],
)  # fmt: skip
def test_answers_that_are_none(tmp_path: Path, answer: bytes, status: int, text: str) -> None:
    server = Server(tmp_path, answer, status)
    context = pinned.pinned_context(pinned.certificate_of(server.place, server.fingerprint))
    with pytest.raises(LinkError, match=text) as caught:
        pinned.ask(server.place, "join", {}, context)
    assert caught.value.hint
    server.server.shutdown()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(LinkError, match="nothing listens") as caught:
        pinned.certificate_of(Place("127.0.0.1", port), "ab" * 32)
    assert caught.value.status is ExitStatus.UNREACHABLE
    for error, hint in ((TimeoutError("x"), "firewall"), (socket.gaierror(-2, "x"), "has no address"),
                        (OSError(113, "No route to host"), "no way there")):  # fmt: skip
        assert hint in pinned._trouble(Place("cloud", 443), error).hint
    expired = ssl.SSLCertVerificationError()
    expired.verify_code, expired.verify_message = 10, "expired"
    assert "clock" in pinned._trouble(Place("cloud", 443), expired).hint


@pytest.mark.parametrize("url", ["http://cloud", "https://", "https://u:p@cloud", "https://cloud/api", "https://cloud:x",
                                 "ftp://cloud", "https://[::1"])  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(LinkError, match="no address"):
        pinned.place_of(url)


def test_addresses() -> None:
    assert str(pinned.place_of("cloud.example.org")) == "https://cloud.example.org"
    assert str(pinned.place_of("https://[2001:db8::1]:8443/")) == "https://[2001:db8::1]:8443"


# --- the command line


def test_errors_of_root_commands_are_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_words: Any, **_more: Any) -> None:
        raise LinkError("the wire is cut", "mend it", status=ExitStatus.REFUSED)

    def misconfigured(_machine: Machine) -> None:
        raise ProvisionError("ip: broken")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(join, "join", broken)
    monkeypatch.setattr(tunnel, "up", misconfigured)
    runner = CliRunner()
    done = runner.invoke(main_group, ["worker", "join", URL], input="rvj_" + "x" * 43 + "\n")
    assert (done.exit_code, done.output) == (ExitStatus.REFUSED, "error: the wire is cut\nhint: mend it\n")
    done = runner.invoke(main_group, ["worker", "join", URL, "--token", "x"])
    assert done.exit_code == ExitStatus.USAGE and "worker invite" in done.output
    assert runner.invoke(main_group, ["tunnel", "up"]).exit_code == ExitStatus.CONFIG
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = runner.invoke(main_group, ["worker", "leave"])
    assert done.exit_code == ExitStatus.CONFIG and "root" in done.output


def test_the_invitation_reaches_what_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[Token, dict[str, Any]]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(join, "join", lambda _machine, _url, token, **more: got.append((token, more)))
    words = ["worker", "join", URL, "--token", f"rvj_{'x' * 43}.{'ab' * 32}", "--no-nfs", "--name", "shelf"]
    assert CliRunner().invoke(main_group, words).exit_code == 0
    assert CliRunner().invoke(main_group, [*words, "--system-ca"]).exit_code == 0
    assert got[0][0] == Token("x" * 43, "ab" * 32) and got[1][0].fingerprint == ""
    assert (got[0][1]["nfs"], got[0][1]["name"], got[0][1]["disks"]) == (False, "shelf", "")
    done = CliRunner().invoke(main_group, [*words, "--disks", "shared"])
    assert done.exit_code == ExitStatus.USAGE and "--no-nfs" in done.output
    words.remove("--no-nfs")
    assert CliRunner().invoke(main_group, [*words, "--disks", "shared"]).exit_code == 0
    assert (got[-1][1]["nfs"], got[-1][1]["disks"]) == (True, "shared")


def test_another_url_reaches_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, str]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(join, "move_central", lambda _machine, url, *, fingerprint: got.append((url, fingerprint)))
    words = ["worker", "move-central", NEW]
    assert CliRunner().invoke(main_group, words).exit_code == 0
    assert CliRunner().invoke(main_group, [*words, "--fingerprint", "AB" * 32]).exit_code == 0
    assert got == [(NEW, ""), (NEW, "ab" * 32)]
    assert CliRunner().invoke(main_group, [*words, "--fingerprint", "x"]).exit_code == ExitStatus.USAGE
