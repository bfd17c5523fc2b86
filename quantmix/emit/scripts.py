"""Recipe → the files that people run: rules, quantize.sh, serve.sh, verify.sh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantmix.emit.rules import section_of, split_rule
from quantmix.units import gib

if TYPE_CHECKING:
    from quantmix.recipe import Recipe

_HEAD = "#!/usr/bin/env bash\n"


def rules_args(recipe: Recipe) -> str:
    """Return the bare rules, one per line."""
    return "".join(f"{r}\n" for r in recipe.rules)


def rules_text(recipe: Recipe) -> str:
    """Return the rules for people: one per line under comments by role, with a header."""
    q, size = recipe.quality, recipe.size
    ppl = (
        "" if q.ppl is None else f", predicted PPL {q.ppl:.4f} [{q.ppl_low:.4f}, {q.ppl_high:.4f}]"
    )
    head = [
        f"# {recipe.name}: {gib(size.tensor_bytes)}, {size.bpw:.4f} bpw{ppl}",
        f"# {recipe.engine.name} engine, {recipe.engine.ftype} as the ftype; "
        f"made by quantmix {recipe.quantmix}",
    ]
    return "\n".join([*head, *sectioned(recipe)]) + "\n"


def sectioned(recipe: Recipe) -> list[str]:
    """Return rule lines with a comment before each section."""
    lines: list[str] = []
    section = ""
    for text in recipe.rules:
        pattern = re.compile(split_rule(text)[0])
        roles = (t.role for t in recipe.tensors if pattern.search(t.name))
        now = section_of(next(roles, ""))
        if now != section:
            lines += ["", f"# {now}"]
            section = now
        lines.append(text)
    return lines


def quantize_sh(recipe: Recipe) -> str:
    """Return a runnable quantize.sh in the form that quantizers publish.

    The rules stand one per line; the script drops comments and joins them for the engine. Options
    that begin with `--` go to llama-quantize (`--dry-run`, `--ignore-imatrix-rules`).
    """
    mainline = recipe.engine.name == "mainline"
    join = (
        "types=$(mktemp); trap 'rm -f \"$types\"' EXIT\n"
        "grep -v '^#' <<<\"$custom\" | sed '/^$/d' >\"$types\"\n"
        if mainline
        else "custom=$(grep -v '^#' <<<\"$custom\" | sed '/^$/d' | paste -sd, -)\n"
    )
    rules = '--tensor-type-file "$types"' if mainline else '--custom-q "$custom"'
    convert = (
        ""
        if mainline
        else """
# ik_llama.cpp reads the old imatrix format only; a GGUF imatrix is converted first.
if [[ -n $IMATRIX && $(head -c 4 -- "$IMATRIX") == GGUF ]]; then
  quantmix imatrix --convert "$IMATRIX" --out "${IMATRIX%.gguf}.dat" || exit
  IMATRIX="${IMATRIX%.gguf}.dat"
fi
"""
    )
    return f"""{_HEAD}# {_title(recipe)}
# Usage: quantize.sh [--dry-run] SOURCE.gguf OUT.gguf [IMATRIX]     (or SOURCE, OUT, IMATRIX in the
# environment; QUANTIZE names the program, THREADS the number of threads)
set -euo pipefail

options=()
while [[ ${{1:-}} == --* ]]; do options+=("$1"); shift; done
SOURCE=${{1:-${{SOURCE:?the source GGUF (bf16) is the first argument}}}}
OUT=${{2:-${{OUT:?the GGUF to write is the second argument}}}}
IMATRIX=${{3:-${{IMATRIX:-}}}}
QUANTIZE=${{QUANTIZE:-llama-quantize}}
THREADS=${{THREADS:-$(nproc)}}

custom=$(cat <<'RULES'
{chr(10).join(sectioned(recipe)).strip()}
RULES
)
{join}{convert}
[[ -n $IMATRIX ]] && options+=(--imatrix "$IMATRIX")
"$QUANTIZE" "${{options[@]}}" {rules} \\
  "$SOURCE" "$OUT" {recipe.engine.ftype} "$THREADS"
"""


def serve_sh(recipe: Recipe) -> str:
    """Return serve.sh: llama-server with the offload flags of the plan."""
    return f"""{_HEAD}# {_title(recipe)}
# Usage: serve.sh MODEL.gguf [more llama-server options]
set -euo pipefail
MODEL=${{1:-${{MODEL:?the quantized GGUF is the first argument}}}}
[[ $# -gt 0 ]] && shift
{_exports(recipe)}exec "${{SERVER:-llama-server}}" -m "$MODEL" \\
{_wrapped(_flags(recipe.commands["serve"]))} \\
  "$@"
"""


def shell_line(env: Mapping[str, str], command: Sequence[str]) -> str:
    """Return one line for a shell: the environment, then the command."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(command)])


def verify_sh(recipe: Recipe) -> str:
    """Return verify.sh: llama-perplexity as the field measures it (wiki.test.raw, -c 512)."""
    return f"""{_HEAD}# {_title(recipe)}
# Usage: verify.sh MODEL.gguf [wiki.test.raw]     (`quantmix fetch-corpus` gets the text)
set -euo pipefail
MODEL=${{1:-${{MODEL:?the quantized GGUF is the first argument}}}}
CORPUS=${{2:-wiki.test.raw}}
{_exports(recipe)}exec "${{PERPLEXITY:-llama-perplexity}}" -m "$MODEL" -f "$CORPUS" \\
{_wrapped(_flags(recipe.commands["perplexity"]))}
"""


def _title(recipe: Recipe) -> str:
    return (
        f"{recipe.model.id}, {gib(recipe.size.tensor_bytes)}, {recipe.size.bpw:.3f} bpw "
        f"({recipe.engine.name}), by quantmix {recipe.quantmix}"
    )


def _exports(recipe: Recipe) -> str:
    env = recipe.offload.get("env", {})
    return "".join(f"export {k}={shlex.quote(str(v))}\n" for k, v in env.items())


def _flags(command: Sequence[str]) -> list[str]:
    """Return the flags of a command without program, model and corpus."""
    flags = list(command[1:])
    for name in ("-m", "-f"):
        if name in flags:
            at = flags.index(name)
            del flags[at : at + 2]
    return flags


def _wrapped(flags: Sequence[str]) -> str:
    """Return flags quoted for a shell, one with its values per line."""
    lines: list[list[str]] = []
    for flag in flags:
        if flag.startswith("-") and not flag.lstrip("-").isdigit():
            lines.append([flag])
        elif lines:
            lines[-1].append(shlex.quote(flag))
        else:
            lines.append([shlex.quote(flag)])
    return " \\\n".join("  " + " ".join(line) for line in lines)
