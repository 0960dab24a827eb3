"""Servers that stand in for providers, each a process of its own on the loopback, gone with whoever started it.

What comes from Debian (docker-registry, libvirtd, rclone) is looked up in PATH; the rest in the environment that
``scripts/publish-servers.sh`` makes, so that none of it is among the project's own requirements.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("RECVIRT_PUBLISH_SERVERS", ROOT / ".cache/publish-servers"))
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_START_SECONDS = 240.0


def find(name: str) -> str | None:
    """A server's program, or None."""
    for folder in (HOME / "bin", HOME / "node_modules/.bin"):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a server speaks HTTP there; which status does not matter."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def running(
    argv: list[str], folder: Path, ready: Callable[[], bool], env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server while the block runs. RuntimeError with its last words when it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(argv[0]).name}.log"
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONPATH", None)
    with path.open("ab") as log:
        process = subprocess.Popen(
            [*_WITH_US, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} did not start:\n{path.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


#: "p", as htpasswd(1) -B writes it.
_BCRYPT = "u:$2b$05$recvirtrecvirtrecvirtucxpgVYdhiySpchMlPmZIehjlijQRPt2"


@contextmanager
def registry(folder: Path, *, login: bool = False) -> Iterator[str]:
    """Debian's docker-registry; HOST:PORT. With ``login`` it wants one: u, p."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage:\n  filesystem: {{rootdirectory: '{folder / 'blobs'}'}}\n  delete: {{enabled: true}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
        + (f"auth: {{htpasswd: {{realm: r, path: '{folder / 'htpasswd'}'}}}}\n" if login else "")
    )
    (folder / "htpasswd").write_text(_BCRYPT + "\n")
    argv = [find("docker-registry") or "docker-registry", "serve", str(config)]
    with running(argv, folder, lambda: answers(f"http://127.0.0.1:{port}/v2/")):
        yield f"127.0.0.1:{port}"


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """Moto's server for EC2, EBS direct and S3; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [find("moto_server") or "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with running(argv, folder, lambda: answers(f"{url}/moto-api/")):
        yield url


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """Azurite's blob service; the address of its one account."""
    port = free_port()
    argv = [
        find("azurite-blob") or "azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent",
        "--location", str(folder), "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    with running(argv, folder, lambda: answers(f"http://127.0.0.1:{port}/")):
        yield f"http://127.0.0.1:{port}/devstoreaccount1"


@contextmanager
def cloud_storage(folder: Path) -> Iterator[str]:
    """Cloud Storage's emulator; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [find("gcp-storage-emulator") or "gcp-storage-emulator", "start", "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--in-memory", "--default-bucket", "images"]
    with running(argv, folder, lambda: answers(f"{url}/storage/v1/b")):
        yield url


@contextmanager
def webdav(folder: Path) -> Iterator[str]:
    """A WebDAV server (rclone, with a login: u, p); its address."""
    port = free_port()
    (folder / "files").mkdir(parents=True, exist_ok=True)
    argv = [find("rclone") or "rclone", "serve", "webdav", "--addr", f"127.0.0.1:{port}", "--user", "u", "--pass", "p"]
    argv += ["--config", "/dev/null", "--dir-cache-time", "0s", str(folder / "files")]
    with running(argv, folder, lambda: answers(f"http://127.0.0.1:{port}/")):
        yield f"http://127.0.0.1:{port}"


_APACHE = """ServerRoot {folder}
ServerName 127.0.0.1
Listen 127.0.0.1:{port}
PidFile {folder}/pid
ErrorLog {folder}/errors
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authn_core_module {modules}/mod_authn_core.so
LoadModule authn_file_module {modules}/mod_authn_file.so
LoadModule auth_basic_module {modules}/mod_auth_basic.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule authz_user_module {modules}/mod_authz_user.so
LoadModule dav_module {modules}/mod_dav.so
LoadModule dav_fs_module {modules}/mod_dav_fs.so
DavLockDB {folder}/locks
DocumentRoot {folder}/files
<Directory {folder}/files>
    Dav On
    AuthType Basic
    AuthName files
    AuthUserFile {folder}/htpasswd
    Require valid-user
</Directory>
"""


@contextmanager
def apache(folder: Path) -> Iterator[str]:
    """Apache's WebDAV (with a login: u, p); its address."""
    port = free_port()
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(_BCRYPT + "\n")
    config = folder / "apache.conf"
    config.write_text(_APACHE.format(folder=folder, port=port, modules="/usr/lib/apache2/modules"))
    argv = [find("apache2") or "apache2", "-d", str(folder), "-f", str(config), "-X"]  # one process: a kill leaves none
    if os.geteuid() == 0:
        # It would give root up for a user who may not look into the tests' folders: so it is none from the start.
        argv = ["unshare", "--user", "--map-user=33", "--map-group=33", "--", *argv]
    with running(argv, folder, lambda: answers(f"http://127.0.0.1:{port}/")):
        yield f"http://127.0.0.1:{port}"


_GLANCE = """[DEFAULT]
enabled_backends = files:file
enabled_import_methods = [glance-direct]
node_staging_uri = file://{folder}/staging
[database]
connection = sqlite:///{folder}/glance.sqlite
[glance_store]
default_backend = files
[files]
filesystem_store_datadir = {folder}/store
[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks
[paste_deploy]
flavor =
config_file = {folder}/glance-api-paste.ini
[oslo_policy]
enforce_scope = false
enforce_new_defaults = false
"""
_PASTE = """[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[pipeline:api]
pipeline = versionnegotiation context rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
"""
#: Stands where Keystone's middleware would: every request is a project's administrator. ``TOKEN`` in the environment:
#: the one that is asked for.
_WSGI = """import os
from glance.wsgi.api import application as glance

def application(environ, start_response):
    wanted = os.environ.get("TOKEN")
    if wanted and environ.get("HTTP_X_AUTH_TOKEN") != wanted:
        start_response("401 Unauthorized", [("Content-Length", "0")])
        return [b""]
    environ.update(HTTP_X_IDENTITY_STATUS="Confirmed", HTTP_X_USER_ID="u", HTTP_X_PROJECT_ID="p", HTTP_X_TENANT_ID="p",
                   HTTP_X_ROLES="admin,member,reader")
    return glance(environ, start_response)
"""


@contextmanager
def glance(folder: Path, token: str = "") -> Iterator[str]:
    """Glance itself, without Keystone; its address. With ``token`` it refuses requests that have another one."""
    port = free_port()
    for name in ("store", "staging", "tasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "glance-api.conf").write_text(_GLANCE.format(folder=folder))
    (folder / "glance-api-paste.ini").write_text(_PASTE)
    (folder / "standin.py").write_text(_WSGI)
    environment = {"OS_GLANCE_CONFIG_DIR": str(folder), "TOKEN": token, "no_proxy": "*"}
    manage = [find("glance-manage") or "glance-manage", "--config-file", str(folder / "glance-api.conf"), "db_sync"]
    done = subprocess.run(manage, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    argv = [find("gunicorn") or "gunicorn", "-b", f"127.0.0.1:{port}", "--threads", "8", "--timeout", "300"]
    argv += ["--chdir", str(folder), "standin:application"]
    with running(argv, folder, lambda: answers(f"http://127.0.0.1:{port}/"), environment):
        yield f"http://127.0.0.1:{port}"


#: Provider -> the programs that its stand-in wants.
WANTS = {
    "aws": ("moto_server",),
    "azure": ("azurite-blob",),
    "gcp": ("gcp-storage-emulator",),
    "openstack": ("glance-manage", "gunicorn"),
    "oci-registry": ("docker-registry",),
    "mirror": (),
    "webdav": ("rclone",),
    "apache": ("apache2",),
    "libvirt": ("libvirtd", "virsh"),
}


def why_not(provider: str) -> str:
    """Why no stand-in can be started here; nothing when one can."""
    absent = [name for name in WANTS[provider] if find(name) is None]
    return f"wants {', '.join(absent)}: scripts/publish-servers.sh" if absent else ""


if __name__ == "__main__":
    # For trying things by hand: python -m tests.publish.servers glance FOLDER
    with globals()[sys.argv[1]](Path(sys.argv[2]).absolute()) as where:
        print(where, flush=True)
        time.sleep(1e6)
