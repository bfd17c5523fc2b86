"""Figures of merit."""

from __future__ import annotations

import math

from quantmix.loss import scores
from quantmix.loss.outcome import Outcome, Pair


def _outcome(bpw: float, error: float, covered: bool = True) -> Outcome:
    reach = abs(error) + (0.01 if covered else -0.5 * abs(error))
    return Outcome("x", "m", bpw, 1.0, 1.0 + error, 1.0 + error - reach, 1.0 + error + reach,
                   9, 1.0 + 3 * error, 1.0)  # fmt: skip


def test_bands_count_errors_and_coverage_where_they_belong() -> None:
    """Two rows above 3.3 bpw, one below: medians, shares and coverage by band."""
    rows = [_outcome(4.0, 0.01), _outcome(5.0, 0.03, covered=False), _outcome(2.0, 0.2)]
    high, middle, low, everything = scores.bands(rows)
    assert (high["band"], high["n"], high["within_2pct"]) == (">=3.3", 2, 0.5)
    assert high["coverage90"] == 0.5
    assert middle["n"] == 0
    assert middle["median"] is None
    assert math.isclose(low["median"], math.expm1(0.2))
    assert everything["n"] == 3


def test_a_control_three_times_as_bad_is_a_sure_gain() -> None:
    """The bootstrap interval of the difference excludes zero and the tail ratio is about three."""
    rows = [_outcome(4.0, 0.001 * (i + 1)) for i in range(30)]
    gain = scores.median_gain(rows, lambda o: o.bpw_only)[0]
    assert gain["low"] > 0.0
    assert 2.9 < gain["p90_ratio"] < 3.3


def test_superiority_is_claimed_only_when_the_interval_excludes_zero() -> None:
    """Nine of ten right against five of ten is superior; against nine of ten it is not."""
    pairs = [
        Pair(f"m{i % 5}", float(i % 10 != 0), float(i % 2), float(i % 10 != 1)) for i in range(200)
    ]
    order = scores.order(pairs)
    assert order["superior_to_bpw_only"] is True
    assert order["superior_to_by_size"] is False
    assert order["ours_low"] < order["ours"] < order["ours_high"]
    assert scores.order([]) == {"n": 0}
