"""What an image must not carry, and what must not be open."""

from __future__ import annotations

import re

from recvirt.accept.context import TEST_USER
from recvirt.accept.guest import Guest
from recvirt.accept.registry import check
from recvirt.accept.results import Failed


@check("no-passwords", "first")
def no_passwords(guest: Guest) -> str:
    """No account has a password, an empty one included, and root is locked"""
    rows = [line.split(":") for line in guest.out("cat /etc/shadow").splitlines()]
    # "!" and "*" can't be the result of hashing anything (shadow(5)).
    open_accounts = [row[0] for row in rows if not row[1].startswith(("!", "*"))]
    hashed = [row[0] for row in rows if "$" in row[1]]
    in_passwd = guest.out("awk -F: '$2 != \"x\" {print $1}' /etc/passwd").split()
    wrong = sorted({*open_accounts, *hashed, *in_passwd})
    if wrong:
        raise Failed(f"accounts with a password or none needed: {', '.join(wrong)}")
    zero = guest.out("awk -F: '$3 == 0 {print $1}' /etc/passwd").split()
    if zero != ["root"]:
        raise Failed(f"accounts with the user id 0: {', '.join(zero)}")
    return f"{len(rows)} accounts, all locked for passwords"


@check("ssh-refuses-passwords", "first")
def ssh_refuses_passwords(guest: Guest) -> str:
    """sshd offers nothing but public keys, and root may not log in with a password"""
    acceptance = guest.acceptance
    settings = dict(line.split(" ", 1) for line in guest.out("sshd -T").splitlines() if " " in line)
    wrong = [f"{name} {settings.get(name)}" for name, good in _SSHD.items() if settings.get(name, "") not in good]
    if wrong:
        raise Failed(f"sshd: {', '.join(wrong)}")
    options = ["-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password,keyboard-interactive"]
    argv = guest.access.argv("true", shared=False)
    from recvirt.run import run

    said = run([argv[0], *options, *argv[1:]], check=False, timeout_seconds=acceptance.patience(60))
    offered = re.search(r"Permission denied \(([^)]*)\)", said.stderr)
    if said.status == 0 or not offered or offered[1] != "publickey":
        raise Failed(f"a login without a key got: {said.stderr.strip() or 'in'}")
    return "a login without a key is offered: publickey"


_SSHD = {
    "passwordauthentication": ("no",),
    "kbdinteractiveauthentication": ("no",),
    "permitemptypasswords": ("no",),
    "permitrootlogin": ("no", "prohibit-password", "without-password", "forced-commands-only"),
}


@check("host-key-modes", "first")
def host_key_modes(guest: Guest) -> str:
    """SSH host keys exist, belong to root and are readable by nobody else"""
    lines = guest.out("stat -c '%n %U %a' /etc/ssh/ssh_host_*_key").splitlines()
    wrong = [line for line in lines if line.split()[1:] != ["root", "600"]]
    if wrong or not lines:
        raise Failed(f"host keys: {'; '.join(wrong) or 'none'}")
    return f"{len(lines)} keys"


@check("no-authorized-keys", "first")
def no_authorized_keys(guest: Guest) -> str:
    """No key may log in but this run's and those of the profile"""
    acceptance = guest.acceptance
    known = {acceptance.public_key.split()[1]}
    known |= {key.split()[1] for user in acceptance.profile.root.users for key in user.ssh_keys}
    text = guest.out("find / -xdev -type f -name 'authorized_keys*' -exec grep -H . {} + 2>/dev/null || :", seconds=120)
    foreign = []
    for line in text.splitlines():
        path, _, entry = line.partition(":")
        blobs = re.findall(r"\bAAAA[A-Za-z0-9+/=]+", entry)
        foreign += [path for blob in blobs if blob not in known]
    if foreign:
        raise Failed(f"foreign keys in {', '.join(sorted(set(foreign)))}")
    return f"{len(text.splitlines())} lines, all known"


#: Private keys that a machine makes for itself at its first boot.
OWN_KEYS = r"/etc/ssh/ssh_host_\w+_key|/etc/ssl/private/ssl-cert-snakeoil\.key|/etc/recvirt-cloud/tls/key\.pem"
#: The kernel reckons its start from the clock, and is a second out.
_CLOCK_SLACK_SECONDS = 5


@check("no-private-keys", "first")
def no_private_keys(guest: Guest) -> str:
    """No private key lies in the image; those that a machine needs are made at its first boot"""
    booted, *rows = guest.out(
        "sed -n 's/^btime //p' /proc/stat;"
        " { grep -rlZIE --exclude-dir=modules -e '^-----BEGIN ([A-Z]+ )?PRIVATE KEY' -e '^PuTTY-User-Key-File'"
        " /etc /root /home /opt /srv /usr/local /var 2>/dev/null || :; } | xargs -0r stat -c '%Y %n' --",
        seconds=180,
    ).splitlines()
    foreign = []
    for row in rows:
        changed, _, path = row.partition(" ")
        if not re.fullmatch(OWN_KEYS, path):
            foreign.append(path)
        elif int(changed) < int(booted) - _CLOCK_SLACK_SECONDS:
            foreign.append(f"{path} (older than this boot)")
    if foreign:
        raise Failed(f"private keys: {', '.join(foreign)}")
    return f"none but {len(rows)} of this boot"


