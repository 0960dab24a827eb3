"""What differs between two images: packages, kernel configuration, sizes of files. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recvirt.disk.packages import Package
from recvirt.imagefile.contents import Contents
from recvirt.imagefile.files import Entry, printable
from recvirt.ui import format_bytes

#: How many files and kernel symbols are shown to a person; --json has all.
_SHOWN_FILES = 20
_SHOWN_SYMBOLS = 60


def package_changes(old: Sequence[Package], new: Sequence[Package]) -> dict[str, Any]:
    """Packages added, removed and changed."""
    before, after = ({(p.name, p.arch): p for p in packages} for packages in (old, new))
    return {
        "added": [after[key].as_json() for key in sorted(after.keys() - before.keys())],
        "removed": [before[key].as_json() for key in sorted(before.keys() - after.keys())],
        "changed": [
            {"name": key[0], "arch": key[1], "old": before[key].version, "new": after[key].version}
            for key in sorted(after.keys() & before.keys())
            if before[key].version != after[key].version
        ],
    }


def config_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[dict[str, str]]:
    """Kernel symbols whose values differ; one that is absent counts as ``n``."""
    return [
        {"symbol": name, "old": old.get(name, "n"), "new": new.get(name, "n")}
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "n") != new.get(name, "n")
    ]


def file_changes(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """Files that came, went or have another size, the largest differences first. ``None`` stands for absent."""
    found = []
    for path in old.keys() | new.keys():
        before, after = old.get(path), new.get(path)
        if any(entry is not None and entry.is_dir for entry in (before, after)):
            continue
        sizes = [entry.size_bytes if entry is not None else None for entry in (before, after)]
        if sizes[0] != sizes[1]:
            found.append({"path": path, "old": sizes[0], "new": sizes[1]})
    return sorted(found, key=lambda item: (-abs((item["new"] or 0) - (item["old"] or 0)), item["path"]))


def _release(contents: Contents) -> str:
    kernels = contents.kernels()
    remembered = contents.remembered_kernel()
    return remembered if remembered in kernels else (kernels[-1] if kernels else "")


def compare(old: Contents, new: Contents) -> dict[str, Any]:
    """Everything that ``recvirt diff --json`` prints."""
    releases = (_release(old), _release(new))
    return {
        "old": str(old.container.path),
        "new": str(new.container.path),
        "bytes": {"old": old.container.path.stat().st_size, "new": new.container.path.stat().st_size},
        "kernel": {"old": releases[0], "new": releases[1]},
        "packages": package_changes(old.packages(), new.packages()),
        "kernel_config": config_changes(old.kernel_config(releases[0]), new.kernel_config(releases[1])),
        "files": file_changes(old.tree(), new.tree()),
    }


def is_equal(found: Mapping[str, Any]) -> bool:
    """Whether nothing differs that is looked at."""
    packages = found["packages"]
    same_kernel = found["kernel"]["old"] == found["kernel"]["new"]
    return same_kernel and not any((*packages.values(), found["kernel_config"], found["files"]))


def as_text(found: Mapping[str, Any]) -> str:
    """The differences for a person."""
    size = found["bytes"]
    lines = [
        f"--- {found['old']}",
        f"+++ {found['new']}",
        f"image    {format_bytes(size['old'])} -> {format_bytes(size['new'])}",
        f"kernel   {found['kernel']['old']} -> {found['kernel']['new']}",
    ]
    packages = found["packages"]
    lines += [f"- {item['name']} {item['version']}" for item in packages["removed"]]
    lines += [f"+ {item['name']} {item['version']}" for item in packages["added"]]
    lines += [f"! {item['name']} {item['old']} -> {item['new']}" for item in packages["changed"]]
    symbols = found["kernel_config"]
    lines += [f"CONFIG_{item['symbol']}: {item['old']} -> {item['new']}" for item in symbols[:_SHOWN_SYMBOLS]]
    if len(symbols) > _SHOWN_SYMBOLS:
        lines.append(f"... and {len(symbols) - _SHOWN_SYMBOLS} more kernel symbols (--json has all)")
    files = found["files"]
    for item in files[:_SHOWN_FILES]:
        sizes = (format_bytes(item[side]) if item[side] is not None else "absent" for side in ("old", "new"))
        lines.append(f"{item['path']}: {' -> '.join(sizes)}")
    if len(files) > _SHOWN_FILES:
        lines.append(f"... and {len(files) - _SHOWN_FILES} more files (--json has all)")
    if is_equal(found):
        lines.append("no difference in packages, kernel configuration and sizes of files")
    return printable("\n".join(lines))
