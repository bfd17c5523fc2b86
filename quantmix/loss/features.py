"""A mix as a small matrix: how much sensitivity lies on which type, by group of roles.

Every fit and every prediction sees a mix only through its features

    W[g, q] = sum of share(t) over the tensors t of role group g that have type q

(`N_GROUPS` × `len(columns())`). Experts and feed-forward tensors are told apart by thirds of the
depth: a mix that spares some layers is known less well than one that treats all alike, and says
more about depth. The shares come from the prior and sum to one, so W sums to one for a fully
quantized model. Kept tensors (floats, or the type of the source) carry no damage and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

import numpy as np

from quantmix.ggml.types import ENGINES, GgmlType, table
from quantmix.loss import curve
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model, Tensor

_THIRDS: Final = ("early", "middle", "late")
GROUPS: Final = (
    "output",
    "embedding",
    *(f"experts, {third}" for third in _THIRDS),
    *(f"ffn, {third}" for third in _THIRDS),
    "attention",
)
N_GROUPS: Final = len(GROUPS)
FLOATS: Final = frozenset({"f32", "f16", "bf16", "f64"})


def group(tensor: Tensor, n_layer: int) -> int:
    """Return the index in `GROUPS` of a tensor; recurrent (ssm) tensors count as attention."""
    if tensor.role == "output":
        return 0
    if tensor.role.startswith("token_embd"):
        return 1
    if not tensor.role.startswith("ffn"):
        return N_GROUPS - 1
    third = min(2, 3 * (tensor.layer or 0) // max(1, n_layer))
    return (2 if tensor.role.endswith("_exps") else 5) + third


@cache
def columns() -> dict[str, int]:
    """Return the column of every type that has a curve of its own, by name, in a fixed order."""
    names = dict.fromkeys(
        curve.own_name(t) for engine in ENGINES for t in table(engine).values() if t.is_quantized
    )
    return {name: j for j, name in enumerate(names)}


@cache
def ln_gains() -> FloatArray:
    """Return the ln of the central gain of every column, shape (n_columns,)."""
    return np.log([curve.gain_of(name).gain for name in columns()])


@cache
def ln_gain_sds() -> FloatArray:
    """Return the spread of ln gain between models for every column, shape (n_columns,)."""
    return np.array([curve.gain_of(name).sd for name in columns()])


@cache
def without_imatrix() -> FloatArray:
    """Return damage without an importance matrix over damage with one, shape (n_columns,)."""
    return np.array([curve.without_imatrix(name).gain for name in columns()])


@cache
def ln_without_imatrix_sds() -> FloatArray:
    """Return the spread between models of the logarithm of that factor, shape (n_columns,)."""
    return np.array([curve.without_imatrix(name).sd for name in columns()])


@cache
def bits() -> FloatArray:
    """Return the nominal bits per weight of every column, shape (n_columns,)."""
    by_name = {t.name: t.bpw for engine in ENGINES for t in table(engine).values()}
    return np.array([by_name[name] for name in columns()])


def of_types(
    model: Model,
    share: FloatArray,
    mix: Sequence[GgmlType | str | None],
    *,
    imatrix: bool = True,
) -> FloatArray:
    """Return W of a mix, one type (or its name) per tensor, shape (N_GROUPS, n_columns).

    Args:
        imatrix: whether it was made with an importance matrix; see `lossless`.
    """
    out = np.zeros((N_GROUPS, len(columns())))
    for tensor, weight, qtype in zip(model.tensors, share, mix, strict=True):
        if qtype is None or weight <= 0.0:
            continue
        name = qtype if isinstance(qtype, str) else curve.own_name(qtype)
        column = columns().get(name)
        if column is not None and not lossless(tensor, name, imatrix=imatrix):
            out[group(tensor, model.hparams.n_layer), column] += weight
    return out


def of_fractions(
    model: Model, share: FloatArray, mix: Sequence[Mapping[str, float] | None]
) -> FloatArray:
    """Return W of a mix known by class only: per tensor the chance of each type."""
    out = np.zeros((N_GROUPS, len(columns())))
    for tensor, weight, chances in zip(model.tensors, share, mix, strict=True):
        if chances is None or weight <= 0.0:
            continue
        for name, chance in chances.items():
            column = columns().get(name)
            if column is not None and not lossless(tensor, name):
                out[group(tensor, model.hparams.n_layer), column] += weight * chance
    return out


def lossless(tensor: Tensor, name: str, *, imatrix: bool = True) -> bool:
    """Whether a type leaves the weights as they were trained: a float, or their `exact_type`.

    The latter is found with an importance matrix only (`models/trained.py`), unless the source has
    it. Another quantized type of the source is no such thing: it lost something already.
    """
    if name == tensor.source_type:
        return name == tensor.exact_type or name in FLOATS
    return imatrix and name == tensor.exact_type
