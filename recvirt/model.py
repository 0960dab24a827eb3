"""The profile's data model: every key a profile may hold, its type, default and meaning.

Pydantic gives strict types, all faults at once and the JSON schema for editors. Merging files and telling where a value
came from is :mod:`recvirt.profile`'s work.
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

#: What a name that ends up in file names, unit names and kernel command lines may look like.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._+-]{0,62}$")]
Symbol = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$")]
HostName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
UserName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Suite = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]
_SIZE = re.compile(r"^(\d+)([KMGT]?)$")


def parse_size(text: str) -> int:
    """``4G`` is 4 GiB in bytes. Prefixes are binary, as in qemu-img(1)."""
    match = _SIZE.match(text)
    if not match:
        raise ValueError("a size is a whole number with K, M, G or T, as 4G")
    return int(match[1]) << (10 * " KMGT".index(match[2] or " "))


def _check_size(text: str) -> str:
    parse_size(text)
    return text


def _one_line(text: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("control characters and line breaks are not allowed here")
    return text


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_PUBLIC_KEY = re.compile(
    r"(?:\S.*\s)?(?P<type>ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)|sk-(?:ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r"\s+(?P<blob>[A-Za-z0-9+/]+={0,2})(?:\s.*)?"
)


def is_ssh_key(line: str) -> bool:
    """Whether ``line`` is one entry of an authorized_keys file (sshd(8)): options, a type, a blob of that type."""
    match = _PUBLIC_KEY.fullmatch(line.strip())
    if not match:
        return False
    try:
        blob = base64.b64decode(match["blob"], validate=True)
    except binascii.Error:
        return False
    # RFC 4253: the blob starts with the type's name, preceded by its length.
    name = match["type"].encode()
    return blob[: 4 + len(name)] == len(name).to_bytes(4, "big") + name and len(blob) > 4 + len(name)


def _check_ssh_key(text: str) -> str:
    if "PRIVATE KEY" in text:
        raise ValueError("this is a private key: an image gets the public one (the .pub file's line)")
    if not is_ssh_key(text):
        raise ValueError("is not a public SSH key, as in a .pub file: ssh-ed25519 AAAA... comment")
    return text


#: Enough for every documented kernel parameter, nothing that GRUB's or a shell's parser would act on.
_KERNEL_WORD = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.,:=/@%+*!~^-]*$")
#: The image stage writes these itself.
_OWN_KERNEL_WORDS = ("root", "rootfstype", "BOOT_IMAGE", "recvirt.trial")


def _check_kernel_words(text: str) -> str:
    for word in text.split():
        if not _KERNEL_WORD.match(word):
            raise ValueError(f"{word!r} can't stand on a kernel command line here (no quotes or blanks within a word)")
        if word.split("=", 1)[0] in _OWN_KERNEL_WORDS:
            raise ValueError(f"{word!r}: the image sets this word itself")
    return text


def _check_url(text: str) -> str:
    if not re.match(r"^(https?|file|copy)://?[^\s\"'<>\\]+$", text):
        raise ValueError("must be a URL (http://, https://, file:/) without blanks or quotes")
    if "@" in urllib.parse.urlsplit(text).netloc:
        raise ValueError("must not hold a user name or password: they would end up in the image and in its records")
    return text


Size = Annotated[str, AfterValidator(_check_size)]
Url = Annotated[str, AfterValidator(_check_url)]
KernelWords = Annotated[str, AfterValidator(_one_line), AfterValidator(_check_kernel_words)]
SshKey = Annotated[str, AfterValidator(_one_line), AfterValidator(_check_ssh_key)]
#: Text that a person may also write as a whole number.
Scalar = Annotated[
    str,
    BeforeValidator(_number_as_text),
    AfterValidator(_one_line),
    Field(json_schema_extra={"type": ["string", "integer"]}),
]
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
UnitName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9:_.@\\-]+\.(service|socket|timer|path|mount|automount|swap|target|slice)$"),
]
SysctlKey = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][A-Za-z0-9_./*-]*$")]
# The loader makes these absolute (relative ones are relative to the profile's file) and checks that they exist.
FilePath = Annotated[str, AfterValidator(_one_line), Field(json_schema_extra={"format": "recvirt-file"})]
FolderPath = Annotated[str, AfterValidator(_one_line), Field(json_schema_extra={"format": "recvirt-folder"})]
#: A shipped name or, with a slash in it, the path of a fragment or list of one's own (see ``data.fragment_path``).
FragmentRef = Annotated[str, AfterValidator(_one_line), Field(json_schema_extra={"format": "recvirt-fragment"})]
PackageListRef = Annotated[str, AfterValidator(_one_line), Field(json_schema_extra={"format": "recvirt-package-list"})]


class Model(BaseModel):
    """Strict base: unknown keys are faults, values are not coerced, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_VERSION = r"^[0-9]+(\.[0-9]+){1,2}$"


