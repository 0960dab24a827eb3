"""Who we are at an OpenStack: ``clouds.yaml`` or the ``OS_*`` variables, by keystoneauth's own plugins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from recvirt.errors import ConfigError, PublishError
from recvirt.publish.errors import DeniedError, MissingSdkError, TransientError

_VARIABLES = {
    "auth_url": "OS_AUTH_URL", "username": "OS_USERNAME", "password": "OS_PASSWORD", "project_id": "OS_PROJECT_ID",
    "project_name": "OS_PROJECT_NAME", "user_domain_name": "OS_USER_DOMAIN_NAME", "user_domain_id": "OS_USER_DOMAIN_ID",
    "project_domain_name": "OS_PROJECT_DOMAIN_NAME", "project_domain_id": "OS_PROJECT_DOMAIN_ID",
    "application_credential_id": "OS_APPLICATION_CREDENTIAL_ID",
    "application_credential_secret": "OS_APPLICATION_CREDENTIAL_SECRET", "token": "OS_TOKEN",
}  # fmt: skip


def cloud_settings(cloud: str | None) -> dict[str, Any]:
    """The entry of ``clouds.yaml`` (``secure.yaml`` over it), or what the environment says. ConfigError if none."""
    cloud = cloud or os.environ.get("OS_CLOUD")
    if cloud is None:
        auth = {key: os.environ[name] for key, name in _VARIABLES.items() if name in os.environ}
        if "auth_url" not in auth:
            raise ConfigError(
                "it is not known which OpenStack",
                hint="name one of clouds.yaml (cloud:), or set OS_CLOUD or OS_AUTH_URL",
            )
        kind = "v3applicationcredential" if "application_credential_id" in auth else "password"
        kind = os.environ.get("OS_AUTH_TYPE", kind)
        return {"auth": auth, "auth_type": kind, "region_name": os.environ.get("OS_REGION_NAME"),
                "cacert": os.environ.get("OS_CACERT")}  # fmt: skip
    places = [Path.cwd(), Path.home() / ".config/openstack", Path("/etc/openstack")]
    named = os.environ.get("OS_CLIENT_CONFIG_FILE")
    files = [Path(named)] if named else [folder / "clouds.yaml" for folder in places]
    for path in files:
        entry = _entry(path, cloud)
        if entry is not None:
            secret = _entry(path.with_name("secure.yaml"), cloud) or {}
            return {**entry, **secret, "auth": {**(entry.get("auth") or {}), **(secret.get("auth") or {})}}
    raise ConfigError(f"no clouds.yaml has a cloud {cloud!r}", hint=f"looked at {', '.join(map(str, files))}")


def _entry(path: Path, cloud: str) -> dict[str, Any] | None:
    try:
        data = yaml.safe_load(path.read_text())
        entry = data["clouds"][cloud]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        return None
    except (OSError, yaml.YAMLError):
        # Its words could hold a secret's line.
        raise ConfigError(f"{path} can't be read, or is no YAML") from None
    return entry if isinstance(entry, dict) else None


class Identity:
    """A session of keystoneauth: tokens, and where the image service is."""

    def __init__(self, cloud: str | None, region: str | None, interface: str, timeout: float) -> None:
        try:
            from keystoneauth1 import loading
            from keystoneauth1.session import Session
        except ImportError:
            raise MissingSdkError("keystoneauth1", "openstack") from None
        settings = cloud_settings(cloud)
        kind = settings.get("auth_type") or "password"
        try:
            plugin: Any = loading.get_plugin_loader(kind).load_from_options(**settings["auth"])
        except Exception as error:  # keystoneauth's errors share no base with its options' own
            raise ConfigError(f"OpenStack's credentials don't fit together: {type(error).__name__}: {error}") from None
        self._region = region or settings.get("region_name")
        self._interface = interface
        verify = settings.get("cacert") or settings.get("verify", True)
        self._session = Session(auth=plugin, verify=verify, timeout=timeout)

    def token(self, *, fresh: bool = False) -> str:
        """A token; a new one when the last was refused."""
        if fresh:
            self._session.invalidate()
        return str(self._asked(self._session.get_token))

    def image_endpoint(self) -> str:
        """The image service's address, from the catalogue. PublishError when the region has none."""
        found = self._asked(
            lambda: self._session.get_endpoint(
                service_type="image", interface=self._interface, region_name=self._region
            )
        )
        if not found:
            raise PublishError(
                f"this OpenStack has no image service in the region {self._region}", hint="is `region` right?"
            )
        return str(found)

    @staticmethod
    def _asked(function: Any) -> Any:
        from keystoneauth1 import exceptions

        try:
            return function()
        except (exceptions.Unauthorized, exceptions.Forbidden) as error:
            raise DeniedError(
                f"OpenStack refuses the credentials: {error}", hint="are they right and not expired?"
            ) from None
        except (exceptions.ConnectFailure, exceptions.RetriableConnectionFailure, exceptions.ConnectTimeout) as error:
            raise TransientError(f"OpenStack's identity service can't be reached: {error}") from None
        except exceptions.ClientException as error:
            raise PublishError(f"OpenStack's identity service: {error}") from None
