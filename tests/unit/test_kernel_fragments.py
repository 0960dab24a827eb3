"""The shipped fragments: what must never be missing from them, whatever else changes."""

from __future__ import annotations

import pytest

from recvirt.data import data_path, fragment_path, shipped_names
from recvirt.kconfig.fragment import Fragment, load_fragments
from recvirt.kconfig.merge import Merged, merge
from recvirt.profile import load_profile

PROFILES = ("minimal", "default", "debug", "bench", "kernel-7")
VERSIONS = ((6, 12, 117), (7, 3, 4))
#: CPU vulnerabilities by Kconfig's names: allnoconfig turns each off that is not asked for.
MITIGATIONS = (
    "CALL_DEPTH_TRACKING GDS IBPB_ENTRY IBRS_ENTRY ITS L1TF MDS MMIO_STALE_DATA PAGE_TABLE_ISOLATION RETBLEED RETHUNK "
    "RETPOLINE RFDS SLS SPECTRE_BHI SPECTRE_V1 SPECTRE_V2 SRBDS SRSO SSB TAA TSA UNRET_ENTRY VMSCAPE"
).split()
#: Drivers without which some cloud or machine has no root disk: no initramfs loads them.
ROOT_DISK = (
    "VIRTIO_BLK SCSI_VIRTIO BLK_DEV_SD BLK_DEV_NVME SATA_AHCI ATA_PIIX VMWARE_PVSCSI FUSION_SPI XEN_BLKDEV_FRONTEND "
    "HYPERV_STORAGE EXT4_FS VIRTIO_PCI EFI_PARTITION DEVTMPFS DEVTMPFS_MOUNT"
).split()
NESTED = {"KVM": "m", "KVM_INTEL": "m", "KVM_AMD": "m", "TUN": "m", "VHOST_NET": "m", "HYPERV": "y", "CGROUP_BPF": "y"}


def fragments_of(profile: str) -> tuple[Fragment, ...]:
    names = load_profile(profile).model.kernel.fragments
    return load_fragments((name, fragment_path(name)) for name in names)


def wanted(profile: str, version: tuple[int, ...]) -> Merged:
    kernel = load_profile(profile).model.kernel
    return merge(fragments_of(profile), kernel.overrides, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_merges_and_keeps_what_it_must(profile: str, version: tuple[int, ...]) -> None:
    values = {name: item.value for name, item in wanted(profile, version).wanted.items()}
    assert len(MITIGATIONS) == 24
    missing = [name for name in MITIGATIONS if values.get(f"MITIGATION_{name}") != "y"]
    assert not missing and values["CPU_MITIGATIONS"] == "y"
    assert [name for name in ROOT_DISK if values.get(name) != "y"] == []
    assert {name: values.get(name) for name in NESTED} == NESTED


def test_all_shipped_fragments_are_well_formed_and_used() -> None:
    shipped = shipped_names("kernel-configs")
    load_fragments((name, fragment_path(name)) for name in shipped)
    used = {name for profile in PROFILES for name in load_profile(profile).model.kernel.fragments}
    # These two belong to images with another root file system.
    assert set(shipped) - used == {"61-root-xfs", "62-root-btrfs"}
    assert {path.suffix for path in data_path("kernel-configs").iterdir()} == {".config"}


@pytest.mark.parametrize("name", ["61-root-xfs", "62-root-btrfs"])
def test_other_root_file_systems_join_without_a_conflict(name: str) -> None:
    extra = load_fragments([(name, fragment_path(name))])
    values = merge([*fragments_of("default"), *extra], {}, VERSIONS[0]).wanted
    symbol = "XFS_FS" if "xfs" in name else "BTRFS_FS"
    assert values[symbol].value == "y" and values["EXT4_FS"].value == "y"


def test_debugfs_is_for_debug_and_bench_only() -> None:
    found = {profile: wanted(profile, VERSIONS[0]).wanted["DEBUG_FS"].value for profile in PROFILES}
    assert found == {"minimal": "n", "default": "n", "kernel-7": "n", "debug": "y", "bench": "y"}
    assert wanted("debug", VERSIONS[0]).wanted["DEBUG_INFO_BTF"].value == "y"


def test_profiles_that_need_not_differ_share_one_kernel() -> None:
    kernels = [load_profile(name).model.kernel for name in ("minimal", "default")]
    assert kernels[0] == kernels[1]
