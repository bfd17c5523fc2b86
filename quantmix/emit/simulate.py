"""Replays offload flags over all tensors, with each engine's own precedence.

    1. `token_embd` stays in RAM; blocks and the output matrix go where -ngl and -ts put them. A
       tied head goes with the output, but by the embedding's name (`memory.head`).
    2. The first override whose regex is found anywhere in the name moves the tensor.
       mainline: `-ot`, `-cmoe`, `-ncmoe` in command-line order; ik: every `-ot` first.
       -ncmoe N: mainline the first N blocks; ik the first N (builds before 2026-08) or the last N
       MoE blocks on one GPU, and shared out over the GPUs, from the back, on several.
    3. KV follows its block, whatever moved the weights (`layer_homes`).

Sources: llama.cpp src/llama-model.cpp, src/llama-model-loader.cpp, common/arg.cpp;
ik_llama.cpp src/llama.cpp, src/llama-load-tensors.cpp, common/common.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quantmix.emit.cmdline import CommandLine, Option, parse
from quantmix.emit.flags import OffloadFlags
from quantmix.emit.layers import by_bytes, split_sizes
from quantmix.errors import CheckFailed, UsageError
from quantmix.memory import kv
from quantmix.memory.head import head_name
from quantmix.memory.homes import CPU, Homes, default_home, is_expert, planned
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.memory.split import by_count, gpu_slots, splits_bytes
from quantmix.models.model import Model
from quantmix.rig.device import Rig

IK_NCMOE_SHARED: Final = "2026-03-01"  # -ncmoe spread over GPUs; the exact build is not known
IK_NCMOE_FROM_LAST: Final = "2026-08-01"  # on one GPU; seen in 2026-08-15, not in 2026-04
_FLOAT32_MAX: Final = 3.4e38  # the engines keep shares as such


@dataclass(frozen=True, slots=True)
class Rule:
    """One override as the engine tries it: tensors whose name holds `regex` go to `home`.

    `option` is the flag as typed (`--n-cpu-moe 10`) where the engine itself makes the regex of
    it, empty for an `-ot`.
    """

    regex: re.Pattern[str]
    home: int
    option: str = ""


def replay(
    flags: OffloadFlags | Sequence[str],
    model: Model,
    settings: Settings,
    rig: Rig,
    sizes: Mapping[str, int],
) -> dict[str, str]:
    """Return the device name of every loaded tensor under these flags.

    `sizes` are file bytes per tensor. With an `OffloadFlags`, its CUDA_VISIBLE_DEVICES decides
    which GPUs of the rig the engine sees, and in which order.

    Raises:
        UsageError: the engine would refuse the flags.
    """
    given = flags.flags if isinstance(flags, OffloadFlags) else flags
    env = flags.env if isinstance(flags, OffloadFlags) else {}
    command = parse(given)
    seen = visible(rig, env)
    names = [rig.gpus[i].name for i in seen]
    homes = layer_homes(command, model, settings, rig, sizes, seen)
    rules = override_rules(command, model, settings, homes, len(names))
    return landings(model, settings, homes, rules, names)


def landings(
    model: Model, settings: Settings, homes: Homes, rules: Sequence[Rule], names: Sequence[str]
) -> dict[str, str]:
    """Return the device of every loaded tensor; `names` are those of the GPUs the engine sees."""
    devices = {}
    for t in model.tensors:
        if not t.loaded and not settings.mtp:
            continue
        home = moved_home(t.name, default_home(t, homes), rules)
        devices[t.name] = names[home] if home != HOST else CPU
    return devices


def prove(
    flags: OffloadFlags,
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    sizes: Mapping[str, int],
) -> None:
    """Check that the flags, replayed, are the plan; KV (by block) and the head included.

    Raises:
        CheckFailed: they are not; names the first tensor that differs.
    """
    seen = visible(rig, flags.env)
    command = parse(flags.flags)
    homes = layer_homes(command, model, settings, rig, sizes, seen)
    for block, home in enumerate(placement.layer_device[: kv.n_blocks(model)]):
        got = seen[homes.blocks[block]] if homes.blocks[block] != HOST else HOST
        if got != home:
            raise CheckFailed(
                f"flags put layer {block} and its KV cache on {_label(rig, got)}, "
                f"the plan on {_label(rig, home)}"
            )
    head = head_home(model, homes, override_rules(command, model, settings, homes, len(seen)))
    got = seen[head] if head != HOST else HOST
    if got != placement.output_device:
        raise CheckFailed(
            f"flags put the head on {_label(rig, got)}, "
            f"the plan on {_label(rig, placement.output_device)}"
        )
    wanted = planned(model, placement, rig, mtp=settings.mtp)
    got_devices = replay(flags, model, settings, rig, sizes)
    for name, device in wanted.items():
        if got_devices[name] != device:
            raise CheckFailed(f"flags put {name} on {got_devices[name]}, the plan on {device}")


def visible(rig: Rig, env: Mapping[str, str]) -> list[int]:
    """Indices of the rig's GPUs that the engine sees, in its order.

    Raises:
        UsageError: CUDA_VISIBLE_DEVICES names a GPU that the rig does not have.
    """
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(range(len(rig.gpus)))
    if not text.strip():
        return []
    try:
        chosen = [int(p) for p in text.split(",")]
    except ValueError:
        raise UsageError(f"CUDA_VISIBLE_DEVICES={text} is not a list of numbers") from None
    if any(not 0 <= i < len(rig.gpus) for i in chosen):
        raise UsageError(f"CUDA_VISIBLE_DEVICES={text}, but the rig has {len(rig.gpus)} GPUs")
    return chosen


def layer_homes(
    command: CommandLine,
    model: Model,
    settings: Settings,
    rig: Rig,
    sizes: Mapping[str, int],
    seen: Sequence[int],
) -> Homes:
    """Where -ngl, -sm, -mg and -ts put every block, its KV cache, and the output.

    Without `-ts` the engines split by free memory: capacities stand in for it here.

    Raises:
        UsageError: `-mg` or `-ts` that the engine does not take.
    """
    n = kv.n_blocks(model)
    ngl = command.integer("ngl")
    ngl = 999 if ngl is None or ngl < 0 else ngl
    if not seen or ngl == 0:
        return Homes((HOST,) * n, HOST)
    first, last = gpu_slots(n, ngl, settings.engine)
    if command.value("sm") == "none":
        slots = [main_gpu(command, len(seen))] * (last - first)
    elif len(seen) == 1:
        slots = [0] * (last - first)
    else:
        weights = _weights(command, rig, seen)
        if splits_bytes(settings):
            slots = by_bytes(weights, first, last, split_sizes(model, settings, sizes))
        else:
            slots = by_count(weights, first, last)
    full = [HOST] * first + slots + [HOST] * (n + 1 - last)
    return Homes(tuple(full[:n]), full[n])


def override_rules(
    command: CommandLine, model: Model, settings: Settings, homes: Homes, n_gpus: int
) -> list[Rule]:
    """All overrides in the order the engine tries them.

    The engine makes one override per layer of a `-cmoe` or `-ncmoe`; here they are one rule, as
    they stand together and have one home.

    Raises:
        UsageError: a regex, a buffer name or a number of layers that the engine refuses.
    """
    if command.integer("ngl") == 0:
        return []
    ots: list[Rule] = []
    moe: list[Rule] = []
    for option in command.options:
        if option.name == "ot":
            one = CommandLine((option,))
            ots += [Rule(_regex(o.pattern), buffer_home(o.buffer, n_gpus)) for o in one.overrides]
        elif option.name in ("cmoe", "ncmoe"):
            n = 999 if option.name == "cmoe" else _moe_layers(option)
            layers = _ncmoe_layers(n, model, settings, homes)
            rules = [_moe_rule(option, layers)] if layers else []
            if settings.engine == "ik":
                moe = rules
            else:
                ots += rules
    return ots + moe


def buffer_home(buffer: str, n_gpus: int) -> int:
    """GPU index of `CUDA1`, HOST for `CPU`.

    Raises:
        UsageError: no such buffer among the GPUs the engine sees.
    """
    if buffer == CPU:
        return HOST
    match = re.fullmatch(r"CUDA(\d{1,4})", buffer)
    if match is None or int(match.group(1)) >= max(1, n_gpus):
        names = ", ".join([CPU, *(f"CUDA{i}" for i in range(n_gpus))])
        short = buffer if len(buffer) <= 40 else buffer[:40] + "…"
        raise UsageError(f"-ot names buffer {short!r}: the engine knows {names}")
    return int(match.group(1))


def main_gpu(command: CommandLine, n_gpus: int) -> int:
    """Index of the GPU that takes everything with `-sm none`.

    Raises:
        UsageError: the engine does not see so many.
    """
    gpu = command.integer("mg") or 0
    if gpu < 0:
        raise UsageError(
            f"-mg {gpu} with -sm none uses no GPU in new builds of llama.cpp and is refused by "
            "others: write -mg 0"
        )
    if gpu >= n_gpus:
        raise UsageError(f"-mg {gpu}: the engine sees CUDA0 to CUDA{n_gpus - 1}")
    return gpu


def are_shares(text: str) -> bool:
    """Whether both engines can split by this `-ts`: numbers of 0 or more, none infinite."""
    try:
        shares = [float(p) for p in re.split(r"[,/]+", text.rstrip(",/"))]
    except ValueError:
        return False
    return all(0 <= s <= _FLOAT32_MAX for s in shares)


def moved_home(name: str, home: int, rules: Sequence[Rule]) -> int:
    """Home of a tensor after overrides: that of the first rule found in its name, else `home`."""
    return next((r.home for r in rules if r.regex.search(name)), home)


def head_home(model: Model, homes: Homes, rules: Sequence[Rule]) -> int:
    """Home of the matrix that gives the logits, a tied one's second tensor included."""
    return moved_home(head_name(model), homes.output, rules)


