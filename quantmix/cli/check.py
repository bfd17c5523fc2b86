"""`quantmix check`: prove a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="check",
        help="Prove a recipe: rules matched back, sizes, fit, and the engine's own dry run.",
        epilog="Example: quantmix check recipes/deepseek-r1-192G",
    )(answer_errors(check))


def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe folder or recipe.json.")],
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also ask mainline's libllama for memory figures.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Load, check, print."""
    from quantmix.engine.ghost import check as run_check
    from quantmix.engine.ghost import model_of
    from quantmix.errors import CheckFailed
    from quantmix.recipe import load

    loaded = load(recipe)
    model = model_of(loaded)
    result = run_check(loaded, model)
    document = result.to_json()
    document["devices"] = loaded.to_json()["devices"]
    document["problems"] = [{"tensor": p.tensor, "problem": p.problem} for p in result.problems]
    asked: Any = None
    if oracle:
        from quantmix.engine.oracle import check_recipe

        asked = check_recipe(loaded, model)
        document["oracle"] = asked.to_json()
        document["ok"] = bool(document["ok"] and asked.ok)
    if as_json:
        print_json(document)
    if not quiet:
        out = console()
        engine = result.engine or f"no engine ({result.note})"
        out.print(
            f"{loaded.name}: {engine}, {result.tensors_compared} tensors, "
            f"{result.types_differing} types and {result.bytes_differing} sizes differing, "
            f"{result.print_mismatches} prints off; rules matched back: "
            f"{'yes' if result.rules_matched_back else 'no'}"
        )
        for p in result.problems[:20]:
            out.print(f"  {p.tensor}: {p.problem}")
        if asked is not None:
            out.print(str(asked))
    if not result.ok:
        raise CheckFailed(f"{loaded.name} does not hold: {len(result.problems)} problems")
    if not document["ok"]:
        raise CheckFailed(
            f"{loaded.name} does not hold: the oracle counts other memory than planned"
        )
