"""`quantmix clone` and `quantmix import`: recipes from what exists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, one_of, print_json

if TYPE_CHECKING:
    from quantmix.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command(
        name="clone",
        help="Make a recipe with the types of an existing GGUF.",
        epilog="Example: quantmix clone ./GLM-4.6-IQ2_KL-00001-of-00003.gguf --out recipes",
    )(answer_errors(clone))
    app.command(
        name="import",
        help="Make a recipe of another tool's `regex=type` file: first match wins.",
        epilog="Example: quantmix import ./mix.recipe --model glm-4.5-air",
    )(answer_errors(import_))


def clone(
    gguf: Annotated[str, typer.Argument(help="GGUF file, any shard, a folder of shards, or URL.")],
    engine: Annotated[
        str, typer.Option(help="Which engine shall write it: ik or mainline.")
    ] = "ik",
    out: Annotated[Path, typer.Option(help="Folder for recipes.")] = Path("recipes"),
    name: Annotated[str | None, typer.Option(help="Name of the recipe.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Read the types of a file."""
    from quantmix import clone as cloning
    from quantmix.ggml.types import ENGINES
    from quantmix.models.sources import load_model

    recipe = cloning.clone(load_model(gguf), one_of("engine", engine, ENGINES), name or "")
    _finish(recipe, out, as_json, quiet)


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="File of regex=type lines, a script or pasted command with --custom-q or "
            "--tensor-type, or a .csv of KLD per tensor."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model it is for (default: the one the file names).")
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="Type of tensors that no rule matches.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Which engine shall write it: ik or mainline.")
    ] = "ik",
    layout: Annotated[
        str | None, typer.Option(help="MLA layout (default: the one the rules speak of).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for recipes.")] = Path("recipes"),
    name: Annotated[str | None, typer.Option(help="Name of the recipe.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Resolve the rules of a file, or turn a table of KLD per tensor into measurements."""
    if file.suffix == ".csv":
        _import_table(file, model, out, as_json, quiet)
        return
    from quantmix import clone as cloning
    from quantmix.errors import UsageError
    from quantmix.ggml.types import ENGINES
    from quantmix.models.sources import load_model
    from quantmix.rule_lines import taken_by_accident

    spec = model or cloning.model_named_in(file)
    if spec is None:
        raise UsageError(f"{file} names no model that is known here: say which with --model")
    known = one_of("engine", engine, ENGINES)
    loaded = load_model(spec, layout=layout or cloning.layout_named_in(file))
    recipe = cloning.import_rules(file, loaded, known, default=default, name=name or "")
    for line in taken_by_accident(cloning.read_rules(file).splitlines(), loaded, known):
        console(quiet).print(f"warning: {line}")
    _finish(recipe, out, as_json, quiet)


def _import_table(file: Path, model: str | None, out: Path, as_json: bool, quiet: bool) -> None:
    """Write the measurements file that `design --measurements` reads."""
    from quantmix import measurements
    from quantmix.errors import UsageError
    from quantmix.models.sources import load_model
    from quantmix.table_import import import_table

    if model is None:
        raise UsageError(f"{file} is a table of KLD per tensor: say its model with --model")
    found = import_table(file, load_model(model))
    target = out if out.suffix == ".json" else out / f"{found.model_name}.measurements.json"
    measurements.save(found, target)
    if as_json:
        print_json({"measurements": str(target), "probes": len(found.probes)})
    console(quiet).print(f"{len(found.probes)} probes of {found.model_name} written to {target}")


def _finish(recipe: Recipe, out: Path, as_json: bool, quiet: bool) -> None:
    """Save the recipe and tell."""
    from quantmix.emit.folder import write_folder
    from quantmix.units import gib

    written = write_folder(recipe, out / recipe.name)
    if as_json:
        doc = recipe.to_json()
        del doc["tensors"]
        print_json({**doc, "recipe": str(written.folder), "notes": list(written.notes)})
        return
    show = console(quiet)
    show.print(
        f"{recipe.name}: {gib(recipe.size.tensor_bytes)}, {recipe.size.bpw:.3f} bpw, "
        f"{len(recipe.rules)} rules, predicted damage {recipe.quality.damage:.4f} nats"
    )
    show.print(f"written to {written.folder}")
    for note in written.notes:
        show.print(f"note: {note}")
