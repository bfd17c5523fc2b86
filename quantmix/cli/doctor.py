"""`quantmix doctor`: which engines are here, what they can do, what this machine has."""

from __future__ import annotations

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="doctor",
        help="Find engines and devices, and say what can be done with them.",
        epilog="Example: quantmix doctor --json",
    )(answer_errors(doctor))


def doctor(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Look, print."""
    from quantmix.engine.health import examine

    findings = examine()
    if as_json:
        print_json({"findings": [f.to_json() for f in findings]})
    if quiet:
        return
    from rich.text import Text

    out = console()
    for f in findings:
        mark = ("ok   ", "green") if f.ok else ("none ", "yellow")
        out.print(Text.assemble(mark, (f.name, "bold"), f"  {f.detail}"))
        if f.mend:
            out.print(f"     {f.mend}", style="dim")
