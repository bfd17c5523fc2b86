"""A lower layer never imports a higher one (docs/architecture.md, layers)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import quantmix

ROOT = Path(quantmix.__file__).parent

LAYERS = (
    ("__init__", "errors", "sources"),
    ("units", "files", "solve", "store"),
    ("ggml", "rig", "measurements", "demo", "texts"),
    ("models",),
    ("memory", "rule_lines", "table_import"),
    ("budget", "loss", "mtp", "speed"),
    ("palette",),
    ("flag_texts", "search"),
    ("options", "recipe"),
    ("emit",),
    ("assemble", "engine"),
    (
        "loss.fit",
        "anchor",
        "answer",
        "clone",
        "frontier",
        "measure",
        "offers",
        "offload",
        "predict",
    ),
    ("compare", "explain", "feasible", "verify"),
    ("design", "refine", "report"),
    ("choose", "inverse"),
    ("budget_flags",),
    ("request",),
    ("batch",),
    ("cli",),
)
"""From the lowest up; a package is one name. Those of one layer do not import each other either."""

LAZY = {("recipe", "emit")}
"""`Recipe.save` of the public interface, loaded when called."""


def unit(module: str) -> str:
    """Return the name in LAYERS that a module belongs to."""
    parts = module.split(".")[1:]
    return "loss.fit" if parts[:2] == ["loss", "fit"] else (parts or ["__init__"])[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of quantmix that a module imports, but for type checking."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    typing_only = {
        id(inner)
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for inner in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_no_layer_imports_a_higher_one() -> None:
    """Every import of another package or module goes down."""
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        me = unit(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
        for module in imported(ast.parse(file.read_text(encoding="utf-8"))):
            other = unit(module)
            if module.split(".")[0] != "quantmix" or other in (me, "__version__"):
                continue
            if rank[other] >= rank[me] and (me, other) not in LAZY:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_the_table_of_layers_is_the_documented_one() -> None:
    """docs/architecture.md lists the same names in the same order."""
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.split("| modules | what |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    named = [tuple(re.findall(r"`([^`]+)`", row.split("|")[1])) for row in rows]
    assert tuple(named) == LAYERS
