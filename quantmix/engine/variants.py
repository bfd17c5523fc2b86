"""Whole mixes by hot swap, one after another, on chunks of a text: the engine side of `refine`.

From one mix to the next only the tensors that differ are quantized and written: a probe puts a few
tensors at another type, and the next one puts them back to the type of the recipe. Use only inside
`child` tasks.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix.engine.hotswap import Quantizer, Swapper
from quantmix.engine.perplexity import Evaluator, read_corpus
from quantmix.engine.scores import BaseRows, Scores
from quantmix.engine.session import Session, Tokens, default_threads
from quantmix.errors import EngineError, UsageError
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml.weights import open_weights

STRETCHES: Final = 5
"""Parts of a chunk whose mean KLD is reported: differences of two mixes are paired by them."""


class MixScorer:
    """The loaded source with one mix after another in it, scored against the source itself.

    Args:
        need: chunks that the corpus must have.

    Attributes:
        unread: tensors that the graph never reads, so that no score tells of them: MTP blocks, and
            attn_k_b and attn_v_b where prompts go through attn_kv_b, which is built at load.

    Raises:
        BadFile: a source, text or imatrix that cannot be read.
        UsageError: the corpus is too short.
    """

    def __init__(
        self,
        source: Path,
        corpus: Path,
        imatrix: Path | None,
        *,
        n_ctx: int,
        need: int,
        threads: int | None = None,
    ) -> None:
        n = threads or default_threads()
        weights = open_weights(source)
        text = read_corpus(corpus)
        with ExitStack() as stack:
            session = Session(source, n_ctx=n_ctx, threads=n, mmap=False, reuse=False)
            stack.enter_context(session)
            self._chunks = session.chunks(session.tokenize(text.text), need)
            if len(self._chunks) < need:
                raise UsageError(
                    f"{corpus} gives {len(self._chunks)} chunks, {need} are wanted: use a longer "
                    "--corpus, or fewer --chunks and --held-out"
                )
            matrix = imatrices.read(imatrix) if imatrix else None
            self._swapper = Swapper(session, weights, Quantizer(weights, matrix, n))
            self._runner = Evaluator(session, n)
            self.unread = sorted(self._swapper.unseen(weights.tensors))
            self._base: tuple[tuple[int, int], list[BaseRows]] | None = None
            self._stack = stack.pop_all()

    def __enter__(self) -> MixScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def score(self, mix: dict[str, str], first: int, count: int) -> dict[str, Any]:
        """Put `mix` (tensor → type) into the model, score it on chunks `first … first+count−1`.

        Returns:
            `kld`: [count · STRETCHES] means in nats per token; `ln_ratio`, `base_nll`: [count];
            `seconds`.

        Raises:
            UsageError: a type that the engine does not know, or not without an imatrix entry.
            EngineError: the model answers NaN.
        """
        chunks = self._chunks[first : first + count]
        rows = self._base_rows(chunks, (first, count))
        started = time.perf_counter()
        self._swapper.set_mix(mix)
        found = [self._runner.score(c, b) for c, b in zip(chunks, rows, strict=True)]
        return {
            "kld": [x for s in found for x in _stretches(s)],
            "ln_ratio": [s.log_ratio().mean for s in found],
            "base_nll": [float(r.nll.mean(dtype=np.float64)) for r in rows],
            "seconds": time.perf_counter() - started,
        }

    def _base_rows(self, chunks: Tokens, where: tuple[int, int]) -> list[BaseRows]:
        """Return the source's own log-probabilities; those of one place are kept."""
        if self._base is None or self._base[0] != where:
            self._base = None
            self._swapper.set_mix({})
            self._base = where, [self._runner.encode(chunk) for chunk in chunks]
        return self._base[1]


def _stretches(scores: Scores) -> list[float]:
    """Return the mean KLD of each part of a chunk."""
    assert scores.kld is not None
    if not np.isfinite(scores.kld).all():
        raise EngineError("the model answers NaN: a broken quantization or a kernel bug")
    return [float(part.mean()) for part in np.array_split(scores.kld, STRETCHES)]
