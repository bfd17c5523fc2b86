"""What a recipe remembers of the machine it is for."""

import json
from dataclasses import replace

import pytest

from quantmix.budget import Budget
from quantmix.errors import BadFile
from quantmix.rig import machine
from quantmix.rig.device import Device, Rig

GPUS = "2xrtx-5090,1x24G"


def bare(rig: Rig) -> Rig:
    """The rig as a recipe's devices tell of it: names and capacities."""
    devices = [Device(d.name, d.kind, d.capacity_bytes) for d in rig.devices]
    return Rig(tuple(devices[:-1]), devices[-1])


def test_a_rig_comes_back_through_json() -> None:
    """All that the speed model reads of it."""
    budget = Budget.from_gpus(GPUS, ram="256G", cpu="xeon-8-ch-ddr5-4800", cpu_cores=48)
    assert budget.rig is not None
    rig = replace(budget.rig, pcie_gbs=25.0)
    told = json.loads(json.dumps(machine.to_json(rig)))
    assert told["devices"][0]["card"] == "rtx-5090"
    assert "bandwidth_gbs" not in told["devices"][2]
    back = machine.with_machine(bare(rig), told)
    assert replace(back, name=rig.name) == rig


@pytest.mark.parametrize(
    "told",
    [
        *({}, {"devices": [{}]}, {"devices": 3}, {"devices": ["a card"] * 4}, []),
        {"devices": [{"bandwidth_gbs": "fast"}, {}, {}, {}]},
        {"devices": [{}, {}, {}, {"bandwidth_gbs": 0}]},
        {"devices": [{}] * 4, "cpu_class": 5},
    ],
)
def test_what_does_not_fit_the_devices_is_refused(told: object) -> None:
    """In one line."""
    rig = Budget.from_gpus(GPUS).rig
    assert rig is not None
    with pytest.raises(BadFile, match=r"budget\.machine"):
        machine.with_machine(bare(rig), told)  # type: ignore[arg-type]
