"""On which device each tensor of a placement lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quantmix.memory import kv
from quantmix.memory.model import HOST, Placement
from quantmix.models.model import Model, Tensor
from quantmix.rig.device import Rig

CPU: Final = "CPU"
_DENSE_FFN: Final = ("ffn_up", "ffn_gate", "ffn_down")


@dataclass(frozen=True, slots=True)
class Homes:
    """GPU index (in the order the engine sees them) or HOST of every block, and of the output."""

    blocks: tuple[int, ...]
    output: int


def planned(model: Model, placement: Placement, rig: Rig, *, mtp: bool = False) -> dict[str, str]:
    """Return the device name of every loaded tensor as the plan has it."""
    homes = Homes(placement.homes(kv.n_blocks(model)), placement.output_device)
    devices = {}
    for t in model.tensors:
        if not t.loaded and not mtp:
            continue
        home = default_home(t, homes)
        if is_movable(model, t) and t.layer in placement.cpu_experts:
            home = HOST
        devices[t.name] = rig.gpus[home].name if home != HOST else CPU
    return devices


def default_home(t: Tensor, homes: Homes) -> int:
    """Home of a tensor before overrides."""
    if t.layer is not None:
        return homes.blocks[t.layer] if t.layer < len(homes.blocks) else homes.output
    if t.role.startswith(("token_embd", "per_layer_token_embd", "position_embd", "token_types")):
        return HOST
    if t.role.startswith("rope_"):
        return homes.blocks[0]
    return homes.output


def is_expert(t: Tensor) -> bool:
    """Whether it belongs to the routed experts (weights or biases)."""
    return "exps" in t.role


def is_movable(model: Model, t: Tensor) -> bool:
    """Whether it lies in RAM when its layer is one of `Placement.cpu_experts`.

    Routed experts with their biases; in a model without experts the feed-forward matrices.
    """
    if model.hparams.is_moe:
        return "exps" in t.role
    return t.role.split(".")[0] in _DENSE_FFN
