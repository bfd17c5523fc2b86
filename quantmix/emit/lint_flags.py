"""Flags of a pasted line: what they set, what the engine refuses, ignores or does unasked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from quantmix.emit import ik, mainline
from quantmix.emit.cmdline import CommandLine, Option, Override, split_overrides
from quantmix.emit.flags import beyond_training
from quantmix.emit.ik import FMOE_GONE
from quantmix.emit.lint import Finding
from quantmix.emit.mainline import FIT
from quantmix.emit.simulate import are_shares, buffer_home, main_gpu
from quantmix.errors import UsageError
from quantmix.ggml.types import Engine, table
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.units import pad

_IK_ONLY: Final = ("mla", "amb", "fmoe", "ooae", "rtr", "ser", "op")
_INT32_MAX: Final = (1 << 31) - 1
# Flags with a whole number: least and most that an engine takes.
_NUMBERS: Final[Mapping[str, tuple[int, int]]] = {
    "ngl": (-_INT32_MAX, _INT32_MAX),
    "mg": (-_INT32_MAX, _INT32_MAX),
    "ncmoe": (0, _INT32_MAX),
    "c": (0, _INT32_MAX),
    "b": (1, _INT32_MAX),
    "ub": (0, _INT32_MAX),
    "np": (1, _INT32_MAX),
    "mla": (0, 3),
    "amb": (0, _INT32_MAX),
    "cram": (-1, _INT32_MAX),
}
_MAINLINE_WORDS: Final = (("ngl", "auto"), ("ngl", "all"), ("np", "-1"))
# The build from which on flash attention is the default, and -fa takes a value.
_FA_NEEDS_VALUE: Final = {"ik": ik.FA_NEEDS_VALUE, "mainline": mainline.FA_NEEDS_VALUE}
_CRAM: Final = {"ik": ik.CRAM, "mainline": mainline.CRAM}
_AMB_DEFAULT: Final = "2026-08-13"  # ik PR 2312: 256 MiB
_MLA_DEFAULT: Final = "2025-11-12"  # ik: 3
_OLD_MAINLINE_CTX: Final = 4096  # -c of mainline before PR 16653, which made it 0
_SPLIT_MODES: Final[Mapping[Engine, tuple[str, ...]]] = {
    "ik": ("none", "layer", "row", "attn", "graph"),
    "mainline": ("none", "layer", "row", "tensor"),
}
_FOLLOWED_MODES: Final = ("none", "layer")


def settings_of(command: CommandLine, base: Settings, ctx_train: int | None = None) -> Settings:
    """Return `base` with what the command line sets, engine defaults where it is silent.

    `ctx_train` is the model's trained context, which engines open without `-c`; where it is not
    known, the context of `base` stands in for it.
    """
    fa_default = base.build >= _FA_NEEDS_VALUE[base.engine]
    caches = base.build >= _CRAM[base.engine]
    fa_text = (command.value("fa") or "on").lower()
    batch, ubatch = _batches(command)
    cram = command.integer("cram")
    ctx = _opened(command, base) or ctx_train
    return replace(
        base,
        ctx=pad(ctx, 256) if ctx else base.ctx,
        ubatch=min(ubatch, batch),
        batch=batch,
        ctk=command.value("ctk") or "f16",
        ctv=command.value("ctv") or "f16",
        parallel=command.integer("np") or 1,
        mla=_integer(command, "mla", 3 if base.build >= _MLA_DEFAULT else 0),
        amb=_integer(command, "amb", 256 if base.build >= _AMB_DEFAULT else 0),
        fa=fa_text not in ("off", "0") if command.has("fa") else fa_default,
        nkvo=command.has("nkvo"),
        mtp=command.has("mtp"),
        cram_mib=max(0, cram if cram is not None else 8192 if caches else 0),
    )


def readable(command: CommandLine, engine: Engine) -> tuple[CommandLine, list[Finding]]:
    """Return the command without numbers that the engine does not take, and a finding for each.

    `-c 32k` is taken as it is meant.
    """
    findings: list[Finding] = []
    options: list[Option] = []
    for option in command.options:
        meant = _thousands(option)
        if meant:
            text = f"{option.spelling} {option.value} is not a whole number and is read as "
            text += f"{(option.value or '')[:-1]}: write {meant}, as it is taken here"
            findings.append(Finding("error", text))
            options.append(replace(option, value=str(meant)))
            continue
        wrong = _unreadable(option, engine)
        if wrong:
            findings.append(Finding("error", f"{wrong}; taken as not given here"))
        else:
            options.append(option)
    return replace(command, options=tuple(options)), findings


def clean(command: CommandLine, n_gpus: int) -> tuple[CommandLine, list[Finding]]:
    """Return the command without what names GPUs that are not there, and a finding for each.

    That is overrides that no engine takes, and a main GPU beyond those that it sees.
    """
    findings: list[Finding] = []
    options: list[Option] = []
    number = 0
    for option in command.options:
        if option.name == "mg" and command.value("sm") == "none" and n_gpus:
            try:
                main_gpu(command, n_gpus)
            except UsageError as err:
                findings.append(Finding("error", f"{err}; taken as not given here"))
                continue
        if option.name == "ts" and n_gpus:
            findings += _idle_shares(option, n_gpus)
        if option.name != "ot":
            options.append(option)
            continue
        good: list[str] = []
        for override in split_overrides(option.value or ""):
            number += 1
            wrong = _refused(override, n_gpus)
            if wrong:
                findings.append(Finding("error", f"rule {number}: {wrong}", number))
            else:
                good.append(f"{override.pattern}={override.buffer}")
        if good:
            options.append(replace(option, value=",".join(good)))
    return replace(command, options=tuple(options)), findings


def engine_findings(command: CommandLine, model: Model, settings: Settings) -> list[Finding]:
    """Flags that this engine build refuses, ignores, or sets behind one's back."""
    build, is_ik = settings.build, settings.engine == "ik"
    found = [Finding("error", p) for p in command.problems]
    h = model.hparams
    if is_ik:
        for name, date in (("fmoe", FMOE_GONE), ("ooae", FMOE_GONE)):
            if command.has(name) and build >= date:
                text = f"-{name} is an unknown argument in ik builds since {date}: on by default"
                found.append(Finding("error", f"{text}, leave it out"))
    else:
        given = [n for n in _IK_ONLY if command.has(n)]
        if given:
            text = ", ".join(f"-{n}" for n in given)
            found.append(Finding("error", f"mainline does not know {text}: flags of ik_llama.cpp"))
    needs_value = _FA_NEEDS_VALUE[settings.engine]
    if command.has("fa") and command.value("fa") is None and build >= needs_value:
        text = f"bare -fa takes the next argument as its value in builds since {needs_value}"
        found.append(Finding("error", f"{text}: write -fa on"))
    if not h.is_mla and command.has("mla"):
        found.append(Finding("note", "-mla does nothing here: the model has no latent attention"))
    if not h.is_mla and command.has("amb") and settings.fa:
        found.append(
            Finding("note", "-amb does nothing here: with -fa it is for latent attention only")
        )
    if needs_flash_attention(settings):
        text = f"-ctv {settings.ctv} needs flash attention, which is off: no engine starts so"
        found.append(Finding("error", f"{text}; write -fa on, or -ctv f16"))
    found += _context_findings(command, model, settings)
    batch, ubatch = _batches(command)
    if ubatch > batch:
        text = f"-ub {ubatch} is more than -b {batch}, and the engine uses {batch}"
        found.append(Finding("warning", f"{text}: write -b {ubatch} too"))
    found += _split_findings(command, settings.engine)
    found += _unknown_findings(command)
    if h.is_mla and settings.mla and settings.fa and command.has("ctv") and is_ik:
        found.append(Finding("note", "-ctv does nothing here: latent attention caches K only"))
    if command.has("ser"):
        found.append(Finding("warning", "-ser drops experts: it changes what the model says"))
    if not command.has("cram") and settings.cram_mib:
        text = f"-cram is not given: the server takes up to {settings.cram_mib} MiB of RAM"
        found.append(Finding("note", f"{text} for its prompt cache; -cram 0 turns it off"))
    if command.value("cram") == "-1":
        text = "-cram -1 sets no limit to the server's prompt cache: RAM is counted without it"
        found.append(Finding("warning", f"{text}; write -cram 0 or a number of MiB"))
    if not is_ik and build >= FIT and not command.has("fit"):
        text = "-fit is on by default and may change context and layout"
        found.append(Finding("note", f"{text} unless -ngl, -ts or -ot is given; write -fit off"))
    if "CUDA_VISIBLE_DEVICES" in command.env and "CUDA_DEVICE_ORDER" not in command.env:
        text = "without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA numbers cards fastest first and not as"
        found.append(Finding("warning", f"{text} nvidia-smi does: indices may mean other cards"))
    return found


