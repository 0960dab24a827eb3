"""The tunnel's addresses, keys and parameters, and the list that root does not trust."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest

from recvirt.nestedcloud import credentials, peers, tunnel
from recvirt.nestedcloud.provision import RABBITMQCTL, Machine, ProvisionError, password_hash, toml
from recvirt.nestedcloud.tunnel import TunnelError

CLOUD = uuid.UUID("00000000-0000-4000-8000-000000000001")
ONE, TWO, OWN = (f"{digit * 8}-1111-4111-8111-111111111111" for digit in "123")


def key_of(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Programs:
    """Stands in for ip, wg and the broker's tools."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.keys = 0
        self.interface = False
        self.has_kernel = True
        self.has_go = True
        self.synced = ""
        self.accounts: dict[str, str] = {}
        self.fails = ""

    def __call__(self, argv: Sequence[str], text: str, user: str | None) -> str:
        self.calls.append(tuple(argv))
        words = " ".join(argv)
        if self.fails and self.fails in words:
            raise ProvisionError(f"{argv[0]}: broken", 1)
        if words == "wg genkey":
            self.keys += 1
            return f"private-{self.keys}\n"
        if words == "wg pubkey":
            return key_of(text.strip()) + "\n"
        if words.startswith("ip link show"):
            if not self.interface:
                raise ProvisionError("does not exist", 1)
        elif words.startswith("ip link add"):
            if not self.has_kernel:
                raise ProvisionError("Unknown device type", 2)
            self.interface = True
        elif argv[0] == "wireguard-go":
            if not self.has_go:
                raise ProvisionError("wireguard-go is not installed")
            self.interface = True
        elif words.startswith("wg syncconf"):
            assert stat.S_IMODE(Path(argv[3]).stat().st_mode) == 0o600
            self.synced = Path(argv[3]).read_text()
        elif tuple(argv[: len(RABBITMQCTL)]) == RABBITMQCTL:
            self._broker(argv[len(RABBITMQCTL) :])
        return ""

    def _broker(self, argv: Sequence[str]) -> None:
        if argv[0] == "import_definitions":
            self.accounts |= {
                item["name"]: item["password_hash"] for item in json.loads(Path(argv[1]).read_text())["users"]
            }
        elif argv[0] == "delete_user" and self.accounts.pop(argv[1], None) is None:
            raise ProvisionError("no such user", 67)
        elif argv[0] == "delete_queue":
            raise ProvisionError("no such queue", 70)

    def named(self, *words: str) -> list[tuple[str, ...]]:
        return [argv for argv in self.calls if all(word in argv for word in words)]


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def machine(tmp_path: Path, programs: Programs) -> Machine:
    for name in ("run", "etc/recvirt-cloud", "var/lib/recvirt-cloud"):
        (tmp_path / name).mkdir(parents=True)
    owner = (os.geteuid(), os.getegid())
    made = Machine(tmp_path, programs, lambda _user: owner, lambda _text: None, lambda _url: True)
    made.central.write_text(toml({"cloud": str(CLOUD)}))
    made.worker.write_text(toml({"uuid": OWN}))
    return made


def test_addresses_are_made_of_the_clouds_uuid() -> None:
    network = tunnel.prefix(CLOUD)
    digest = hashlib.sha256(CLOUD.bytes).hexdigest()[:10]
    assert network.prefixlen == 64 and network.network_address.exploded.replace(":", "")[:12] == f"fd{digest}"
    assert network.network_address.exploded.split(":")[3] == "0000"
    assert tunnel.central_address(CLOUD) == network[1] and tunnel.peer_address(CLOUD, 2) == network[2]
    assert tunnel.peer_address(CLOUD, tunnel.INDEX_MAX) in network
    assert tunnel.prefix(uuid.uuid4()) != network and network.is_private
    for index in (0, 1, -1, tunnel.INDEX_MAX + 1):
        with pytest.raises(ValueError, match="index"):
            tunnel.peer_address(CLOUD, index)


