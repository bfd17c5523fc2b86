"""`quantmix report design|sweep|compare`: self-contained pages and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json

DbFlag = Annotated[
    Path | None, typer.Option("--db", help="Store of measurements (default: QUANTMIX_DB).")
]
PlotFlag = Annotated[
    Path | None, typer.Option("--plot", help="Also write the curve as .png or .svg.")
]
NoFrontier = Annotated[
    bool, typer.Option("--no-frontier", help="Leave the predicted frontier out.")
]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Pages that open from disk: one design, a sweep over sizes, recipes side by side.",
        epilog="Example: quantmix report sweep recipes/ --out reports/sweep.html",
    )
    group.command(
        "design",
        help="One recipe: perplexity against size, memory, types by layer, damage, proof.",
        epilog="Example: quantmix report design recipes/deepseek-r1-192G",
    )(answer_errors(design))
    group.command(
        "sweep",
        help="All recipes below a folder, or a store of measurements, model by model.",
        epilog="Example: quantmix report sweep recipes/ --model deepseek-r1 --plot r1.svg",
    )(answer_errors(sweep))
    group.command(
        "compare",
        help="Recipes of one model side by side.",
        epilog="Example: quantmix report compare recipes/r1-192G recipes/r1-256G",
    )(answer_errors(compare))
    app.add_typer(group, name="report")


def design(
    recipe: Annotated[Path, typer.Argument(help="A recipe folder or its recipe.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The page (default: report.html beside recipe.json).")
    ] = None,
    plot: PlotFlag = None,
    db: DbFlag = None,
    no_frontier: NoFrontier = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Gather, draw, write."""
    from quantmix.report import build, pages

    document = build.design(recipe, db=db, frontier=not no_frontier)
    folder = recipe if recipe.is_dir() else recipe.parent
    target = out or folder / "report.html"
    _finish(
        document, pages.design_page(document), target, plot, document["section"], as_json, quiet
    )


def sweep(
    place: Annotated[Path, typer.Argument(help="A folder of recipes, or a store.")],
    model: Annotated[
        str | None, typer.Option(help="Only this model (catalog name or GGUF).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("reports/sweep.html"),
    plot: PlotFlag = None,
    db: DbFlag = None,
    no_frontier: NoFrontier = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Gather, draw, write."""
    from quantmix.report import build, pages

    document = build.sweep(place, model=model, db=db, frontier=not no_frontier)
    section = document["sections"][0]
    _finish(document, pages.sweep_page(document), out, plot, section, as_json, quiet)


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Two recipes or more of one model.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("reports/compare.html"),
    plot: PlotFlag = None,
    db: DbFlag = None,
    no_frontier: NoFrontier = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Gather, draw, write."""
    from quantmix.report import build, pages

    document = build.compare(recipes, db=db, frontier=not no_frontier)
    page = pages.compare_page(document)
    _finish(document, page, out, plot, document["section"], as_json, quiet)


def _finish(
    document: dict[str, Any],
    page: str,
    out: Path,
    plot: Path | None,
    section: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the page, and the plot of `section` when asked for; say where they are."""
    from quantmix.files import write_text

    if plot is not None:
        from quantmix.report import figures

        figures.save_curve(section, plot)
    write_text(out, page)
    if as_json:
        where = {"page": str(out), "plot": str(plot) if plot else None}
        print_json({**where, "document": document})
    console(quiet).print(f"Written  {out}" + (f", {plot}" if plot else ""))
