"""Offload flags of a plan: the parts that both engines share, and the entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from quantmix.emit.regex import int_group, word_group
from quantmix.errors import UsageError
from quantmix.memory import kv
from quantmix.memory.head import is_tied
from quantmix.memory.homes import is_movable
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.rig.cards import cards
from quantmix.rig.device import Rig
from quantmix.units import pad

_EXPERT_WORDS: Final = ("up", "down", "gate", "gate_up")  # as people write them


@dataclass(frozen=True, slots=True)
class OffloadFlags:
    """Flags and environment that put every tensor where the plan wants it.

    `notes` says on what the flags rest, one sentence each.
    """

    flags: list[str]
    env: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A placement read as the engines split: leading blocks in RAM, then runs of blocks per GPU.

    `gpus` are the rig indices in use, in order; `counts` their number of slots (the output is one
    more slot where the engine deals it along with the blocks, on the last GPU when the plan keeps
    it in RAM).
    """

    first: int
    n_blocks: int
    gpus: tuple[int, ...]
    counts: tuple[int, ...]
    output: int


def offload(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    sizes: Mapping[str, int],
) -> OffloadFlags:
    """Return the flags for the engine of `settings`, proven by replaying them.

    `sizes` are file bytes per tensor.

    Raises:
        UsageError: no flags of the engine can express the placement.
        CheckFailed: the replay differs from the plan.
    """
    from quantmix.emit import ik, mainline, simulate

    emit = ik.offload_flags if settings.engine == "ik" else mainline.offload_flags
    flags = emit(model, settings, rig, placement, sizes=sizes)
    simulate.prove(flags, model, settings, rig, placement, sizes)
    return replace(flags, notes=(*flags.notes, *beyond_training(model, settings)))


def beyond_training(model: Model, settings: Settings) -> tuple[str, ...]:
    """Say that a slot's context is longer than what the model was trained on, if it is."""
    trained = model.hparams.ctx_train
    each = settings.ctx // max(1, settings.parallel)
    if not trained or each <= pad(trained, 256):
        return ()
    return (
        f"{each} tokens of context are more than the {trained} that {model.id} was trained on: "
        "beyond them it needs RoPE scaling (YaRN), where it has any",
    )


def split_plan(model: Model, placement: Placement, *, with_output: bool) -> SplitPlan:
    """Read a placement as leading RAM blocks and contiguous runs per GPU.

    Raises:
        UsageError: blocks of a GPU are not contiguous, or RAM blocks do not come first.
    """
    n = kv.n_blocks(model)
    blocks = list(placement.homes(n))
    first = next((i for i, d in enumerate(blocks) if d != HOST), n)
    rest = blocks[first:]
    if HOST in rest or rest != sorted(rest):
        raise UsageError(
            "no flags can express this placement: layers in RAM must come first, "
            "and each GPU must hold one run of layers, in GPU order"
        )
    output = placement.output_device
    dealt_to = output if output != HOST else rest[-1] if rest else HOST
    slots = [*rest, dealt_to] if with_output and dealt_to != HOST else rest
    if slots != sorted(slots):
        raise UsageError("the output matrix must be on the GPU of the last layers, or after it")
    gpus = tuple(sorted({*slots, *([output] if output != HOST else [])}))
    return SplitPlan(first, n, gpus, tuple(slots.count(g) for g in gpus), output)


def environment(rig: Rig, plan: SplitPlan) -> dict[str, str]:
    """CUDA numbering as `nvidia-smi` shows it, and only the GPUs in use; nothing for a pool.

    A GPU that the engine sees gets a context and buffers even when no weights lie there. ROCm
    reads CUDA_VISIBLE_DEVICES too; a Mac has one GPU.
    """
    known = [cards().get(g.card) for g in rig.gpus]
    if rig.ideal or all(c is not None and c.arch == "apple" for c in known):
        return {}
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(g) for g in plan.gpus),
    }


def output_override(model: Model, buffer: str) -> list[str]:
    """`-ot` for the head and the output norm; a tied head goes by the embedding's name.

    That name takes the embedding along, which is at home in RAM: only for `buffer` CPU.
    """
    if not is_tied(model):
        return ["-ot", f"^output={buffer}"]
    assert buffer == "CPU", "the rows of the embedding are looked up in RAM"
    return ["-ot", f"^(output|token_embd)={buffer}"]


def expert_override(model: Model, placement: Placement, settings: Settings) -> list[str]:
    """`-ot` for what stays in RAM although its block is on a GPU (`is_movable`).

    Empty when there is nothing; `exps=CPU` when all experts are; else one anchored pattern.
    """
    n = kv.n_blocks(model)
    roles: dict[int, set[str]] = {}
    for t in model.tensors:
        if t.layer is not None and is_movable(model, t) and (t.loaded or settings.mtp):
            roles.setdefault(t.layer, set()).add(t.role)
    homes = placement.layer_device
    on_gpu = {i for i in roles if i >= len(homes) or homes[i] != HOST}
    in_ram = on_gpu & placement.cpu_experts
    if not in_ram:
        return []
    if in_ram == on_gpu and model.hparams.is_moe:
        return ["-ot", "exps=CPU"]
    free = set(range(n)) - on_gpu
    choices = [in_ram, in_ram | free]
    if max(in_ram) == max(on_gpu) and n < 100:
        choices += [c | set(range(max(on_gpu) + 1, 100)) for c in choices]
    layers = min((int_group(c) for c in choices), key=len)
    names = {r for i in in_ram for r in roles[i]}
    pattern = _expert_names(names) if model.hparams.is_moe else _dense_names(names)
    return ["-ot", rf"blk\.{layers}\.{pattern}=CPU"]


def _dense_names(names: set[str]) -> str:
    """Pattern for the feed-forward matrices of a layer, biases included: `ffn_(up|down)`."""
    words = {n.split(".")[0].removeprefix("ffn_") for n in names}
    return rf"ffn_{word_group([w for w in _EXPERT_WORDS if w in words])}\."


def _expert_names(names: set[str]) -> str:
    """Pattern for expert tensors of a layer: `ffn_(up|down|gate)_exps`, or wider."""
    words = {_word(n) for n in names}
    if not all(n.startswith(f"ffn_{_word(n)}_exps") for n in names):
        return "ffn_.*exps"
    ordered = [w for w in _EXPERT_WORDS if w in words] + sorted(words - set(_EXPERT_WORDS))
    weights_only = all(n.endswith("_exps") for n in names)
    return rf"ffn_{word_group(ordered)}_exps" + (r"\.weight" if weights_only else "")


def _word(name: str) -> str:
    return name.removeprefix("ffn_").split("_exps")[0]