def _ncmoe_layers(n: int, model: Model, settings: Settings, homes: Homes) -> list[int]:
    blocks = list(range(len(homes.blocks)))
    if settings.engine == "mainline" or settings.build < IK_NCMOE_SHARED or n >= len(blocks):
        return blocks[:n]
    n_gpus = len({d for d in homes.blocks if d != HOST})
    if n_gpus < 2:
        if settings.build < IK_NCMOE_FROM_LAST:
            return blocks[:n]
        moe = sorted({t.layer for t in model.tensors if is_expert(t) and t.layer is not None})
        return moe[-n:] if n else []
    wanted = _share_out(n, [list(homes.blocks).count(g) for g in range(max(homes.blocks) + 1)])
    taken = []
    for i in reversed(blocks):
        gpu = homes.blocks[i]
        if gpu != HOST and wanted[gpu] > 0:
            wanted[gpu] -= 1
            taken.append(i)
    return taken


def _share_out(n: int, counts: Sequence[int]) -> list[int]:
    """ik's split of `-ncmoe N` over GPUs in proportion to their layers, adding up to N."""
    total = sum(counts)
    want = [c * n / total for c in counts]
    out = [int(w + 0.5) for w in want]
    while sum(out) > n:
        out[max((i for i, o in enumerate(out) if o), key=lambda i: out[i] - 1 - want[i])] -= 1
    while sum(out) < n:
        room = [i for i, o in enumerate(out) if o < counts[i]]
        out[min(room, key=lambda i: out[i] + 1 - want[i])] += 1
    return out


