"""Rounds of probes and swaps around a recipe, then the judgement on chunks that chose nothing.

The engine is a function here: (mix, place) → score. The same scores give the same answer, so a run
that was interrupted goes on where it stopped once the scores it had are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr, stdtrit

from quantmix.measurements import Scope
from quantmix.refine import factors as fitting
from quantmix.refine.factors import Measured
from quantmix.refine.frame import Frame
from quantmix.refine.probes import Part, parts_of, probes_of
from quantmix.refine.swaps import REACHES, candidates
from quantmix.solve.problem import IntArray

SURE: Final = 2.0
"""Standard errors that the gain on held-out chunks must exceed, more where they are few."""


@dataclass(frozen=True, slots=True)
class Place:
    """Chunks `first` … `first + count − 1` of the corpus."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Score:
    """A mix on a place: mean KLD per stretch of a chunk, ln(PPL/base) per chunk, nats per token."""

    kld: tuple[float, ...]
    ln_ratio: tuple[float, ...]
    base_nll: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean KLD."""
        return float(np.mean(self.kld))

    @property
    def by_chunk(self) -> tuple[float, ...]:
        """Mean KLD of each chunk."""
        return tuple(np.reshape(self.kld, (len(self.ln_ratio), -1)).mean(axis=1).tolist())


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of so many paired differences and its standard error, nats."""

    mean: float
    err: float
    pairs: int

    @property
    def is_gain(self) -> bool:
        """Whether it is below zero beyond doubt: by chance as seldom as `SURE` says (Student)."""
        if self.pairs < 2:
            return False
        return self.mean < float(stdtrit(self.pairs - 1, ndtr(-SURE))) * self.err


Evaluate = Callable[[Mapping[str, str], Place, str], Score | None]
"""(mix, place, what it is for people) → score; None when the engine cannot have that mix."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure: chunks per probe, chunks held out, rounds, and how parts are cut.

    `seen` are chunks at the start of the text that the loss model was measured on.
    """

    chunks: int = 8
    held_out: int = 16
    rounds: int = 1
    by: Scope = "band"
    bands: int = 2
    seen: int = 0

    @property
    def probed(self) -> Place:
        """Where probes and candidates are measured."""
        return Place(0, self.chunks)

    @property
    def judged(self) -> Place:
        """Where the answer is judged: what was chosen was not chosen by it."""
        return Place(max(self.chunks, self.seen), self.held_out)


@dataclass(frozen=True)
class Round:
    """One round: what was probed, and the candidates with their expected and measured change."""

    parts: tuple[Part, ...]
    probes: tuple[Measured, ...]
    expected: tuple[float, ...]
    measured: tuple[Difference | None, ...]
    gap: float
    chosen: int | None


@dataclass(frozen=True)
class Found:
    """The answer.

    Attributes:
        choice: (G,) the best mix on the probed chunks, the start when there is none.
        rounds: what led there.
        before, after, difference: on the held-out chunks; None when nothing was to be judged, or
            the engine failed there.
    """

    choice: IntArray
    rounds: tuple[Round, ...]
    before: Score | None = None
    after: Score | None = None
    difference: Difference | None = None

    @property
    def unjudged(self) -> bool:
        """Whether there is a better mix on the probed chunks that the engine failed to judge."""
        return self.difference is None and any(r.chosen is not None for r in self.rounds)

    @property
    def accepted(self) -> bool:
        """Whether the answer is better than the recipe on the held-out chunks, beyond doubt."""
        return self.difference is not None and self.difference.is_gain


def paired(after: Sequence[float], before: Sequence[float]) -> Difference:
    """Return the mean of after − before, with the standard error of independent pairs."""
    d = np.asarray(after) - np.asarray(before)
    err = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.inf
    return Difference(float(d.mean()), err, len(d))


def search(frame: Frame, settings: Settings, evaluate: Evaluate) -> Found | None:
    """Return the best mix that rounds of probes lead to, judged; None if the recipe cannot be had.

    Every round starts from the best mix so far, and the last is one that brings nothing.
    """
    now = frame.start
    rounds: list[Round] = []
    parts = parts_of(frame, settings.by, settings.bands)
    for number in range(settings.rounds):
        here = evaluate(frame.mix(now), settings.probed, "the recipe" if not number else "the best")
        if here is None:
            return None
        done, best = _round(frame, parts, now, here, settings, evaluate, number + 1)
        rounds.append(done)
        if done.chosen is None:
            break
        now = best
    if np.array_equal(now, frame.start):
        return Found(now, tuple(rounds))
    before = evaluate(frame.mix(frame.start), settings.judged, "held-out chunks: the recipe")
    after = evaluate(frame.mix(now), settings.judged, "held-out chunks: the new mix")
    if before is None or after is None:
        return Found(now, tuple(rounds))
    difference = paired(after.by_chunk, before.by_chunk)
    return Found(now, tuple(rounds), before, after, difference)


def _round(
    frame: Frame,
    parts: tuple[Part, ...],
    now: IntArray,
    here: Score,
    settings: Settings,
    evaluate: Evaluate,
    number: int,
) -> tuple[Round, IntArray]:
    """Probe around `now`, solve, measure the candidates; return the best, `now` if none is."""
    measured = []
    for probe in probes_of(frame, parts, now):
        part = parts[probe.part]
        what = (
            f"round {number}: {part.role} {_span(part.layers)} {'up' if probe.way > 0 else 'down'}"
        )
        score = evaluate(frame.mix(probe.choice), settings.probed, what)
        if score is not None:
            d = paired(score.kld, here.kld)
            measured.append(Measured(probe.part, probe.way, probe.predicted, d.mean, d.err))
    change = fitting.changes(frame, parts, now, fitting.fit(measured, len(parts)))
    tried = candidates(frame, change, now)
    seen: list[Difference | None] = []
    for i, (choice, _, _) in enumerate(tried):
        score = evaluate(
            frame.mix(choice), settings.probed, f"round {number}: mix {i + 1} of {len(tried)}"
        )
        seen.append(paired(score.kld, here.kld) if score else None)
    good = [i for i, d in enumerate(seen) if d is not None and d.mean < 0.0]
    chosen = min(good, key=lambda i: seen[i].mean) if good else None  # type: ignore[union-attr]
    done = Round(
        parts,
        tuple(measured),
        tuple(gain for _, gain, _ in tried),
        tuple(seen),
        tried[chosen][2].gap if chosen is not None else 0.0,
        chosen,
    )
    return done, now if chosen is None else tried[chosen][0]


def _span(layers: tuple[int, ...]) -> str:
    if not layers:
        return ""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def n_passes(frame: Frame, settings: Settings) -> tuple[int, int]:
    """Return how many mixes are measured at most on the probed chunks, and on those held out.

    Each with the base once.
    """
    parts = parts_of(frame, settings.by, settings.bands)
    probes = len(probes_of(frame, parts, frame.start))
    return settings.rounds * (probes + len(REACHES)) + 2, 3
