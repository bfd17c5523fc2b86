"""A tiny model with recipes for a file and for devices, and a made-up engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from tiny import write_tiny

from quantmix.budget import Budget
from quantmix.design import design
from quantmix.loss import load as load_loss
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.recipe import Recipe
from quantmix.refine.frame import Frame, frame_of, limits_of
from quantmix.refine.search import Place, Score
from quantmix.units import GIB

TYPES = ("q8_0", "q6_K", "q5_K", "q4_K", "q3_K", "q2_K")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A dense model."""
    return load_model(str(write_tiny(tmp_path_factory.mktemp("refine") / "tiny.gguf")))


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A mixture of experts, head not tied."""
    path = tmp_path_factory.mktemp("refine") / "moe.gguf"
    return load_model(str(write_tiny(path, experts=4, tied=False)))


def frame(recipe: Recipe, model: Model, types: tuple[str, ...] = ()) -> Frame:
    """The frame of a recipe under the prior."""
    limits = limits_of(recipe, types, imatrix=True)
    return frame_of(recipe, model, load_loss(model), limits)


def in_file(model: Model, **limits: object) -> Recipe:
    """A recipe of 4 bpw."""
    made = TypeLimits(types=TYPES, **limits)  # type: ignore[arg-type]
    return design(model, Budget.from_size("4.0bpw"), options=Options(limits=made, name="tiny"))


def on_devices(model: Model) -> Recipe:
    """A recipe for one device with half of what the largest types take, and RAM."""
    options = Options(limits=TypeLimits(types=TYPES), name="tiny")
    ample = design(model, Budget.from_vram(8 * GIB, ctx=512), options=options).devices[0]
    tight = ample.used_bytes - ample.weights_bytes // 2
    return design(model, Budget.from_vram(tight, ctx=512), options=options)


class Engine:
    """A made-up engine: KLD = Σ truth of a tensor · predicted damage, noise of the text on top.

    `truth` by role; `asked` are the mixes it was asked for. `text` says how a place differs.
    """

    def __init__(
        self,
        frame: Frame,
        truth: Mapping[str, float],
        noise: float = 0.0,
        text: Callable[[str, Place], float] = lambda role, place: 1.0,
    ) -> None:
        self.frame, self.truth, self.noise, self.text = frame, truth, noise, text
        self.asked: list[tuple[dict[str, str], Place]] = []
        self._rng = np.random.default_rng(0)

    def kld(self, mix: Mapping[str, str], place: Place | None = None) -> float:
        """The mean KLD of a mix."""
        palette = self.frame.choices.palette
        column = {q.name: j for j, q in enumerate(palette.types)}
        total = 0.0
        for i, t in enumerate(self.frame.model.tensors):
            if t.name in mix:
                factor = self.truth.get(t.role, 1.0)
                factor *= self.text(t.role, place) if place else 1.0
                total += factor * float(palette.damage[i, column[mix[t.name]]])
        return total

    def __call__(self, mix: Mapping[str, str], place: Place, _: str) -> Score | None:
        self.asked.append((dict(mix), place))
        level = 1.0 + 0.5 * np.sin(np.arange(5 * place.count))
        kld = self.kld(mix, place) * level / level.mean()
        kld = kld + self.noise * self._rng.standard_normal(len(kld))
        zeros = (0.0,) * place.count
        return Score(tuple(kld.tolist()), zeros, zeros)
