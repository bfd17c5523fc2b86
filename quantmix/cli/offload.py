"""`quantmix offload`: placement and flags for a file that exists, or pasted flags explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli import options
from quantmix.cli.common import (
    JsonFlag,
    QuietFlag,
    answer_errors,
    console,
    print_json,
    print_out,
    print_table,
)

if TYPE_CHECKING:
    from quantmix.explain import Explanation
    from quantmix.memory.settings import Settings
    from quantmix.models.model import Model
    from quantmix.offload import OffloadPlan, StoredModel
    from quantmix.request import Request

_NOT_OF_THE_REQUEST = ("at", "lint", "measured", "as_json", "quiet")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "offload",
        help="Where to put a file that already exists, and the flags; or explain pasted flags.",
        epilog=(
            "Example: quantmix offload deepseek-r1 --at iq4_ks --rig 2x5090-2x4090-512g "
            "--lint '-ngl 63 -ot \"blk\\.[3-4]\\.ffn_.*=CUDA0\" -ot exps=CPU'"
        ),
    )(offload)


@answer_errors
def offload(
    model: options.ModelName,
    gpus: options.Gpus = None,
    rig: options.RigName = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ram_reserve: options.RamReserve = None,
    reserve: options.Reserve = None,
    desktop: options.Desktop = False,
    cpu: options.Cpu = None,
    cpu_cores: options.CpuCores = None,
    at: Annotated[
        str | None,
        typer.Option(help="Models without a file: every matrix at this type, or a preset's mix."),
    ] = None,
    engine: options.Engine = "ik",
    engine_build: options.EngineBuild = None,
    ctx: options.Ctx = "32768",
    ctk: options.Ctk = "f16",
    ctv: options.Ctv = None,
    ubatch: options.Ubatch = None,
    batch: options.Batch = None,
    profile: options.Profile = None,
    parallel: options.Parallel = 1,
    mla: options.Mla = 3,
    amb: options.Amb = 256,
    nkvo: options.Nkvo = False,
    mtp: options.Mtp = False,
    layout: options.Layout = None,
    lint: Annotated[
        str | None, typer.Option(help="Pasted command line or flags to explain.")
    ] = None,
    measured: Annotated[
        float | None, typer.Option(help="Tokens/s that the pasted line reached: calibrates.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Parse, call, print."""
    asked: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_OF_THE_REQUEST}
    from quantmix.errors import UsageError
    from quantmix.models.sources import load_model
    from quantmix.request import Request

    if measured is not None and lint is None:
        raise UsageError("--measured is the speed of a pasted line: give it with --lint")
    loaded = load_model(model, layout=layout)
    request = Request(**asked)
    if lint is not None:
        _lint(loaded, request, lint, at, measured, as_json, quiet)
    else:
        _place(loaded, request, at, as_json, quiet)


def _place(loaded: Model, request: Request, at: str | None, as_json: bool, quiet: bool) -> None:
    from quantmix.budget_flags import require_machine
    from quantmix.flag_texts import parse_ctx
    from quantmix.offload import place, place_longest, stored
    from quantmix.request import budget_of

    require_machine(request)
    budget, _ = budget_of(request, is_mla=loaded.hparams.is_mla)
    assert budget.rig is not None
    settings = budget.settings
    file = stored(loaded, settings.engine, at)
    if parse_ctx(request.ctx) is None:
        settings, plan = place_longest(file, budget.rig, settings)
    else:
        plan = place(file, budget.rig, settings)
    _placed(plan, file, settings, as_json, quiet)


