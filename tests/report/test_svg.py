"""Scales, ticks and labels of the drawings."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.report.colours import by_bits
from quantmix.report.svg import Labels, Scale, drawing, hover, tag, text
from quantmix.report.words import percent, say


@given(st.floats(1e-4, 1e3), st.floats(1.01, 1e4), st.booleans(), st.integers(2, 12))
def test_ticks_are_few_round_and_inside(low, ratio, log, most):
    """Ticks ascend, lie on the scale, and are at most as many as asked for."""
    scale = Scale(low, low * ratio, 0.0, 100.0, log=log)
    ticks = scale.ticks(most)
    assert ticks == sorted(ticks)
    assert len(ticks) <= max(most, 2)
    for v in ticks:
        assert scale.low * (1 - 1e-9) <= v <= scale.high * (1 + 1e-9)


@given(st.floats(0.1, 10.0), st.floats(1.1, 100.0), st.floats(0.0, 1.0), st.booleans())
def test_a_scale_keeps_order_and_ends(low, ratio, share, log):
    """Ends map to ends, values between lie between, values beyond are clamped."""
    scale = Scale(low, low * ratio, 20.0, 320.0, log=log)
    assert scale.at(scale.low) == pytest.approx(20.0)
    assert scale.at(scale.high) == pytest.approx(320.0)
    value = low + share * (low * ratio - low)
    assert 20.0 - 1e-6 <= scale.at(value) <= 320.0 + 1e-6
    assert scale.at(low / 2) == pytest.approx(20.0)


def test_drawings_are_well_formed_and_escaped():
    """Names with markup end up as text."""
    body = hover(tag("circle", cx=1.0, cy=2.0, class_="a<b"), 'say "x" & <y>', "k.0")
    root = ET.fromstring(drawing(10, 10, "<t>", [body, text(1, 2, "<z>", "tick")]))
    assert root.attrib["aria-label"] == "<t>"
    assert root.find("g/title").text == 'say "x" & <y>'
    assert root.find("text").text == "<z>"


def test_labels_keep_off_marks_and_each_other():
    """Of many labels at one place only those that find room are placed, none overlapping."""
    labels = Labels(100.0, 100.0)
    labels.take(50.0, 50.0, 4.0)
    placed = [labels.place(50.0, 50.0, "12", 9.0) for _ in range(40)]
    found = [p for p in placed if p]
    assert 1 < len(found) < 12
    boxes = labels.boxes
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_colours_brighten_with_bits():
    """More bits are lighter, and the ink on a fill stands out from it."""

    def light(colour):
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * r + 0.587 * g + 0.114 * b

    lights = [light(by_bits(b)[0]) for b in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.5)]
    assert lights == sorted(lights)
    for bits in (1.5, 3.0, 4.5, 6.6, 8.5):
        fill, ink = by_bits(bits)
        assert abs(light(fill) - light(ink)) > 80


def test_numbers_are_written_for_people():
    """Rises are signed percents, nothing is a dash."""
    assert percent(0.0953) == "+10.0 %"
    assert percent(0.01) == "+1.01 %"
    assert percent(0.7) == "+101 %"
    assert say(None, "ppl") == "–"
    assert say(3.21304, "ppl") == "3.2130"
