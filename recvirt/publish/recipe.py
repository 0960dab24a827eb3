"""How to start the image with nested virtualization on: a folder beside the receipt, from the provider's templates.

``launch.sh`` (the command line), ``launch.json`` (the API's body), ``main.tf`` (OpenTofu and Terraform), whatever else
a provider has (``domain.xml``, ``vm.yaml``), and ``README.md`` with the instance types that can and what to check
inside. Every value goes through a filter that quotes for its language: ``sh``, ``json``, ``hcl``, ``xml``, ``ps``.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import jinja2

from recvirt.data import data_path
from recvirt.publish.provider import AnyProvider, Published
from recvirt.store import remove_tree

#: Templates that every provider shares.
_COMMON = "README.md.j2"


def hcl(value: Any) -> str:
    """A literal of HCL: JSON's form, with the two marks that begin a template escaped (HCL's native syntax)."""
    return json.dumps(str(value)).replace("${", "$${").replace("%{", "%%{")


def powershell(value: Any) -> str:
    """A literal of PowerShell: nothing is expanded between single quotes."""
    return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", str(value)) + "'"


def environment(folder: Path) -> jinja2.Environment:
    """Templates of one provider. A value that is not there is an error, not a blank."""
    # Not HTML: each value names the language that it is quoted for.
    env = jinja2.Environment(  # noqa: S701
        loader=jinja2.FileSystemLoader([folder, folder.parent]), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    env.filters.update(
        sh=lambda value: shlex.quote(str(value)), json=json.dumps, hcl=hcl, ps=powershell,
        xml=lambda value: quoteattr(str(value)),
    )  # fmt: skip
    return env


def render(provider: AnyProvider, published: Published) -> dict[str, str]:
    """The recipe's files by name."""
    folder = data_path("templates", "launch").joinpath(provider.name)
    env = environment(folder)
    image = provider.job.image
    values = {
        "name": image.name, "profile": image.profile, "kernel": image.kernel, "sha256": image.sha256,
        "short": image.short, "format": image.format, "file": image.path.name,
        "disk_gib": max(10, -(-image.virtual_bytes // (1 << 30))), "target": provider.job.target,
        **provider.recipe(published),
    }  # fmt: skip
    files = {
        path.name.removesuffix(".j2"): env.get_template(path.name).render(values)
        for path in sorted(folder.glob("*.j2"))
        if path.name != "notes.md.j2"
    }
    notes = env.get_template("notes.md.j2").render(values)
    others = sorted(files)
    files["README.md"] = env.get_template(_COMMON).render(**values, notes=notes, files=others, provider=provider.name)
    return files


def write_recipe(folder: Path, provider: AnyProvider, published: Published) -> Path:
    """Write the recipe; an older one of the same image is replaced."""
    files = render(provider, published)
    if folder.exists():
        remove_tree(folder)
    folder.mkdir(parents=True)
    for name, text in files.items():
        path = folder / name
        path.write_text(text)
        if name.endswith(".sh"):
            path.chmod(0o755)
    return folder