#: protocol, port: who listens there on other than the loopback, and why that is right.
LISTENERS = {
    ("tcp", 22): "sshd",
    ("udp", 68): "DHCP client",
    ("udp", 546): "DHCPv6 client",
}
#: On libvirt's bridges only: dnsmasq.
BRIDGE_LISTENERS = {("tcp", 53), ("udp", 53), ("udp", 67)}
#: With the Nested Cloud's central node; and on the address of its tunnel, an IPv6 unique local one.
CENTRAL_LISTENERS = {("tcp", 443), ("udp", 51820)}
TUNNEL_LISTENERS = {("tcp", 2049), ("tcp", 5672)}


@check("listening-sockets", "first")
def listening_sockets(guest: Guest) -> str:
    """Nothing listens to the network but sshd, the DHCP client, and what a central node offers"""
    is_central = "recvirt-cloud-central" in guest.acceptance.promises.packages
    unexpected = []
    rows = guest.out("ss -H -l -t -u -n -p").splitlines()
    for row in rows:
        words = row.split()
        protocol, local = words[0], words[4]
        address, _, port = local.rpartition(":")
        if _is_loopback(address):
            continue
        key = (protocol, int(port))
        on_bridge = re.search(r"%virbr\d+$", address) or re.match(r"192\.168\.\d+\.1$", address)
        if key in LISTENERS or (on_bridge and key in BRIDGE_LISTENERS):
            continue
        in_tunnel = address.startswith("[fd") and key in TUNNEL_LISTENERS
        if is_central and (in_tunnel or key in CENTRAL_LISTENERS):
            continue
        unexpected.append(f"{protocol} {local} {words[-1] if 'users:' in words[-1] else ''}".strip())
    if unexpected:
        raise Failed("listening: " + "; ".join(unexpected))
    return f"{len(rows)} sockets, all expected"


def _is_loopback(address: str) -> bool:
    bare = address.split("%")[0].strip("[]")
    return bare.startswith("127.") or bare == "::1" or address.endswith("%lo")


@check("setuid-files-belong-to-packages", "first")
def setuid_files(guest: Guest) -> str:
    """Every setuid or setgid program comes from a package"""
    command = "find / -xdev -type f \\( -perm -4000 -o -perm -2000 \\) -perm /111 -print 2>/dev/null | sort"
    files = guest.out(command, seconds=120).splitlines()
    names = "|".join(sorted({re.escape(path.rsplit("/", 1)[-1]) for path in files}))
    owned = set(guest.out(f"cat /var/lib/dpkg/info/*.list | grep -E '/({names})$' || :").splitlines())
    # Since the merge of /bin into /usr/bin, packages may know a file by its old name.
    strays = [path for path in files if path not in owned and path.removeprefix("/usr") not in owned]
    if strays:
        raise Failed(f"not of a package: {', '.join(strays)}")
    return f"{len(files)} files"


@check("world-writable", "first")
def world_writable(guest: Guest) -> str:
    """Nothing outside the temporary folders can be written by everyone"""
    found = guest.out(
        "find / -xdev \\( -type f -o -type d \\) -perm -0002 ! -perm -1000 2>/dev/null || :",
        seconds=120,
    )
    # The mode of a mount point is that of what is mounted there, say the NFS server's.
    mounted = set(guest.out("findmnt -r -n -o TARGET").splitlines())
    strays = [path for path in found.splitlines() if path not in mounted]
    if strays:
        raise Failed(f"writable by everyone: {', '.join(strays[:10])}")
    return "none"


@check("only-root-and-user-have-sudo", "first")
def only_known_sudo(guest: Guest) -> str:
    """Nobody has sudo but this run's user, the cloud's default user and those of the profile"""
    acceptance = guest.acceptance
    allowed = {TEST_USER, "root", *(user.name for user in acceptance.profile.root.users if user.sudo)}
    default = guest.run(
        "sed -n 's/^ *name: *\"\\?\\([a-z0-9_-]*\\).*/\\1/p' /etc/cloud/cloud.cfg /etc/cloud/cloud.cfg.d/*.cfg"
    )
    allowed |= set(default.stdout.split())
    text = guest.out(
        "cat /etc/sudoers /etc/sudoers.d/* 2>/dev/null | grep -E '^[^#@ ]' | grep -vE '^(Defaults|%sudo)' || :"
    )
    names = {line.split()[0] for line in text.splitlines()}
    members = guest.out("getent group sudo | cut -d: -f4").replace(",", " ").split()
    foreign = sorted((names | set(members)) - allowed)
    if foreign:
        raise Failed(f"sudo for {', '.join(foreign)}")
    return ", ".join(sorted(names)) or "none"
