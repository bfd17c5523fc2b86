"""Perplexity and KL divergence from logits: the arithmetic, without any engine.

Definitions are llama-perplexity's (perplexity.cpp): per scored token the negative log likelihood
(nll) of the next token; `PPL = exp(mean nll)`, `± = PPL · sqrt(var(nll) / (n-1))`;
`KLD = Σ p_base · (ln p_base − ln p)` over the vocabulary, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import EngineError

FloatArray = NDArray[np.float64]
_ROWS: Final = 8  # rows worked on at once: some MiB at 150k vocabulary, stays in the cache


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`ppl` ± `ppl_err` as the engines print them; `nll` in nats per token."""

    ppl: float
    ppl_err: float
    nll: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """KLD against a base in nats: mean ± standard error, quantiles, share of equal top tokens."""

    mean: float
    err: float
    median: float
    p90: float
    p99: float
    max: float
    same_top: float


@dataclass(frozen=True, slots=True)
class LogRatio:
    """`ln(PPL/PPL_base)`, paired per token, with its standard error."""

    mean: float
    err: float


@dataclass(frozen=True)
class Scores:
    """Per scored token, [n]: nll; against a base also kld, same_top and the base's nll."""

    nll: FloatArray
    kld: FloatArray | None = None
    same_top: NDArray[np.bool_] | None = None
    base_nll: FloatArray | None = None

    def perplexity(self) -> Perplexity:
        """Return PPL and its error.

        Raises:
            EngineError: the engine produced NaN or infinity.
        """
        n = len(self.nll)
        mean = float(self.nll.mean())
        if not math.isfinite(mean):
            raise EngineError("the model answers NaN: a broken quantization or a kernel bug")
        # Printed as sqrt((E[x²]-E[x]²)/(n-1)) (perplexity.cpp).
        err = math.sqrt(float(self.nll.var()) / max(1, n - 1))
        ppl = math.exp(min(mean, 700.0))
        return Perplexity(ppl, err * ppl, mean, n)

    def divergence(self) -> Divergence:
        """Return the KLD statistics; the scores must have been taken against a base."""
        assert self.kld is not None
        assert self.same_top is not None
        if not np.isfinite(self.kld).all():
            raise EngineError("the model answers NaN: a broken quantization or a kernel bug")
        n = len(self.kld)
        median, p90, p99 = (float(q) for q in np.quantile(self.kld, (0.5, 0.9, 0.99)))
        return Divergence(
            mean=float(self.kld.mean()),
            err=math.sqrt(float(self.kld.var()) / max(1, n - 1)),
            median=median,
            p90=p90,
            p99=p99,
            max=float(self.kld.max()),
            same_top=float(self.same_top.mean()),
        )

    def log_ratio(self) -> LogRatio:
        """Return ln(PPL/PPL_base); paired, so its error is far below that of either PPL."""
        assert self.base_nll is not None
        difference = self.nll - self.base_nll
        n = len(difference)
        err = math.sqrt(float(difference.var()) / max(1, n - 1))
        return LogRatio(float(difference.mean()), err)


@dataclass(frozen=True)
class BaseRows:
    """Log-probabilities of the base for some scored tokens, in 16 bits each.

    `ln p = offset[row] + scale[row] · code[row, token]`; code 0 means "at or below `offset`".

    Attributes:
        code: uint16 [n, n_vocab].
        scale, offset: float32 [n]; offset is at least the row's maximum − 24.
        nll: float32 [n], exact nll of the target token.
    """

    code: NDArray[np.uint16]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    nll: NDArray[np.float32]


# As ik's base files: probabilities below e^-24 of the largest one carry nothing.
_SPAN: Final = 24.0


def by_rows(n_rows: int, work: Callable[[slice], None], pool: ThreadPoolExecutor | None) -> None:
    """Call `work` on slices of rows, in the pool when there is one (numpy frees the GIL)."""
    slices = [slice(i, min(i + _ROWS, n_rows)) for i in range(0, n_rows, _ROWS)]
    if pool is None:
        for part in slices:
            work(part)
    else:
        for future in [pool.submit(work, part) for part in slices]:
            future.result()


def log_normalizer(logits: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (log Σ exp, maximum) per row of logits [n, n_vocab]; sums in double precision."""
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return np.log(total) + top, top


def score(
    logits: NDArray[np.float32], targets: NDArray[np.int32], pool: ThreadPoolExecutor | None = None
) -> FloatArray:
    """Return the nll [n] of `targets` [n] under `logits` [n, n_vocab]."""
    nll = np.empty(len(targets))

    def work(part: slice) -> None:
        x = logits[part]
        norm, _ = log_normalizer(x)
        nll[part] = norm - x[np.arange(len(x)), targets[part]]

    by_rows(len(targets), work, pool)
    return nll


def encode(
    logits: NDArray[np.float32], targets: NDArray[np.int32], pool: ThreadPoolExecutor | None = None
) -> BaseRows:
    """Pack the base's logits [n, n_vocab] into 16-bit log-probabilities."""
    n, n_vocab = logits.shape
    rows = BaseRows(
        np.empty((n, n_vocab), np.uint16),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
    )

    def work(part: slice) -> None:
        x = logits[part]
        norm, top = log_normalizer(x)
        low = np.maximum(x.min(axis=1), top - np.float32(_SPAN))
        scale = np.maximum((top - low) / np.float32(65535), np.float32(1e-12))
        code = np.rint((x - low[:, None]) / scale[:, None])
        rows.code[part] = np.clip(code, 0, 65535)
        rows.scale[part] = scale
        rows.offset[part] = low - norm
        rows.nll[part] = norm - x[np.arange(len(x)), targets[part]]

    by_rows(n, work, pool)
    return rows


def compare(
    logits: NDArray[np.float32],
    targets: NDArray[np.int32],
    base: BaseRows,
    pool: ThreadPoolExecutor | None = None,
) -> Scores:
    """Score logits [n, n_vocab] against the base's log-probabilities of the same tokens."""
    n = len(targets)
    nll, kld, same = np.empty(n), np.empty(n), np.empty(n, np.bool_)

    def work(part: slice) -> None:
        x = logits[part]
        code = base.code[part]
        norm, _ = log_normalizer(x)
        nll[part] = norm - x[np.arange(len(x)), targets[part]]
        log_p = code.astype(np.float32)
        log_p *= base.scale[part, None]
        log_p += base.offset[part, None]
        same[part] = x.argmax(axis=1) == code.argmax(axis=1)
        p = np.exp(log_p)
        log_p -= x
        log_p += norm.astype(np.float32)[:, None]
        total = p.sum(axis=1, dtype=np.float64)
        # Rounded log-probabilities do not sum to one exactly: divide by their sum.
        weighted = np.einsum("ij,ij->i", p, log_p) / total
        kld[part] = weighted - np.log(total)

    by_rows(n, work, pool)
    return Scores(nll, kld, same, base.nll.astype(np.float64))