@pytest.mark.parametrize(
    "text",
    ["", "x" * 44, key_of("a")[:-1], key_of("a") + "\n", key_of("a").replace("=", ""), "ä" * 44,
     base64.b64encode(bytes(32)).decode(), base64.b64encode(b"a" * 33).decode()],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    assert tunnel.is_key(key_of("a")) and not tunnel.is_key(text)


def test_the_central_nodes_end(machine: Machine, programs: Programs) -> None:
    tunnel.ensure_central(machine, CLOUD)
    files = {path: path.read_bytes() for path in tunnel.folder(machine).iterdir()}
    tunnel.ensure_central(machine, CLOUD)
    assert {path: path.read_bytes() for path in tunnel.folder(machine).iterdir()} == files
    assert programs.keys == 1
    public = json.loads(tunnel.public_path(machine).read_text())
    assert public == {"public_key": key_of("private-1"), "address": str(tunnel.central_address(CLOUD)), "port": 51820}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes == {"key": 0o600, "public.json": 0o644, "tunnel.json": 0o600}
    tunnel.up(machine)
    tunnel.up(machine)
    assert len(programs.named("add", "wireguard")) == 1
    assert "PrivateKey = private-1" in programs.synced and "[Peer]" not in programs.synced
    assert programs.named("address", f"{tunnel.central_address(CLOUD)}/64", "nodad")
    assert not [argv for argv in programs.calls if any("private" in word for word in argv)]
    assert not list((machine.root / "run").iterdir())


def test_without_wireguard_in_the_kernel(machine: Machine, programs: Programs) -> None:
    tunnel.ensure_central(machine, CLOUD)
    programs.has_kernel = False
    tunnel.up(machine)
    assert programs.named("wireguard-go", tunnel.INTERFACE)
    programs.interface = programs.has_go = False
    with pytest.raises(TunnelError) as caught:
        tunnel.up(machine)
    assert "Unknown device type" in str(caught.value) and "wireguard-go" in caught.value.hint
    # The way past the tunnel is closed all the same.
    assert programs.named("unreachable", str(tunnel.prefix(CLOUD)))


def test_without_parameters_there_is_no_tunnel(machine: Machine) -> None:
    with pytest.raises(TunnelError, match="no tunnel") as caught:
        tunnel.up(machine)
    assert "worker join" in caught.value.hint
    assert tunnel.status(machine)["role"] is None
    tunnel.keep_key(machine, "k")
    (tunnel.folder(machine) / "tunnel.json").write_text("{}")
    with pytest.raises(TunnelError, match="damaged"):
        tunnel.up(machine)


@pytest.mark.parametrize(("address", "line"), [("192.0.2.1", "Endpoint = 192.0.2.1:51820"),
                                               ("2001:db8::1", "Endpoint = [2001:db8::1]:51820")])  # fmt: skip
def test_a_workers_end(machine: Machine, programs: Programs, address: str, line: str) -> None:
    tunnel.ensure_key(machine)
    central = tunnel.Peer(key_of("central"), tunnel.central_address(CLOUD), ("cloud.example.org", 51820))
    assert tunnel.keep_worker(machine, CLOUD, tunnel.peer_address(CLOUD, 7), central)
    assert not tunnel.keep_worker(machine, CLOUD, tunnel.peer_address(CLOUD, 7), central)
    tunnel.up(machine, lambda _host, _port: address)
    assert line in programs.synced and f"AllowedIPs = {tunnel.central_address(CLOUD)}/128" in programs.synced
    assert "PersistentKeepalive" in programs.synced

    def away(_host: str, _port: int) -> str:
        raise OSError("no resolver")

    # At a boot without a network: the peer is there, and the next refresh tells where.
    tunnel.up(machine, away)
    assert "Endpoint" not in programs.synced and key_of("central") in programs.synced


# --- the list for root


def account(worker: str = ONE, **changes: Any) -> dict[str, Any]:
    index = {ONE: 2, TWO: 3}.get(worker, 4)
    return {
        "uuid": worker, "public_key": key_of(worker), "address": str(tunnel.peer_address(CLOUD, index)),
        "password_hash": HASHES[worker], **changes,
    }  # fmt: skip


HASHES = {worker: password_hash(worker) for worker in (ONE, TWO, OWN)}


def want(machine: Machine, *accounts: dict[str, Any], revoked: Sequence[str] = (), **changes: Any) -> Path:
    path = machine.state / "peers.json"
    document = {"version": 1, "cloud": str(CLOUD), "peers": list(accounts), "revoked": list(revoked), **changes}
    path.write_text(json.dumps(document))
    path.chmod(0o640)
    return path


def test_who_has_joined_is_let_in_and_who_was_revoked_is_not(machine: Machine, programs: Programs) -> None:
    tunnel.ensure_central(machine, CLOUD)
    assert not peers.apply(machine)
    want(machine, account(ONE), account(TWO))
    assert peers.apply(machine)
    assert programs.accounts == {ONE: HASHES[ONE], TWO: HASHES[TWO]}
    assert programs.synced.count("[Peer]") == 2 and f"AllowedIPs = {account(TWO)['address']}/128" in programs.synced
    assert tunnel.applied_peers(machine)[1] == tunnel.Peer(key_of(TWO), IPv6Address(account(TWO)["address"]))
    applied = machine.root / tunnel.APPLIED
    assert stat.S_IMODE(applied.stat().st_mode) == 0o600 and stat.S_IMODE(applied.parent.stat().st_mode) == 0o700
    programs.calls.clear()
    assert not peers.apply(machine)
    # An unchanged list costs nothing.
    assert programs.calls == []
    # A new key alone is no matter of the broker's.
    want(machine, account(ONE, public_key=key_of("new")), account(TWO))
    assert peers.apply(machine) and not programs.named("import_definitions") and key_of("new") in programs.synced
    assert not tunnel.shut_out_path(machine).exists()
    want(machine, account(TWO), revoked=[ONE])
    assert peers.apply(machine)
    assert set(programs.accounts) == {TWO} and programs.synced.count("[Peer]") == 1
    # The API may hear of it, and has nothing else to read there.
    told = tunnel.shut_out_path(machine)
    assert json.loads(told.read_text()) == [ONE] and stat.S_IMODE(told.stat().st_mode) == 0o644
    told.unlink()
    assert not peers.apply(machine) and json.loads(told.read_text()) == [ONE]
    # A list that does not know of it any more, or has it back: out is out.
    for accounts in ((account(TWO),), (account(TWO), account(ONE))):
        want(machine, *accounts)
        peers.apply(machine)
        assert set(programs.accounts) == {TWO} and programs.synced.count("[Peer]") == 1
    want(machine)
    assert peers.apply(machine) and programs.accounts == {}
    assert not [argv for argv in programs.calls for word in argv if HASHES[TWO] in word]
    assert not list((machine.root / "run").iterdir())


@pytest.mark.parametrize("step", ["wg syncconf", "import_definitions", "delete_user"])
def test_a_run_that_was_cut_short_is_finished_by_the_next(machine: Machine, programs: Programs, step: str) -> None:
    tunnel.ensure_central(machine, CLOUD)
    want(machine, account(ONE))
    peers.apply(machine)
    want(machine, account(TWO), revoked=[ONE])
    programs.fails = step
    with pytest.raises(ProvisionError):
        peers.apply(machine)
    if step == "wg syncconf":
        # A tunnel that is broken keeps nobody in at the broker.
        assert set(programs.accounts) == {TWO}
    # As long as it may have a way in, nobody is told that it has none.
    assert not tunnel.shut_out_path(machine).exists()
    programs.fails = ""
    assert peers.apply(machine) and not peers.apply(machine)
    assert set(programs.accounts) == {TWO} and key_of(TWO) in programs.synced and key_of(ONE) not in programs.synced


def test_what_was_applied_and_can_not_be_read_is_applied_again(machine: Machine, programs: Programs) -> None:
    tunnel.ensure_central(machine, CLOUD)
    want(machine, account(ONE))
    peers.apply(machine)
    for text in ("", "[]", "{}", '{"peers": [1], "revoked": [], "accounts_made": 0}'):
        (machine.root / tunnel.APPLIED).write_text(text)
        assert tunnel.applied_peers(machine) == []
        assert peers.apply(machine)


@pytest.mark.parametrize(
    "accounts",
    [[account(uuid="../etc")], [account(uuid=str(uuid.uuid4()).upper())], [account(uuid="central")], [account(OWN)],
     [account(public_key="x")], [account(public_key=key_of("a") + "\nAllowedIPs = ::/0")],
     [account(address=str(tunnel.central_address(CLOUD)))], [account(address="::/0")], [account(address="fd00::2")],
     [account(address=account(ONE)["address"] + "/64")], [account(address=account(ONE)["address"].upper())],
     [account(address=str(tunnel.prefix(CLOUD)[0]))], [account(address=account(ONE)["address"] + "%eth0")],
        [account(address=account(ONE)["address"] + "%\nAllowedIPs = ::/0")],
     [account(password_hash="")], [account(password_hash="secret")], [account(password_hash=key_of("a"))],
     [{**account(), "tags": ["administrator"]}], [{"uuid": ONE}], ["x"], [account(uuid=1)], [account(address=None)],
     [account(ONE), account(TWO, public_key=key_of(ONE))],
     [account(ONE), account(TWO, address=account(ONE)["address"])],
     [account(ONE), account(ONE, public_key=key_of("b"), address=account(TWO)["address"])]],
)  # fmt: skip
def test_a_list_with_something_wrong_in_it_is_not_applied_at_all(
    machine: Machine, programs: Programs, accounts: list[Any]
) -> None:
    tunnel.ensure_central(machine, CLOUD)
    want(machine, *accounts)
    programs.calls.clear()
    with pytest.raises(peers.UntrustedError):
        peers.apply(machine)
    assert programs.calls == []


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"cloud": str(uuid.uuid4())}, {"peers": {}}, {"revoked": "x"}, {"revoked": [OWN]},
     {"revoked": ["central"]}, {"revoked": [ONE, ONE]}, {"more": 1}],
)  # fmt: skip
def test_a_list_of_another_kind_is_not_applied(machine: Machine, changes: dict[str, Any]) -> None:
    tunnel.ensure_central(machine, CLOUD)
    want(machine, **changes)
    with pytest.raises(peers.UntrustedError):
        peers.apply(machine)


