"""What a rig reads and computes with, as plain values: a recipe keeps them, capacities apart.

They are what the speed model wants to know, so that the speed of another mix can be told later.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.rig.device import Device, Rig

_DEVICE: Final = ("card", "bandwidth_gbs", "efficiency", "int8_tops")
_RIG: Final = ("cpu_cores", "cpu_class", "pcie_gbs")
_WORDS: Final = frozenset({"card", "cpu_class"})  # the others are numbers above zero


def to_json(rig: Rig) -> dict[str, Any]:
    """Return what is known of the devices, in the rig's order, and of the CPU and the bus."""
    known = {name: getattr(rig, name) for name in _RIG if getattr(rig, name)}
    return {"devices": [_facts(d) for d in rig.devices], **known}


def with_machine(rig: Rig, doc: dict[str, Any]) -> Rig:
    """Return the rig with what `to_json` told.

    Raises:
        BadFile: of another number of devices, or not what `to_json` makes.
    """
    try:
        devices = [
            replace(d, **_known(facts, _DEVICE))
            for d, facts in zip(rig.devices, doc["devices"], strict=True)
        ]
        known = _known(doc, _RIG)
    except (KeyError, TypeError, ValueError) as err:
        raise BadFile(f"the recipe's `budget.machine` does not fit its devices: {err!r}") from None
    return replace(rig, gpus=tuple(devices[:-1]), host=devices[-1], **known)


def _facts(device: Device) -> dict[str, Any]:
    return {name: getattr(device, name) for name in _DEVICE if getattr(device, name)}


def _known(facts: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return those facts that are told.

    Raises:
        TypeError, ValueError: they are not what `to_json` makes.
    """
    known = {name: facts[name] for name in names if name in facts}
    for name, value in known.items():
        is_number = isinstance(value, int | float) and 0 < value < math.inf
        if not (isinstance(value, str) if name in _WORDS else is_number):
            raise ValueError(f"{name} is {value!r}")
    return known
