"""Colours of the pages: an order of bits per weight that everybody can tell apart."""

from __future__ import annotations

from itertools import pairwise

# Anchors of viridis (van der Walt and Smith, CC0): even in lightness, told apart by everybody.
_ANCHORS = (
    (0.000, (68, 1, 84)),
    (0.125, (71, 45, 123)),
    (0.250, (59, 82, 139)),
    (0.375, (44, 114, 142)),
    (0.500, (33, 145, 140)),
    (0.625, (40, 174, 128)),
    (0.750, (94, 201, 98)),
    (0.875, (173, 220, 48)),
    (1.000, (253, 231, 37)),
)
_LOW_BPW, _HIGH_BPW = 1.5, 8.5


def by_bits(bpw: float) -> tuple[str, str]:
    """Return the fill of a type with `bpw` bits per weight and an ink readable on it."""
    share = min(max((bpw - _LOW_BPW) / (_HIGH_BPW - _LOW_BPW), 0.0), 1.0) ** 0.8
    for (a, first), (b, second) in pairwise(_ANCHORS):
        if share <= b:
            mix = (share - a) / (b - a)
            rgb = [round(x + mix * (y - x)) for x, y in zip(first, second, strict=True)]
            break
    else:  # pragma: no cover - share is clamped to 1
        rgb = list(_ANCHORS[-1][1])
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#ffffff" if light < 128 else "#111111"
