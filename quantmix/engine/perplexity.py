"""Perplexity and KL divergence of a GGUF, measured with the packaged engine or mainline's library.

The definition is llama-perplexity's.

Text → tokens (its last newline dropped) → chunks of n_ctx; per chunk the second half is scored:
logits at positions n_ctx/2 … n_ctx−2 against the tokens that follow, 255 per chunk of 512
(perplexity.cpp).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantmix.engine import child, native, scores
from quantmix.engine.child import Emit
from quantmix.engine.logprobs import BaseInfo, BaseReader, BaseWriter, create
from quantmix.engine.mainline_find import find_mainline
from quantmix.engine.mainline_session import MainlineSession
from quantmix.engine.scores import Divergence, LogRatio, Perplexity, Scores
from quantmix.engine.session import Session, Tokens, default_threads
from quantmix.errors import BadFile
from quantmix.ggml.types import Engine
from quantmix.ggml.weights import WeightsFile, open_weights


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text by content: SHA-256 of the file's bytes, and the text as the engines read it."""

    path: Path
    sha256: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """One model on one text.

    Attributes:
        perplexity, divergence, log_ratio: the last two only against a base.
        chunks, n_ctx: how the text was cut.
        forward_seconds: inside the engine's decode calls; `seconds` is everything.
        per_token: the raw scores.
    """

    perplexity: Perplexity
    divergence: Divergence | None
    log_ratio: LogRatio | None
    chunks: int
    n_ctx: int
    corpus_sha256: str
    engine: native.EngineId
    seconds: float
    forward_seconds: float
    per_token: Scores


def read_corpus(path: str | Path) -> Corpus:
    """Read a text file the way llama-perplexity does: bytes as they are, one last newline dropped.

    Raises:
        BadFile: missing, empty or not text.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as err:
        raise BadFile(f"{file} cannot be read: {err.strerror}") from err
    if raw[:4] == b"GGUF" or b"\0" in raw[:4096]:
        raise BadFile(f"{file} is not a text: give a plain text file as corpus")
    text = raw.decode("utf-8", "replace")
    if not text.strip():
        raise BadFile(f"{file} is empty")
    return Corpus(file, hashlib.sha256(raw).hexdigest(), text.removesuffix("\n"))


def evaluate(
    model: str | Path,
    corpus: str | Path,
    *,
    base: str | Path | None = None,
    logits_base: str | Path | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    engine: Engine = "ik",
    on_event: Emit | None = None,
) -> Evaluation:
    """Measure a GGUF in a child process.

    Args:
        base: the unquantized GGUF; KLD is then measured against it, side by side, chunk by chunk.
        logits_base: file of base log-probabilities: read when it is there, else written (which
            needs `base`).
        chunks: at most so many chunks; default all.
        engine: whose kernels compute it; numbers of two engines are not comparable (1e-3).
        on_event: progress, `{"chunk": i, "of": n, "ppl": x}`.

    Raises:
        BadFile: a file is missing, malformed, or a base of another model, engine or text.
        UsageError: the text is too short, the disk too small.
        EngineError: the engine failed or answers NaN.
    """
    read_corpus(corpus)
    open_weights(model)
    if logits_base and not Path(logits_base).exists() and not base:
        raise BadFile(f"no base log-probabilities at {logits_base}: give --base to make them")
    with tempfile.TemporaryDirectory(prefix="quantmix-") as scratch:
        arrays = Path(scratch) / "scores.npz"
        request = {
            "model": str(model),
            "corpus": str(corpus),
            "base": str(base) if base else None,
            "logits_base": str(logits_base) if logits_base else None,
            "n_ctx": n_ctx,
            "chunks": chunks,
            "threads": threads,
            "engine": engine,
            "arrays": str(arrays),
        }
        result = child.run("quantmix.engine.perplexity:task", request, on_event)
        per_token = _load_scores(arrays)
    return Evaluation(
        perplexity=per_token.perplexity(),
        divergence=per_token.divergence() if per_token.kld is not None else None,
        log_ratio=per_token.log_ratio() if per_token.kld is not None else None,
        chunks=result["chunks"],
        n_ctx=n_ctx,
        corpus_sha256=result["corpus_sha256"],
        engine=native.EngineId(**result["engine"]),
        seconds=result["seconds"],
        forward_seconds=result["forward_seconds"],
        per_token=per_token,
    )


class Evaluator:
    """Runs chunks through a session and scores them; holds the thread pool and the clock."""

    def __init__(self, session: Session | MainlineSession, threads: int) -> None:
        self.session = session
        self.forward_seconds = 0.0
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._first = session.n_ctx // 2
        self._last = session.n_ctx - 1

    def _forward(self, chunk: Tokens) -> tuple[Any, Tokens]:
        """Return (logits [n_scored, n_vocab], targets [n_scored]) of one chunk [n_ctx]."""
        started = time.perf_counter()
        logits = self.session.logits(chunk[None, :], self._first, self._last)[0]
        self.forward_seconds += time.perf_counter() - started
        return logits, chunk[self._first + 1 : self._last + 1]

    def encode(self, chunk: Tokens) -> scores.BaseRows:
        """Run one chunk of the base; return its packed log-probabilities."""
        return scores.encode(*self._forward(chunk), self._pool)

    def score(self, chunk: Tokens, base: scores.BaseRows | None = None) -> Scores:
        """Run one chunk; score it, against the base when given."""
        logits, targets = self._forward(chunk)
        if base is None:
            return Scores(scores.score(logits, targets, self._pool))
        return scores.compare(logits, targets, base, self._pool)


def join(parts: list[Scores]) -> Scores:
    """Concatenate the scores of chunks."""
    if parts[0].kld is None:
        return Scores(np.concatenate([p.nll for p in parts]))
    columns = [
        np.concatenate([getattr(p, name) for p in parts])
        for name in ("nll", "kld", "same_top", "base_nll")
    ]
    return Scores(*columns)


def task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child task of `evaluate`: load, run all chunks, write per-token arrays to a file."""
    started = time.perf_counter()
    corpus = read_corpus(request["corpus"])
    threads = request["threads"] or default_threads()
    with ExitStack() as stack:
        model = _open(request, request["model"], threads, stack)
        runner = Evaluator(model, threads)
        tokens = model.tokenize(corpus.text)
        chunks = model.chunks(tokens, request["chunks"])
        engine = engine_id(request["engine"])
        describe = describer(engine, corpus, tokens, model, len(chunks))
        source = _base_source(request, describe, threads, stack)
        parts: list[Scores] = []
        total = 0.0
        for i, chunk in enumerate(chunks):
            parts.append(runner.score(chunk, source.rows(i, chunk) if source else None))
            total += float(parts[-1].nll.mean())
            ppl = float(np.exp(min(total / (i + 1), 700.0))) if np.isfinite(total) else None
            emit({"chunk": i + 1, "of": len(chunks), "ppl": ppl})
        forward = runner.forward_seconds + (source.forward_seconds if source else 0.0)
    merged = join(parts)
    np.savez(request["arrays"], **{k: v for k, v in vars(merged).items() if v is not None})
    return {
        "chunks": len(chunks),
        "corpus_sha256": corpus.sha256,
        "engine": {"name": engine.name, "build": engine.build},
        "seconds": time.perf_counter() - started,
        "forward_seconds": forward,
    }