def needs_flash_attention(settings: Settings) -> bool:
    """Whether the engine refuses these settings: a quantized V cache without flash attention."""
    kind = table(settings.engine).get(settings.ctv)
    return not settings.fa and kind is not None and kind.is_quantized


def _opened(command: CommandLine, settings: Settings) -> int:
    """Tokens of context that the engine opens, 0 for as many as the model was trained with."""
    given = command.integer("c")
    if given is not None:
        return given
    old_mainline = settings.engine == "mainline" and settings.build < FIT
    return _OLD_MAINLINE_CTX if old_mainline else 0


def _batches(command: CommandLine) -> tuple[int, int]:
    """Batch and ubatch as given; engines use the smaller of both as ubatch, `-ub 0` means `-b`."""
    batch, ubatch = command.integer("b") or 2048, command.integer("ub")
    return batch, 512 if ubatch is None else ubatch or batch


def _thousands(option: Option) -> int:
    """Tokens that a `-c 32k` means, 0 for any other option."""
    if option.name not in ("c", "b", "ub") or not re.fullmatch(r"\d{1,6}[kK]", option.value or ""):
        return 0
    return int((option.value or "")[:-1]) * 1024


def _integer(command: CommandLine, name: str, default: int) -> int:
    value = command.integer(name)
    return default if value is None else value


