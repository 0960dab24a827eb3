"""Documents have every field that they name, with each version of Django REST framework."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from rest_framework import serializers

from recvirt.nestedcloud import central

for _module in pkgutil.iter_modules(central.__path__):
    if _module.name.endswith(("serializers", "times", "views", "people", "stream")):
        importlib.import_module(f"{central.__name__}.{_module.name}")

CLASSES = [
    kind for kind in serializers.ModelSerializer.__subclasses__() if kind.__module__.startswith(central.__name__)
]


def test_there_are_some() -> None:
    assert {"VolumeSerializer", "ReservationSerializer", "InstanceSerializer"} <= {kind.__name__ for kind in CLASSES}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_field_is_hidden(kind: type[serializers.ModelSerializer[object]]) -> None:  # type: ignore[type-var]
    serializer = kind()
    shown = {name for name, field in serializer.fields.items() if not field.write_only}
    assert shown == set(kind.Meta.fields)