class _BaseSource:
    """Base rows chunk by chunk: from a file, or computed here and perhaps written to one."""

    def __init__(
        self, reader: BaseReader | None, runner: Evaluator | None, writer: BaseWriter | None
    ) -> None:
        self._reader, self._runner, self._writer = reader, runner, writer

    @property
    def forward_seconds(self) -> float:
        return self._runner.forward_seconds if self._runner else 0.0

    def rows(self, index: int, chunk: Tokens) -> scores.BaseRows:
        """Return the base's rows of chunk `index`, whose tokens are `chunk`."""
        if self._reader:
            return self._reader.rows(index)
        assert self._runner is not None
        rows = self._runner.encode(chunk)
        if self._writer:
            self._writer.append(rows)
        return rows


def engine_id(engine: Engine) -> native.EngineId:
    """Return name and build of the engine that `evaluate` would use.

    Raises:
        EngineMissing: it is not installed.
    """
    if engine == "ik":
        return native.engine_id()
    return native.EngineId("mainline", find_mainline("memory").version)


def _open(
    request: dict[str, Any], path: str, threads: int, stack: ExitStack
) -> Session | MainlineSession:
    """Load a model with the engine of the request; `stack` closes it."""
    file, n_ctx = Path(path), request["n_ctx"]
    if request["engine"] == "mainline":
        return stack.enter_context(MainlineSession(file, n_ctx=n_ctx, threads=threads))
    return stack.enter_context(Session(file, n_ctx=n_ctx, threads=threads))


def describer(
    engine: native.EngineId,
    corpus: Corpus,
    tokens: Tokens,
    session: Session | MainlineSession,
    n_chunk: int,
) -> Callable[[WeightsFile], BaseInfo]:
    """Return a function: GGUF → BaseInfo of a run of it on these tokens."""
    n_ctx = session.n_ctx
    token_hash = hashlib.sha256(tokens[: n_ctx * n_chunk].tobytes()).hexdigest()[:32]

    def describe(weights: WeightsFile) -> BaseInfo:
        return BaseInfo(
            model=weights.model_fingerprint,
            data=weights.data_fingerprint,
            engine=f"{engine.name} {engine.build}",
            corpus=corpus.sha256,
            tokens=token_hash,
            n_ctx=n_ctx,
            n_chunk=n_chunk,
            n_vocab=session.n_vocab,
        )

    return describe


def _base_source(
    request: dict[str, Any],
    describe: Callable[[WeightsFile], BaseInfo],
    threads: int,
    stack: ExitStack,
) -> _BaseSource | None:
    """Choose where base rows come from; None when no base is wanted."""
    base, stored = request["base"], request["logits_base"]
    if not base and not stored:
        return None
    mine = describe(open_weights(request["model"]))
    if stored and Path(stored).exists():
        reader = BaseReader(Path(stored))
        reader.require(mine)
        if base and reader.info.data != describe(open_weights(base)).data:
            raise BadFile(f"{stored} was made from another file than {base}: delete it")
        return _BaseSource(reader, None, None)
    theirs = describe(open_weights(base))
    if theirs.model != mine.model:
        raise BadFile(
            f"{base} is not the base of {request['model']}: names, shapes or norms differ"
        )
    session = _open(request, base, threads, stack)
    writer = stack.enter_context(create(Path(stored), theirs)) if stored else None
    return _BaseSource(None, Evaluator(session, threads), writer)


def _load_scores(path: Path) -> Scores:
    with np.load(path) as arrays:
        return Scores(**{name: arrays[name] for name in arrays.files})