def _moe_layers(option: Option) -> int:
    """The N of an `-ncmoe N`."""
    value = option.value or ""
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise UsageError(f"-ncmoe {value} is not a number of layers")
    return int(value)


def _weights(command: CommandLine, rig: Rig, seen: Sequence[int]) -> list[float]:
    text = command.value("ts")
    if text is not None and not are_shares(text):
        raise UsageError(f"-ts {text} is no list of shares like 60,40")
    given = list(command.tensor_split)[: len(seen)]
    if any(given):
        return given + [0.0] * (len(seen) - len(given))
    return [float(rig.gpus[i].capacity_bytes or 1) for i in seen]


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as err:
        raise UsageError(f"-ot pattern {pattern!r} is not a regex: {err}") from None


def _moe_rule(option: Option, layers: Sequence[int]) -> Rule:
    """The overrides that an engine makes of a `-cmoe` or `-ncmoe`, as one."""
    which = "|".join(map(str, sorted(layers)))
    regex = re.compile(rf"blk\.({which})\.ffn_(up|down|gate|gate_up)_(ch|)exps")
    return Rule(regex, HOST, " ".join(filter(None, (option.spelling, option.value))))


def _label(rig: Rig, home: int) -> str:
    return rig.gpus[home].name if home != HOST else CPU
