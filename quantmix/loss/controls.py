"""What a loss model must beat: perplexity from bits per weight alone, and from parameter counts.

bpw only           ln PPL = p0 + exp(a - k · (bpw - 3)),  k ≥ 0, p0 near the base
type curve × size  our own machinery with shares by number of weights instead of sensitivities
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from quantmix.loss.calibrate import Row
from quantmix.loss.model import FloatArray


def bpw_only(rows: Sequence[Row], bpw: float, ln_base: float | None) -> float:
    """Predict ln PPL at `bpw` from a robust exponential in bits per weight fitted to `rows`."""
    bits = np.array([r.bpw for r in rows])
    y = np.array([r.ln_ppl for r in rows])
    lowest = float(y.min()) if ln_base is None else ln_base
    height = max(float(np.median(y)) - lowest, 0.003)
    start = [lowest, np.log(height) + 1.2 * (float(np.median(bits)) - 3.0), 1.2]

    def residual(p: FloatArray) -> FloatArray:
        fit = p[0] + np.exp(np.clip(p[1] - p[2] * (bits - 3.0), -30.0, 5.0)) - y
        anchor = [] if ln_base is None else [(p[0] - ln_base) / 0.1]
        return np.concatenate([fit, anchor, [0.003 * (p[1] + 2.5), 0.003 * (p[2] - 1.2)]])

    p = least_squares(
        residual, start, loss="soft_l1", f_scale=0.01, bounds=([-10, -20, 0], [20, 10, 6])
    ).x
    return float(p[0] + np.exp(min(p[1] - p[2] * (bpw - 3.0), 5.0)))