class Allowance(Model):
    """A requested symbol that may differ in the final configuration, with the reason. An unused one is a fault."""

    symbol: Symbol = Field(description="the symbol's name, without CONFIG_")
    reason: str = Field(min_length=8, description="why the difference is right")
    since: str | None = Field(default=None, pattern=_VERSION, description="first version that it holds for")
    until: str | None = Field(default=None, pattern=_VERSION, description="first version that it no longer holds for")


class KernelPackage(Model):
    """A ``linux-source-*`` package of a suite, verified through apt."""

    suite: Suite = Field(default="trixie", description="the suite, as `trixie` or `trixie-backports`")
    package: str = Field(
        default="linux-source-6.12", pattern=r"^linux-source-[0-9][0-9a-z.+-]*$", description="the package's name"
    )


class KernelTarball(Model):
    """A release tarball by URL. The digest is required; a detached signature over the uncompressed tar is optional."""

    url: Url = Field(description="where the tarball is")
    sha256: Sha256 = Field(description="its digest")
    signature_url: Url | None = Field(default=None, description="a detached OpenPGP signature of the uncompressed tar")
    keyring: FilePath | None = Field(default=None, description="the keys that may sign it; needed with signature_url")


class Kernel(Model):
    """The kernel: our own from one of three sources, or Debian's stock cloud kernel (``kernel: debian``)."""

    source: Literal["package", "tarball", "tree", "debian"] = Field(
        default="package", description="where the kernel comes from; `kernel: debian` is short for `debian`"
    )
    package: KernelPackage = Field(default=KernelPackage(), description="for `source: package`")
    tarball: KernelTarball | None = Field(default=None, description="for `source: tarball`")
    tree: FolderPath | None = Field(default=None, description="for `source: tree`: a local source tree or git checkout")
    patches: tuple[FilePath, ...] = Field(default=(), description="patch files applied in order (-p1)")
    debian_package: str = Field(
        default="linux-image-cloud-amd64", pattern=r"^linux-image-[a-z0-9.+-]+$",
        description="for `source: debian`: the package to install",
    )  # fmt: skip
    localversion: str = Field(
        default="-recvirt", pattern=r"^-[a-z0-9-]{1,20}$",
        description="in the kernel's release, before a digest that tells configurations apart",
    )  # fmt: skip
    fragments: tuple[FragmentRef, ...] = Field(
        default=(), description="fragments in merge order: names in kernel-configs/, or paths (with a slash)"
    )
    overrides: dict[Symbol, Scalar] = Field(
        default_factory=dict, description="`SYMBOL: value` that wins over the fragments, declared on purpose"
    )
    allow: tuple[Allowance, ...] = Field(default=(), description="symbols that may come out otherwise than asked for")
    cmdline: tuple[KernelWords, ...] = Field(default=(), description="words for the kernel command line")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"source": "debian"} if value == "debian" else value


class User(Model):
    """A login. There are no passwords: keys come from here, or from the cloud through cloud-init."""

    name: UserName = Field(description="the login's name; the first user is also cloud-init's default user")
    groups: tuple[UserName, ...] = Field(default=(), description="groups besides its own, as `libvirt` or `kvm`")
    ssh_keys: tuple[SshKey, ...] = Field(default=(), description="public keys that may log in")
    sudo: bool = Field(default=False, description="may become root, without a password")
    shell: str = Field(default="/bin/bash", pattern=r"^/[A-Za-z0-9/._-]+$", description="the login shell")


class Hook(Model):
    """A script of the profile: ``host`` runs in the sandbox with the tree's path in $1, ``chroot`` in the tree."""

    where: Literal["host", "chroot"] = Field(
        description="`host`: in the sandbox, with the tree's path in $1; `chroot`: in the tree"
    )
    path: FilePath = Field(description="the script")


class Mount(Model):
    """One NFS mount. ``source`` is ``server:/path`` (or empty: the folder stays local until user data sets it)."""

    source: str = Field(
        default="", pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):/[A-Za-z0-9/._+-]*$",
        description="`server:/path`; empty: a local folder until user data names one",
    )  # fmt: skip
    options: str = Field(
        default="vers=4.2,soft,timeo=100,retrans=3", pattern=r"^[A-Za-z0-9=,._:-]*$",
        description="mount options, as in nfs(5)",
    )  # fmt: skip


class Nfs(Model):
    """The two mounts of the Nested Cloud: application disk images and block images."""

    images: Mount = Field(default=Mount(), description="/var/lib/recvirt/images: application disk images")
    blocks: Mount = Field(default=Mount(), description="/var/lib/recvirt/blocks: block images")


class CloudInit(Model):
    """cloud-init: which datasources it may try, in order."""

    enabled: bool = Field(default=True, description="whether cloud-init runs (when its package is installed)")
    datasources: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], ...] = Field(
        default=("NoCloud", "ConfigDrive", "Ec2", "GCE", "Azure", "OpenStack", "VMware", "None"),
        description="datasources it may try, in order",
    )


