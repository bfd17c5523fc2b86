"""Types of one family keep their order: few rows of a model move one, but not past another.

One row of one type can make it look better than the next better one of its kind (DeepSeek-V2-Lite:
iq2_xxs a fifth below iq2_xs). A solver finds such a cell. So where fitted gains cross the order of
the type curve, those types share their mean (isotonic regression, weights 1/variance).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from quantmix.ggml.types import ENGINES, table
from quantmix.loss import curve, features, response
from quantmix.loss.calibrate import Posterior
from quantmix.loss.model import FloatArray


@cache
def ladders() -> tuple[NDArray[np.int64], ...]:
    """Return the columns of the measured types of each family, from most damage to least."""
    families: dict[str, list[int]] = {}
    by_name = {t.name: t for engine in ENGINES for t in table(engine).values()}
    for name, column in features.columns().items():
        if curve.gain_of(name).measured:
            families.setdefault(by_name[name].family, []).append(column)
    gains = features.ln_gains()
    return tuple(np.array(sorted(c, key=lambda j: -gains[j])) for c in families.values())


def kept(posterior: Posterior) -> FloatArray:
    """Return the parameters with the types of each family in the order of the curve."""
    from scipy.optimize import isotonic_regression

    theta = posterior.theta.copy()
    first = response.FIRST_TYPE
    tilted = (1.0 + theta[response.TILT]) * features.ln_gains()
    variance = np.diag(posterior.covariance)[first:]
    for ladder in ladders():
        fitted = tilted[ladder] + theta[first + ladder]
        if np.any(np.diff(fitted) > 0.0):
            found = isotonic_regression(fitted, weights=1.0 / variance[ladder], increasing=False)
            theta[first + ladder] = found.x - tilted[ladder]
    return theta
