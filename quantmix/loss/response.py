"""From features to ln(PPL/base): the response and its derivatives.

    x = sum over g, q of W[g, q] · exp(k + r_g + (1 + e) · ln gain_q + d_q)      additive damage
    y = x · (1 + (c · x)^P)                                                     ln(PPL / base)

k is the ln of the model's damage at iq4_k, r_g corrects a role group, e tilts the whole type
curve, d_q corrects one type, c says where super-additivity begins. While x is small, y = x; at
x = 1/c the model is hurt twice as much as the sum of its parts. P is fitted (params.json).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantmix.loss.features import N_GROUPS, columns, ln_gains
from quantmix.loss.model import FloatArray

# Positions in the parameter vector.
BASE, SCALE, TILT, ONSET = range(4)
FIRST_GROUP = 4
FIRST_TYPE = FIRST_GROUP + N_GROUPS


def n_parameters() -> int:
    """Length of the parameter vector: base, k, e, ln c, role groups, types."""
    return FIRST_TYPE + len(columns())


@dataclass(frozen=True)
class Response:
    """What the model answers for n mixes.

    Attributes:
        ln_ppl: predicted ln PPL (base included), shape (n,).
        damage: additive damage x, shape (n,).
        rise: y = ln(PPL/base), shape (n,).
        jacobian: d ln_ppl / d parameters, shape (n, n_parameters).
    """

    ln_ppl: FloatArray
    damage: FloatArray
    rise: FloatArray
    jacobian: FloatArray


def super_additive(x: FloatArray | float, ln_c: float, power: float) -> FloatArray:
    """Return y = x · (1 + (c · x)^power), element by element."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(x * (1.0 + (np.exp(ln_c) * x) ** power))


def cell_gains(theta: FloatArray) -> FloatArray:
    """Return exp(k + r_g + (1 + e) ln gain_q + d_q), shape (N_GROUPS, n_columns)."""
    groups = theta[FIRST_GROUP:FIRST_TYPE]
    types = (1.0 + theta[TILT]) * ln_gains() + theta[FIRST_TYPE:]
    return np.asarray(np.exp(theta[SCALE] + groups[:, None] + types[None, :]))


def respond(theta: FloatArray, w: FloatArray, power: float) -> Response:
    """Return the response of mixes with features `w`, shape (n, N_GROUPS, n_columns)."""
    cells = w * cell_gains(theta)
    x = cells.sum(axis=(1, 2))
    grown = (np.exp(theta[ONSET]) * x) ** power
    y = x * (1.0 + grown)
    slope = (1.0 + (1.0 + power) * grown)[:, None]
    jacobian = np.empty((len(w), n_parameters()))
    jacobian[:, BASE] = 1.0
    jacobian[:, SCALE] = slope[:, 0] * x
    jacobian[:, TILT] = slope[:, 0] * (cells.sum(axis=1) @ ln_gains())
    jacobian[:, ONSET] = power * x * grown
    jacobian[:, FIRST_GROUP:FIRST_TYPE] = slope * cells.sum(axis=2)
    jacobian[:, FIRST_TYPE:] = slope * cells.sum(axis=1)
    return Response(theta[BASE] + y, x, y, jacobian)