def test_a_file_that_is_none_is_not_read(machine: Machine) -> None:
    tunnel.ensure_central(machine, CLOUD)
    path = want(machine, account(ONE))
    path.chmod(0o662)
    with pytest.raises(peers.UntrustedError, match="others"):
        peers.apply(machine)
    path.chmod(0o640)
    os.link(path, path.with_name("second"))
    with pytest.raises(peers.UntrustedError, match="plain"):
        peers.apply(machine)
    path.unlink()
    path.symlink_to(path.with_name("second"))
    with pytest.raises(peers.UntrustedError):
        peers.apply(machine)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(peers.UntrustedError):
        peers.apply(machine)
    path.unlink()
    path.write_bytes(b" " * (4 * 1024**2 + 1))
    with pytest.raises(peers.UntrustedError, match="larger"):
        peers.apply(machine)


def test_the_certificate_and_the_key_are_not_changed_at_once(machine: Machine, programs: Programs) -> None:
    tunnel.ensure_central(machine, CLOUD)
    folder = machine.etc / "tls"
    folder.mkdir()

    def run(argv: Sequence[str], text: str, user: str | None) -> str:
        if argv[0] != "openssl":
            return programs(argv, text, user)
        if "-issuer" in argv:
            return (folder / "issuer").read_text()
        for option in ("-keyout", "-out"):
            Path(argv[argv.index(option) + 1]).write_text(f"new {option}")
        return ""

    changed = Machine(machine.root, run, machine.owner_of, machine.tell)
    for name, text in (("cert.pem", "old"), ("key.pem", "old"), ("issuer", "issuer=CN = recvirt-cloud")):
        (folder / name).write_text(text)
    # Without workers there is nobody to wait for.
    peers.rotate_certificate(changed)
    assert (folder / "cert.pem").read_text() == "new -out" and (folder / "key.pem").read_text() == "new -keyout"
    want(machine, account(ONE))
    peers.apply(machine)
    with pytest.raises(TunnelError, match=r"cert\.pem was changed"):
        peers.rotate_tunnel(changed)
    peers.rotate_tunnel(changed, force=True)
    assert json.loads(tunnel.public_path(machine).read_text())["public_key"] == key_of("private-2")
    assert "private-2" in programs.synced and key_of(ONE) in programs.synced
    (folder / "issuer").write_text("issuer=C = XX, O = Somebody")
    with pytest.raises(TunnelError, match="not one that the set-up made"):
        peers.rotate_certificate(changed, force=True)


