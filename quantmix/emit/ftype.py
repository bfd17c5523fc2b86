"""The ftype argument of llama-quantize: the preset nearest to what holds most bytes.

It decides `general.file_type` and nothing else, since every tensor has a rule; but it must be a
quantized one (with a float ftype the engines ignore all rules) and one that llama-quantize takes
without asking for an imatrix up front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quantmix.ggml import types as ggml
from quantmix.ggml.types import Engine

# ftype -> the ggml type it is named after. Sources: `llama-quantize --help` of
# ik-llama-cpp-python 0.1.5 and of llama.cpp b11434. Left out: presets that `main` refuses without
# an imatrix (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, Q2_K_S and their interleaved forms).
_PRESETS: Final[dict[Engine, dict[str, str]]] = {
    "ik": {
        "IQ1_KT": "iq1_kt",
        "IQ2_KT": "iq2_kt",
        "IQ2_KS": "iq2_ks",
        "IQ2_K": "iq2_k",
        "IQ2_KL": "iq2_kl",
        "Q2_K": "q2_K",
        "IQ3_XXS": "iq3_xxs",
        "IQ3_KT": "iq3_kt",
        "IQ3_KS": "iq3_ks",
        "IQ3_S": "iq3_s",
        "IQ3_K": "iq3_k",
        "Q3_K_M": "q3_K",
        "IQ4_KSS": "iq4_kss",
        "IQ4_KT": "iq4_kt",
        "IQ4_KS": "iq4_ks",
        "IQ4_XS": "iq4_xs",
        "MXFP4": "mxfp4",
        "IQ4_K": "iq4_k",
        "IQ4_NL": "iq4_nl",
        "Q4_0": "q4_0",
        "Q4_K_M": "q4_K",
        "Q4_1": "q4_1",
        "IQ5_KS": "iq5_ks",
        "IQ5_K": "iq5_k",
        "Q5_0": "q5_0",
        "Q5_K_M": "q5_K",
        "Q5_1": "q5_1",
        "Q6_0": "q6_0",
        "Q6_K": "q6_K",
        "IQ6_K": "iq6_k",
        "Q8_0": "q8_0",
    },
    "mainline": {
        "Q2_K": "q2_K",
        "IQ3_S": "iq3_s",
        "Q3_K_M": "q3_K",
        "IQ4_XS": "iq4_xs",
        "IQ4_NL": "iq4_nl",
        "Q4_0": "q4_0",
        "Q4_K_M": "q4_K",
        "Q4_1": "q4_1",
        "Q5_0": "q5_0",
        "Q5_K_M": "q5_K",
        "Q5_1": "q5_1",
        "Q6_K": "q6_K",
        "Q8_0": "q8_0",
    },
}


# IQ3_KT's code looks at head counts, which ik does not read for an architecture it does not know:
# llama-hparams.h aborts (ik-llama-cpp-python 0.1.5, tried with every preset above).
_NEEDS_KNOWN_ARCH: Final = frozenset({"IQ3_KT"})
_UNKNOWN_TO_IK: Final = frozenset({"deepseek32"})


def ftype_of(bytes_by_type: Mapping[str, int], engine: Engine, arch: str = "") -> str:
    """Return the preset named after the type that holds most bytes, or the nearest in bpw.

    `arch` is the model's architecture: presets that abort for it are passed over.
    """
    passed = _NEEDS_KNOWN_ARCH if engine == "ik" and arch in _UNKNOWN_TO_IK else frozenset()
    presets = {f: t for f, t in _PRESETS[engine].items() if f not in passed}
    quantized = {n: b for n, b in bytes_by_type.items() if ggml.get(n, engine).is_quantized}
    if not quantized:
        return "Q8_0"
    top = max(quantized, key=lambda n: (quantized[n], n))
    exact = next((f for f, t in presets.items() if t == top), None)
    if exact is not None:
        return exact
    bpw = ggml.get(top, engine).bpw
    return min(presets, key=lambda f: abs(ggml.get(presets[f], engine).bpw - bpw))
