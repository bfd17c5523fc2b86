"""The `quantmix` command: registers one module per command, imports nothing heavy."""

from __future__ import annotations

import importlib
import sys

import typer

app = typer.Typer(
    name="quantmix",
    help="Which quantization mix fits this VRAM and RAM, how good is it, how do I launch it?",
    epilog="Example: quantmix design deepseek-r1 --vram 192G",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# One module per command, in the order of the help page. Each has `register(app)`.
_MODULES = (
    "design",
    "check",
    "quantize",
    "imatrix",
    "verify",
    "measure",
    "refine",
    "batch",
    "predict",
    "frontier",
    "report",
    "clone",
    "diff",
    "offload",
    "choose",
    "inspect",
    "models",
    "types",
    "rigs",
    "doctor",
    "credits",
    "backtest",
    "demo_model",
    "fetch_corpus",
)


def _register() -> None:
    for module in _MODULES:
        importlib.import_module(f"quantmix.cli.{module}").register(app)


def main() -> None:
    """Entry point of the console script."""
    _register()
    app(args=sys.argv[1:])


if __name__ == "__main__":
    main()
