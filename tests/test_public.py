"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import quantmix


def test_public_names_are_exactly_these() -> None:
    """Adding or dropping a public name is a decision, so it shows here."""
    assert sorted(quantmix.__all__) == [
        "Budget",
        "Model",
        "QuantmixError",
        "Recipe",
        "__version__",
        "check",
        "design",
        "load_model",
        "load_recipe",
    ]


def test_every_public_name_loads() -> None:
    """Names are loaded on first use, and all of them exist."""
    for name in quantmix.__all__:
        assert getattr(quantmix, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import quantmix` and the command's help pull in neither numpy nor scipy nor matplotlib."""
    code = (
        "import sys; import quantmix.cli.main as m; m._register(); "
        "print([x for x in ('numpy','scipy','matplotlib','gguf','rich') if x in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
