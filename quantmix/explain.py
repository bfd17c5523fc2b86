"""Explains pasted offload flags on a model and a rig, and proposes a better line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from quantmix.emit.cmdline import CommandLine, parse_text
from quantmix.emit.flags import OffloadFlags
from quantmix.emit.lint import (
    Finding,
    RuleReport,
    landing_findings,
    rule_findings,
    rule_reports,
)
from quantmix.emit.lint_flags import (
    clean,
    engine_findings,
    needs_flash_attention,
    readable,
    settings_of,
)
from quantmix.emit.simulate import head_home, landings, layer_homes, override_rules, visible
from quantmix.errors import EngineError, InfeasibleBudget, UsageError
from quantmix.ggml import types
from quantmix.ggml.types import Engine
from quantmix.memory.homes import Homes, is_expert
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.mtp import with_mtp
from quantmix.offload import OffloadPlan, StoredModel, device_uses, holds, place, stored
from quantmix.recipe import DeviceUse
from quantmix.rig.device import Device, Rig
from quantmix.speed.model import (
    calibration,
    of_unknown_bandwidth,
    plan_seconds,
    predict,
    usual_fill,
)
from quantmix.speed.prediction import Speed
from quantmix.units import gib

_SEVERITIES: Final = ("error", "warning", "note")
# A preset in a file name; unsloth's `UD-…` are mixes of their own, interleaved files are repacked.
_PRESET: Final = re.compile(r"(?<![A-Z0-9_])(?<!UD-)(I?Q\d_[A-Z0-9]+(?:_[SML])?)(?![A-Z0-9_])")
# Options that a better line replaces; all others of the pasted line are kept as they were.
_LAYOUT: Final = frozenset(
    {
        *(
            "ngl",
            "ts",
            "sm",
            "mg",
            "dev",
            "ot",
            "ncmoe",
            "cmoe",
            "fa",
            "mla",
            "amb",
            "fmoe",
            "ooae",
        ),
        *("rtr", "c", "b", "ub", "ctk", "ctv", "np", "cram", "nkvo", "fit", "mtp"),
    }
)


_FOR_POSIX: Final = (
    "the better line is written for a POSIX shell: on Windows set its variables first "
    "(cmd: set NAME=VALUE) and put double quotes for single ones"
)


@dataclass(frozen=True)
class Explanation:
    """What a pasted line does.

    Attributes:
        findings: errors first, then warnings, then notes.
        rules: the overrides in the engine's order. homes: device name of every tensor.
        devices: what each device of the rig holds; free is None when its size is not known.
        holds: per device one line of text: layers, experts.
        better: a placement of the same file on the same rig, None with the reason in `findings`.
        better_line: it as a command line, other options kept. gain: its speed over the pasted
            line's, None when the rig's bandwidths are not known.
    """

    settings: Settings
    findings: tuple[Finding, ...]
    rules: tuple[RuleReport, ...]
    homes: dict[str, str]
    devices: tuple[DeviceUse, ...]
    holds: dict[str, str]
    speed: Speed
    better: OffloadPlan | None
    better_line: str
    gain: float | None


def explain(
    text: str,
    file: StoredModel,
    rig: Rig | None,
    base: Settings,
    *,
    measured_tps: float | None = None,
) -> Explanation:
    """Explain the pasted `text` for a file on a rig (None: GPUs of unknown size).

    `base` names the engine and its build; context, batch and cache types come from the line, and
    the engine's defaults where it is silent. Its context counts where the trained one is not known.
    `measured_tps` is what the pasted line reached: both predictions are scaled by it.

    Raises:
        UsageError: the text holds no flags at all, or a speed cannot calibrate an unknown rig.
    """
    pasted = parse_text(text)
    if not pasted.options:
        raise UsageError("--lint found no flags in that text: paste the line that starts llama.cpp")
    given, unread = readable(pasted, base.engine)
    settings = settings_of(given, base, file.model.hparams.ctx_train)
    file = replace(file, model=with_mtp(file.model, settings))
    model = file.model
    machine = rig or _guessed_rig(given)
    seen, findings = _seen(machine, given)
    names = [machine.gpus[i].name for i in seen]
    command, refused = clean(given, len(seen))
    homes = layer_homes(command, model, settings, machine, file.sizes, seen)
    compiled = override_rules(command, model, settings, homes, len(seen))
    loaded = [t for t in model.tensors if t.loaded or settings.mtp]
    reports = rule_reports(compiled, [f"CUDA{i}" for i in range(len(seen))], loaded)
    where = landings(model, settings, homes, compiled, names)
    placement = _placement(model, homes, head_home(model, homes, compiled), where, seen)
    uses = device_uses(file, machine, settings, placement, where, seen)
    findings += _numbering(machine, seen) if rig is not None and len(seen) > 1 else []
    findings += unread + refused + rule_findings(reports, loaded)
    findings += engine_findings(given, model, settings)
    findings += landing_findings(command, model, file.types, homes, where, names)
    findings += _room(file, uses, where)
    speed = predict(model, settings, machine, placement, file.types, where=where)
    scale = None
    if measured_tps is not None:
        _require_bandwidths(model, machine, placement, where)
        scale = calibration(measured_tps, speed)
        speed = predict(model, settings, machine, placement, file.types, where=where, scale=scale)
    startable = replace(settings, fa=settings.fa or needs_flash_attention(settings))
    better, why = _better(file, rig, startable, uses, scale)
    findings += why
    if better and pasted.words and pasted.words[0].lower().endswith(".exe"):
        findings.append(Finding("note", _FOR_POSIX))
    gain = _gain(file, machine, settings, placement, where, better)
    return Explanation(
        settings=settings,
        findings=tuple(sorted(findings, key=lambda f: _SEVERITIES.index(f.severity))),
        rules=tuple(reports),
        homes=where,
        devices=uses,
        holds=holds(model, machine, placement, where),
        speed=speed,
        better=better,
        better_line=command_line(pasted, better.flags, repack=not seen) if better else "",
        gain=gain,
    )


def command_line(pasted: CommandLine, flags: OffloadFlags, *, repack: bool = False) -> str:
    """Return the better flags as one shell command, options without a say in layout kept.

    `repack` keeps -rtr, which does harm only where a GPU would speed up prompts.
    """
    env = {k: v for k, v in pasted.env.items() if not k.startswith("CUDA_")} | flags.env
    program = pasted.words[0] if pasted.words else "llama-server"
    parts = _started(pasted.launcher, [f"{k}={shlex.quote(v)}" for k, v in env.items()])
    parts.append(_quoted(program))
    for option in pasted.options:
        if option.name not in _LAYOUT or (option.name == "rtr" and repack):
            parts.append(option.spelling)
            parts += [_quoted(option.value)] if option.value is not None else []
    return " ".join([*parts, *(shlex.quote(f) for f in flags.flags)])


def _started(launcher: Sequence[str], env: Sequence[str]) -> list[str]:
    """Return what stands before the program, the environment where the program gets to see it.

    `sudo` drops what stands before it, and a container gets only what `-e` names.
    """
    words = [w if w in ("&&", ";", "||") or w.endswith(";") else _quoted(w) for w in launcher]
    programs = {w.rsplit("/", 1)[-1] for w in launcher}
    if programs & {"docker", "podman"}:
        return [*words, *(part for e in env for part in ("-e", e))]
    if "sudo" in programs:
        return [*words, *([] if words[-1] == "env" else ["env"]), *env]
    start = max(
        (i + 1 for i, w in enumerate(words) if w in ("&&", ";") or w.endswith(";")), default=0
    )
    return [*words[:start], *env, *words[start:]]


def _quoted(word: str) -> str:
    """Quote a pasted word for a shell, which shall still see a home folder and variables."""
    if word.startswith("~/"):
        return "~/" + shlex.quote(word[2:])
    if re.search(r"\$(\w|\{\w+\})", word) and not re.search(r"[\"`\\]", word):
        return f'"{word}"'
    return shlex.quote(word)


def guessed(model: Model, name: str, engine: Engine) -> tuple[StoredModel, str | None]:
    """Return a model with the types that a file name speaks of, and what it says.

    A preset (`…-Q4_K_M-00001-of-…`) is what llama-quantize makes of it, where an engine tells;
    else, and where publishers mix on their own (`UD-Q2_K_XL`), every matrix has the type named.
    Without either the types stay as they are.
    """
    preset = _PRESET.search(name.rsplit("/", 1)[-1].upper())
    for what in (preset and preset[1], type_in_name(name, engine)):
        if what is None:
            continue
        try:
            return stored(model, engine, what), what
        except (EngineError, UsageError):
            continue
    return stored(model, engine), None


def type_in_name(name: str, engine: Engine) -> str | None:
    """Return the type that a file name speaks of (`…-Q4_K_M-00001-of-…` → q4_K), None if none."""
    from quantmix.speed.logs import label_type

    stem = name.rsplit("/", 1)[-1]
    found = label_type(stem)
    return found.name if found is not None and found.name in types.table(engine) else None


def _guessed_rig(command: CommandLine) -> Rig:
    """GPUs of unknown size: as many as the line speaks of."""
    text = command.env.get("CUDA_VISIBLE_DEVICES", "")
    listed = [int(n) for n in re.findall(r"\d{1,4}", text)]
    named = [int(n) for o in command.overrides for n in re.findall(r"^CUDA(\d{1,4})$", o.buffer)]
    split = len(command.tensor_split) - 1
    count = min(64, 1 + max([0, split, command.integer("mg") or 0, *listed, *named]))
    gpus = tuple(Device(f"GPU{i}", "gpu", None) for i in range(count))
    return Rig(gpus, Device("CPU", "host", None))


def _seen(rig: Rig, command: CommandLine) -> tuple[list[int], list[Finding]]:
    try:
        seen, findings = visible(rig, command.env), []
    except UsageError as err:
        seen = list(range(len(rig.gpus)))
        findings = [Finding("warning", f"{err}: ignored here")]
    text = command.value("dev")
    if text is None:
        return seen, findings
    names = {f"CUDA{i}": gpu for i, gpu in enumerate(seen)}
    chosen = [] if text == "none" else text.split(",")
    if not set(chosen) <= set(names):
        known = ", ".join(names) or "none"
        text = f"-dev {text}: the engine sees {known} here; taken as not given"
        return seen, [*findings, Finding("warning", text)]
    return [names[n] for n in chosen], findings


def _numbering(rig: Rig, seen: Sequence[int]) -> list[Finding]:
    """Which card each CUDA number means, as the rig lists them."""
    pairs = [f"CUDA{i} = {rig.gpus[g].name} ({rig.gpus[g].card})" for i, g in enumerate(seen)]
    text = ", ".join(pairs)
    return [
        Finding("note", f"{text}: if your cards are numbered otherwise, list --gpus in CUDA order")
    ]


def _placement(
    model: Model, homes: Homes, head: int, where: Mapping[str, str], seen: Sequence[int]
) -> Placement:
    """The placement nearest to what the flags do, for buffers that depend on it.

    `head` is where the head is, overrides applied, in the engine's numbering as `homes`.
    """
    blocks = tuple(seen[d] if d != HOST else HOST for d in homes.blocks)
    in_ram = frozenset(
        t.layer
        for t in model.tensors
        if is_expert(t)
        and t.layer is not None
        and t.layer < len(blocks)
        and blocks[t.layer] != HOST
        and where.get(t.name) == "CPU"
    )
    output = seen[head] if head != HOST else HOST
    return Placement(blocks, output, in_ram)


def _room(file: StoredModel, uses: Sequence[DeviceUse], where: Mapping[str, str]) -> list[Finding]:
    """Devices that overflow, and room that is left while experts are in RAM."""
    in_ram: dict[int, int] = {}
    for t in file.model.tensors:
        if is_expert(t) and t.layer is not None and where.get(t.name) == "CPU":
            in_ram[t.layer] = in_ram.get(t.layer, 0) + file.sizes[t.name]
    layer = min(in_ram.values(), default=0)
    found = []
    for use in uses:
        if use.free_bytes is None or use.capacity_bytes is None:
            continue
        if use.free_bytes < 0:
            text = f"{use.name} needs {gib(use.used_bytes)} of {gib(use.capacity_bytes)}"
            found.append(Finding("error", f"{text}: {gib(-use.free_bytes)} too much"))
        elif use.kind == "gpu" and layer and use.free_bytes >= layer:
            more = use.free_bytes // layer
            text = f"{use.name} wastes {gib(use.free_bytes)}: room for the experts of {more} more"
            plural = "layer" if more == 1 else "layers"
            found.append(Finding("warning", f"{text} {plural} ({gib(layer)} each), now in RAM"))
    return found


def _better(
    file: StoredModel,
    rig: Rig | None,
    settings: Settings,
    uses: Sequence[DeviceUse],
    scale: float | None,
) -> tuple[OffloadPlan | None, list[Finding]]:
    """A plan for the same file, rig and settings, with no more RAM than the pasted line uses."""
    if rig is None:
        return None, [Finding("note", "no better line: say which cards with --gpus or --rig")]
    host = rig.host
    if host.capacity_bytes is None and uses[-1].weights_bytes:
        host = replace(host, capacity_bytes=uses[-1].used_bytes)
        rig = replace(rig, host=host, ram_reserve_bytes=rig.ram_reserve_bytes or 0)
    try:
        return place(file, rig, settings, scale=scale), []
    except InfeasibleBudget as err:
        return None, [Finding("error", f"no better line: {err}")]


def _require_bandwidths(
    model: Model, rig: Rig, placement: Placement, where: Mapping[str, str]
) -> None:
    """Refuse to calibrate what cannot be predicted, naming what is not known of the rig."""
    unknown = of_unknown_bandwidth(model, rig, placement, where)
    if not unknown:
        return
    cards = [d for d in unknown if d.kind == "gpu"]
    mends = ["the cards by --gpus, like 1xrtx-3090"] if cards else []
    mends += ["the CPU by --cpu (`quantmix rigs` lists both)"] if len(cards) < len(unknown) else []
    raise UsageError(
        f"--measured cannot calibrate: the bandwidth of {', '.join(d.name for d in unknown)} is "
        f"not known; name {' and '.join(mends)}"
    )


def _gain(
    file: StoredModel,
    rig: Rig,
    settings: Settings,
    placement: Placement,
    where: Mapping[str, str],
    better: OffloadPlan | None,
) -> float | None:
    """Predicted speed of the better line over the pasted one."""
    if better is None or better.speed.tg_tps is None:
        return None
    fill = usual_fill(settings)
    now = plan_seconds(file.model, settings, rig, placement, file.types, n_kv=fill, where=where)
    then = plan_seconds(file.model, settings, rig, better.placement, file.types, n_kv=fill)
    return now / then
