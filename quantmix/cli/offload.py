"""`quantmix offload`: placement and flags for a file that exists, or pasted flags explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json

if TYPE_CHECKING:
    from quantmix.explain import Explanation
    from quantmix.memory.settings import Settings
    from quantmix.offload import OffloadPlan, StoredModel
    from quantmix.rig.device import Rig


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
    model: Annotated[
        str, typer.Argument(help="GGUF file or folder, URL, hf:org/name, or a catalog name.")
    ],
    gpus: Annotated[str | None, typer.Option(help="Cards in CUDA order: 2xrtx-5090,1x24G.")] = None,
    rig: Annotated[str | None, typer.Option(help="A rig by name, or a TOML file.")] = None,
    vram: Annotated[str | None, typer.Option(help="One idealised GPU of that many bytes.")] = None,
    ram: Annotated[str | None, typer.Option(help="Installed RAM; without it, GPUs only.")] = None,
    ram_reserve: Annotated[str | None, typer.Option(help="RAM to leave alone.")] = None,
    reserve: Annotated[str | None, typer.Option(help="Bytes to leave alone on every GPU.")] = None,
    desktop: Annotated[bool, typer.Option(help="The first GPU also drives a desktop.")] = False,
    at: Annotated[
        str | None, typer.Option(help="Take every matrix at this type (models without a file).")
    ] = None,
    engine: Annotated[str, typer.Option(help="ik or mainline.")] = "ik",
    engine_build: Annotated[
        str | None, typer.Option(help="Date of the engine build, e.g. 2025-06-16.")
    ] = None,
    ctx: Annotated[int, typer.Option(help="Context, all slots together.")] = 32768,
    ctk: Annotated[str, typer.Option(help="Type of the K cache.")] = "f16",
    ctv: Annotated[str, typer.Option(help="Type of the V cache.")] = "f16",
    ubatch: Annotated[int, typer.Option(help="-ub")] = 512,
    batch: Annotated[int, typer.Option(help="-b")] = 2048,
    parallel: Annotated[int, typer.Option(help="Server slots.")] = 1,
    mla: Annotated[int, typer.Option(help="ik's -mla for latent attention.")] = 3,
    amb: Annotated[int, typer.Option(help="ik's -amb in MiB.")] = 256,
    nkvo: Annotated[bool, typer.Option(help="KV cache in RAM.")] = False,
    mtp: Annotated[bool, typer.Option(help="Load and run the MTP block (ik).")] = False,
    layout: Annotated[str | None, typer.Option(help="MLA layout: split, ik or legacy.")] = None,
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
    from quantmix.budget import make_settings
    from quantmix.emit.cmdline import parse_text
    from quantmix.errors import UsageError
    from quantmix.explain import explain, type_in_name
    from quantmix.models.sources import load_model
    from quantmix.offload import place, stored

    settings = make_settings(
        engine=engine,
        build=engine_build,
        ctx=ctx,
        ctk=ctk,
        ctv=ctv,
        ubatch=ubatch,
        batch=batch,
        parallel=parallel,
        mla=mla,
        amb=amb,
        nkvo=nkvo,
        mtp=mtp,
    )
    machine = _rig(gpus, rig, vram, ram, ram_reserve, reserve, desktop)
    loaded = load_model(model, layout=layout)
    named = None
    if lint is not None and at is None and loaded.header_bytes is None:
        named = type_in_name(parse_text(lint).value("model") or "", settings.engine)
    file = stored(loaded, settings.engine, at or named)
    if lint is not None:
        found = explain(lint, file, machine, settings, measured_tps=measured)
        _explained(found, file, named, as_json, quiet)
        return
    if measured is not None:
        raise UsageError("--measured is the speed of a pasted line: give it with --lint")
    if machine is None:
        raise UsageError("say which devices: --gpus, --rig or --vram, and --ram for what is behind")
    _placed(place(file, machine, settings), file, settings, as_json, quiet)


def _rig(
    gpus: str | None,
    rig: str | None,
    vram: str | None,
    ram: str | None,
    ram_reserve: str | None,
    reserve: str | None,
    desktop: bool,
) -> Rig | None:
    """The rig of exactly one of the three flags, None when none was given."""
    from quantmix.budget import with_ram
    from quantmix.errors import UsageError
    from quantmix.rig.rigs import ideal_rig, load_rig, parse_gpus
    from quantmix.units import parse_size

    given = [x for x in (gpus, rig, vram) if x is not None]
    if len(given) > 1:
        raise UsageError("give one of --gpus, --rig and --vram, not several")
    if not given:
        return None
    if gpus is not None:
        base = parse_gpus(gpus)
    elif rig is not None:
        base = load_rig(rig)
    else:
        base = ideal_rig(parse_size(given[0], "--vram"))
    return with_ram(base, ram, ram_reserve, reserve, desktop)


def _placed(
    plan: OffloadPlan, file: StoredModel, settings: Settings, as_json: bool, quiet: bool
) -> None:
    if as_json:
        print_json({**_head(file, settings), **_plan_json(plan)})
        return
    out = console(quiet)
    _device_table(plan.devices, out, plan.holds)
    _speed_line(plan.speed, out)
    for warning in plan.warnings:
        out.print(f"[yellow]warning[/] {_plain(warning)}")
    for note in plan.flags.notes:
        out.print(f"[dim]{_plain(note)}[/]")
    print(_shell(plan))


def _explained(
    found: Explanation, file: StoredModel, named: str | None, as_json: bool, quiet: bool
) -> None:
    from dataclasses import asdict

    if as_json:
        better = None
        if found.better is not None:
            better = {
                **_plan_json(found.better),
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
        out.print(f"[dim]types taken as {named} from the file name; name the GGUF for the truth[/]")
    _rule_table(found, out)
    _device_table(found.devices, out, found.holds)
    _speed_line(found.speed, out)
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in found.findings:
        out.print(f"[{colours[finding.severity]}]{finding.severity}[/] {_plain(finding.text)}")
    if found.better is not None:
        faster = f", predicted {found.gain:.2f}x as fast" if found.gain else ""
        out.print(f"\nbetter{faster}:")
        _device_table(found.better.devices, out, found.better.holds)
        print(found.better_line)


def _head(file: StoredModel, settings: Settings) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": {"id": file.model.id, "arch": file.model.arch, "source": file.model.source},
        "settings": asdict(settings),
        "size": {"tensor_bytes": file.tensor_bytes},
    }


def _plan_json(plan: OffloadPlan) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "devices": [{**asdict(d), "holds": plan.holds[d.name]} for d in plan.devices],
        "speed": asdict(plan.speed),
        "offload": {"flags": plan.flags.flags, "env": plan.flags.env},
        "line": _shell(plan),
        "warnings": list(plan.warnings),
        "notes": list(plan.flags.notes),
    }


def _shell(plan: OffloadPlan) -> str:
    import shlex

    env = [f"{k}={shlex.quote(v)}" for k, v in plan.flags.env.items()]
    return " ".join([*env, "llama-server", *(shlex.quote(f) for f in plan.flags.flags)])


def _rule_table(found: Explanation, out: Any) -> None:
    from rich.table import Table

    if not found.rules:
        return
    table = Table("rule", "pattern", "to", "matches", "moves", "layers", title="overrides")
    for r in found.rules:
        cells = (str(r.number), r.pattern, r.buffer, str(r.matched), str(r.won), r.layers or "-")
        table.add_row(*(_plain(c) for c in cells))
    out.print(table)


def _device_table(devices: Any, out: Any, holds: dict[str, str]) -> None:
    from rich.table import Table

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
            f"[red]{free}[/]" if (d.free_bytes or 0) < 0 else free,
            holds.get(d.name, ""),
        )
    out.print(table)


def _speed_line(speed: Any, out: Any) -> None:
    if speed.tg_tps is None:
        out.print("[dim]speed: bandwidth of a card or of the RAM is not known[/]")
        return
    prompt = f", prompts about {speed.pp_tps:.0f}" if speed.pp_tps else ""
    out.print(
        f"speed: {speed.tg_tps:.1f} tokens/s ({speed.tg_low:.1f} to {speed.tg_high:.1f}){prompt}"
    )


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