def _lint(
    loaded: Model,
    request: Request,
    text: str,
    at: str | None,
    measured: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from dataclasses import replace

    from quantmix.budget_flags import names_a_machine
    from quantmix.emit.cmdline import parse_text
    from quantmix.explain import explain, guessed
    from quantmix.offload import stored
    from quantmix.request import budget_of

    known = names_a_machine(request)
    budget, _ = budget_of(
        request if known else replace(request, vram="1G"), is_mla=loaded.hparams.is_mla
    )
    engine = budget.settings.engine
    if at is None and loaded.header_bytes is None:
        file, named = guessed(loaded, parse_text(text).value("model") or "", engine)
    else:
        file, named = stored(loaded, engine, at), None
    machine = budget.rig if known else None
    found = explain(text, file, machine, budget.settings, measured_tps=measured)
    _explained(found, file, named, as_json, quiet)


def _placed(
    plan: OffloadPlan, file: StoredModel, settings: Settings, as_json: bool, quiet: bool
) -> None:
    if as_json:
        print_json({**_head(file, settings), **_plan_json(plan, file)})
        return
    out = console(quiet)
    _device_table(plan.devices, out, plan.holds)
    _speed_line(plan.speed, out)
    for warning in plan.warnings:
        _styled_line(out, "warning", "yellow", warning)
    for note in plan.flags.notes:
        out.print(note, style="dim")
    print_out(_shell(plan, file))


def _explained(
    found: Explanation, file: StoredModel, named: str | None, as_json: bool, quiet: bool
) -> None:
    from dataclasses import asdict

    if as_json:
        better = None
        if found.better is not None:
            better = {
                **_plan_json(found.better, file),
                "line": found.better_line,
                "gain": found.gain,
            }
        print_json(
            {
                **_head(file, found.settings),
                "assumed_type": named,
                "findings": [asdict(f) for f in found.findings],
                "rules": [asdict(r) for r in found.rules],
                "devices": [{**asdict(d), "holds": found.holds[d.name]} for d in found.devices],
                "speed": asdict(found.speed),
                "better": better,
            }
        )
        return
    out = console(quiet)
    if named:
        text = f"types taken as {named} from the file name; name the GGUF for the truth"
        out.print(text, style="dim")
    _rule_table(found, out)
    _device_table(found.devices, out, found.holds)
    _speed_line(found.speed, out)
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in found.findings:
        _styled_line(out, finding.severity, colours[finding.severity], finding.text)
    if found.better is not None:
        faster = f", predicted {found.gain:.2f}x as fast" if found.gain else ""
        out.print(f"\nbetter{faster}:")
        _device_table(found.better.devices, out, found.better.holds)
        print_out(found.better_line)


def _head(file: StoredModel, settings: Settings) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": {"id": file.model.id, "arch": file.model.arch, "source": file.model.source},
        "settings": asdict(settings),
        "size": {"tensor_bytes": file.tensor_bytes},
    }


def _plan_json(plan: OffloadPlan, file: StoredModel) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "devices": [{**asdict(d), "holds": plan.holds[d.name]} for d in plan.devices],
        "speed": asdict(plan.speed),
        "offload": {"flags": plan.flags.flags, "env": plan.flags.env},
        "line": _shell(plan, file),
        "warnings": list(plan.warnings),
        "notes": list(plan.flags.notes),
    }


def _shell(plan: OffloadPlan, file: StoredModel) -> str:
    from quantmix.emit.scripts import shell_line
    from quantmix.models.sources import first_file

    command = ["llama-server", "-m", first_file(file.model) or "MODEL", *plan.flags.flags]
    return shell_line(plan.flags.env, command)


def _rule_table(found: Explanation, out: Any) -> None:
    from rich.table import Table

    if not found.rules:
        return
    table = Table("rule", "pattern", "to", "matches", "moves", "layers", title="overrides")
    for r in found.rules:
        what = (r.option or r.pattern, r.buffer)
        cells = (str(r.number), *what, str(r.matched), str(r.won), r.layers or "-")
        table.add_row(*cells)
    print_table(out, table)


def _device_table(devices: Any, out: Any, holds: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from quantmix.units import gib

    table = Table("device", "weights", "KV", "buffers", "reserve", "free", "holds")
    for d in devices:
        free = "?" if d.free_bytes is None else gib(d.free_bytes)
        table.add_row(
            d.name,
            gib(d.weights_bytes + d.derived_bytes),
            gib(d.kv_bytes),
            gib(d.compute_bytes),
            gib(d.reserve_bytes),
            Text(free, "red" if (d.free_bytes or 0) < 0 else ""),
            holds.get(d.name, ""),
        )
    print_table(out, table)


def _speed_line(speed: Any, out: Any) -> None:
    if speed.tg_tps is None:
        text = "speed unknown: name the cards and, where weights lie in RAM, the CPU (--cpu) as"
        out.print(f"{text} `quantmix rigs` lists them", style="dim")
        return
    out.print(f"speed: {speed}", markup=False)


def _styled_line(out: Any, head: str, style: str, text: str) -> None:
    from rich.text import Text

    out.print(Text.assemble((head, style), f" {text}"))
