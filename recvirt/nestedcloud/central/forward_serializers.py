"""The API's documents on forwards."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from recvirt.nestedcloud.addresses import check_source
from recvirt.nestedcloud.central.models import Forward, ForwardProtocol, Instance, InstanceState, Worker
from recvirt.nestedcloud.central.serializers import Strict
from recvirt.nestedcloud.model import ModelError


class ForwardSerializer(serializers.ModelSerializer[Forward]):
    """A port of a worker's host that leads to an instance. ``message`` says why it does not yet."""

    # To Django REST framework a field, not the attribute of that name.
    instance = serializers.CharField(source="nic.instance.name", read_only=True)  # type: ignore[assignment]
    network = serializers.CharField(source="nic.network.name", read_only=True)
    address = serializers.CharField(source="nic.address", read_only=True)
    worker = serializers.SlugRelatedField[Worker](slug_field="name", read_only=True)

    class Meta:
        model = Forward
        # Only read; a validator of a constraint hides the declared field of that name (Django REST framework 3.16).
        validators: tuple[Any, ...] = ()
        fields = [
            "uuid", "protocol", "host_port", "instance", "network", "address", "guest_port", "source", "worker",
            "state", "message", "created",
        ]  # fmt: skip


class NewForwardSerializer(Strict):
    """A forward to be made. ``source`` is the network that may come, as 192.0.2.0/24; empty: everybody."""

    instance = serializers.CharField()
    network = serializers.CharField(required=False)
    protocol = serializers.ChoiceField(choices=ForwardProtocol.choices, default=ForwardProtocol.TCP.value)
    host_port = serializers.IntegerField(min_value=1, max_value=65535)
    guest_port = serializers.IntegerField(min_value=1, max_value=65535)
    # To Django REST framework a field, not the attribute of that name.
    source = serializers.CharField(required=False, allow_blank=True, default="", max_length=18)  # type: ignore[assignment]

    def validate_instance(self, name: str) -> Instance:
        """The project's instance of that name."""
        found = self.context["project"].instances.filter(name=name).exclude(state=InstanceState.DELETED).first()
        if found is None:
            raise serializers.ValidationError(f"there is no instance called {name}")
        assert isinstance(found, Instance)
        return found

    def validate_source(self, text: str) -> str:
        """An IPv4 network."""
        try:
            return check_source(text) if text else ""
        except ModelError as error:
            raise serializers.ValidationError(str(error)) from None