def _unreadable(option: Option, engine: Engine) -> str:
    """Why the engine does not take an option's number; empty when it does."""
    value = option.value
    if value is None or (engine == "mainline" and (option.name, value) in _MAINLINE_WORDS):
        return ""
    given = f"{option.spelling} {value if len(value) <= 40 else value[:40] + '…'}"
    if option.name == "ts":
        return "" if are_shares(value) else f"{given} is no list of shares like 60,40"
    if option.name not in _NUMBERS:
        return ""
    if not re.fullmatch(r"-?[0-9]+", value):
        return f"{given} is not a whole number"
    least, most = _NUMBERS[option.name]
    if len(value) > 11 or abs(int(value)) > _INT32_MAX:
        return f"{given} is too large"
    if int(value) < least:
        return f"{given} must be {least} or more"
    return f"{given} must be {most} or less" if int(value) > most else ""


def _context_findings(command: CommandLine, model: Model, settings: Settings) -> list[Finding]:
    """What a missing `-c`, or `-c 0`, opens; a context beyond the trained one."""
    if command.integer("c"):
        return [Finding("warning", text) for text in beyond_training(model, settings)]
    given = "-c 0" if command.integer("c") == 0 else "no -c"
    trained = model.hparams.ctx_train
    if command.integer("c") is None and trained and _fits_itself(command, settings):
        text = f"{given}: -fit chooses the context, at most the {trained} tokens counted here"
    elif _opened(command, settings):
        text = f"{given}: this build opens {settings.ctx} tokens"
    elif trained:
        text = f"{given}: the engine opens the trained context, {trained} tokens"
    else:
        text = f"{given}: the engine opens the trained context, which is not known here"
        text += f"; {settings.ctx} tokens are assumed"
    return [Finding("note", f"{text}; write -c N for another")]


def _fits_itself(command: CommandLine, settings: Settings) -> bool:
    """Whether mainline adapts context and layout: -fit is on and no flag of layout is given."""
    if settings.engine == "ik" or settings.build < FIT or command.value("fit") == "off":
        return False
    return not any(command.has(name) for name in ("ngl", "ts", "ot", "cmoe", "ncmoe"))


def _split_findings(command: CommandLine, engine: Engine) -> list[Finding]:
    """A `-sm` that the engine does not know, or that is not followed here."""
    mode = command.value("sm")
    if mode is None or mode in _FOLLOWED_MODES:
        return []
    known = _SPLIT_MODES[engine]
    if mode not in known:
        text = f"{engine} does not know -sm {mode}: it takes {', '.join(known)}"
        return [Finding("error", f"{text}; taken as layer here")]
    text = f"-sm {mode} spreads each layer over the GPUs, which is not modelled"
    if mode == "row":
        gone = "ik dropped it" if engine == "ik" else "it is deprecated"
        text = f"{text} ({gone} in newer builds)"
    return [Finding("warning", f"{text}: everything here is for -sm layer")]


def _unknown_findings(command: CommandLine) -> list[Finding]:
    """Flags that are not judged, as they are not known here."""
    flags = dict.fromkeys(o.spelling for o in command.options if o.name == o.spelling)
    if not flags:
        return []
    text = f"not known here, so not judged, and kept in a better line: {', '.join(flags)}"
    return [Finding("note", text)]


def _idle_shares(option: Option, n_gpus: int) -> list[Finding]:
    """Shares of a `-ts` beyond the GPUs, which both engines pass over."""
    n = len(CommandLine((option,)).tensor_split)
    if n <= n_gpus:
        return []
    gpus = "1 GPU" if n_gpus == 1 else f"{n_gpus} GPUs"
    text = f"{option.spelling} {option.value} has {n} shares, and the engine sees {gpus}"
    return [Finding("warning", f"{text}: only the first {n_gpus} count")]


def _refused(override: Override, n_gpus: int) -> str:
    """Why no engine takes an override; empty when it does."""
    if not override.buffer:
        return (
            f"{override.pattern!r} has no =BUFFER; -ot is split at every comma, so a pattern "
            "cannot hold one (no {1,3})"
        )
    try:
        buffer_home(override.buffer, n_gpus)
    except UsageError as err:
        return str(err)
    if re.search(r"\(\?(?![:=!])", override.pattern):
        return f"{override.pattern!r} uses a group that std::regex does not know"
    try:
        re.compile(override.pattern)
    except re.error as err:
        return f"{override.pattern!r} is not a regex ({err}): the engine stops"
    return ""