# --- what is shown, and what is kept of it


def test_an_invitation_as_text() -> None:
    token = credentials.new_token("ab" * 32)
    assert credentials.parse_token(f" {token}\n") == token and token.secret not in repr(token)
    assert credentials.parse_token("rvj_" + "x" * 43) == credentials.Token("x" * 43)
    for text in ("", "rvj_", "rvc_" + "x" * 43, "rvj_" + "x" * 43 + ".zz", "rvj_x y" + "x" * 43, "rvj_" + "x" * 999):
        with pytest.raises(ValueError, match=r"invitation|SHA-256") as caught:
            credentials.parse_token(text)
        assert "x" * 20 not in str(caught.value)


def test_a_fingerprint_in_the_ways_that_it_is_written() -> None:
    plain = "ab" * 32
    colons = ":".join(["AB"] * 32)
    for text in (plain, colons, f"sha256 Fingerprint={colons}", f" {plain}\n"):
        assert credentials.parse_fingerprint(text) == plain


def test_a_password_and_its_hash() -> None:
    kept = password_hash("secret")
    assert credentials.is_password_hash(kept) and credentials.opens("secret", kept)
    for password, text in (("Secret", kept), ("", kept), ("secret", ""), ("", ""), ("secret", "x"), (kept, kept)):
        assert not credentials.opens(password, text)