class Root(Model):
    """The Debian tree inside the image."""

    suite: Literal["trixie", "bookworm", "sid"] = Field(default="trixie", description="the Debian release")
    mirror: Url | None = Field(default=None, description="archive URL; unset: the bootstrapper's own default")
    components: tuple[Name, ...] = Field(default=("main",), description="components of the archive")
    snapshot: str | None = Field(
        default=None, pattern=r"^\d{8}T\d{6}Z$", description="a snapshot archive's timestamp, as 20261120T000000Z"
    )
    snapshot_mirror: Url | None = Field(default=None, description="base URL of the snapshot archive")
    keyring: FilePath | None = Field(default=None, description="keyring that signs the mirror; unset: Debian's own")
    bootstrapper: Literal["mmdebstrap", "debootstrap"] = Field(
        default="mmdebstrap", description="what installs the packages; debootstrap is the fallback"
    )
    package_lists: tuple[PackageListRef, ...] = Field(
        default=(), description="lists of packages: names in package-lists/, or paths (with a slash)"
    )
    packages: tuple[PackageName, ...] = Field(default=(), description="packages besides those of the lists")
    hostname: HostName = Field(default="recvirt", description="the host name until a cloud sets one")
    locale: str = Field(
        default="C.UTF-8", pattern=r"^(C|POSIX|[a-z]{2,3}(_[A-Z]{2})?)(\.[A-Za-z0-9-]+)?(@[a-z]+)?$",
        description="the system's locale",
    )  # fmt: skip
    timezone: str = Field(
        default="Etc/UTC", pattern=r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*$", description="the time zone"
    )
    users: tuple[User, ...] = Field(default=(), description="logins; none: cloud-init makes its default user")
    overlays: tuple[FolderPath, ...] = Field(default=(), description="folders copied over the tree, in order")
    hooks: tuple[Hook, ...] = Field(default=(), description="scripts that run after the packages and overlays")
    cloud_init: CloudInit = Field(default=CloudInit(), description="cloud-init")
    nfs: Nfs | None = Field(default=None, description="the two NFS mounts; unset: none")
    nested: bool = Field(default=True, description="load KVM with nesting on (kvm_intel.nested, kvm_amd.nested)")
    modules: tuple[Name, ...] = Field(default=(), description="kernel modules loaded at boot")
    sysctl: dict[SysctlKey, Scalar] = Field(default_factory=dict, description="kernel parameters, as in sysctl.d(5)")
    services: tuple[UnitName, ...] = Field(default=(), description="units enabled besides the packages' own presets")
    masked: tuple[UnitName, ...] = Field(default=(), description="units that never run")
    journal_max: Size = Field(default="64M", description="what the journal may take on the disk")
    unattended_upgrades: bool = Field(default=False, description="install security updates every day")
    console_autologin: UserName | None = Field(
        default=None, description="log this user in on the serial console; whoever owns the console owns the VM"
    )


class Image(Model):
    """The disk image."""

    size: Size = Field(default="4G", description="size of the virtual disk; the root grows on a larger one")
    filesystem: Literal["ext4", "xfs", "btrfs"] = Field(default="ext4", description="the root's file system")
    esp_size: Size = Field(default="64M", description="size of the EFI system partition")
    initramfs: Literal["none", "small"] = Field(
        default="none", description="`none`: the kernel mounts the root itself; `small`: drivers come in an initramfs"
    )
    formats: tuple[Literal["qcow2", "raw", "vhd", "vmdk", "ova"], ...] = Field(
        default=("qcow2",), description="files to write: qcow2 (zstd), raw, fixed VHD, streamOptimized VMDK, OVA"
    )
    boot_timeout: int = Field(default=1, ge=0, le=60, description="seconds the boot menu waits")
    guest_image: bool = Field(
        default=False, description="put a tiny guest's image into it, for the Nested Cloud's first launch"
    )


class Accept(Model):
    """How the image is proved."""

    memory: Size = Field(default="2G", description="memory of the test guest")
    cpus: int = Field(default=2, ge=1, le=64, description="virtual CPUs of the test guest")
    boot_seconds: int = Field(default=300, ge=10, description="give up on a boot after so long (scaled up under TCG)")
    unit_failures_allowed: tuple[str, ...] = Field(default=(), description="units that may have failed after a boot")


class Profile(Model):
    """A whole profile, after merging."""

    name: Name = Field(description="the profile's name; unset: its file's name")
    description: str = Field(default="", description="one line for `recvirt profiles`")
    kernel: Kernel = Field(default=Kernel(), description="the kernel")
    root: Root = Field(default=Root(), description="the Debian tree")
    image: Image = Field(default=Image(), description="the disk")
    accept: Accept = Field(default=Accept(), description="the proof")
