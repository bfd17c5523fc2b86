"""Child tasks: the hot swaps of `measure` and of anchors, and errors without a model run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantmix.engine import native
from quantmix.engine.child import Emit
from quantmix.engine.hotswap import Quantizer, Swapper
from quantmix.engine.logprobs import BaseReader
from quantmix.engine.perplexity import Evaluator, describer, join, read_corpus
from quantmix.engine.scores import Scores
from quantmix.engine.session import Session, default_threads
from quantmix.errors import UsageError
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml import types
from quantmix.ggml.weights import WeightsFile, open_weights


def task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run probes one after another.

    Emits `{"base": …}` once, then per probe `{"starts": i}` and the measured values with
    `{"index": i}`, or `{"index": i, "why": …}` when the type cannot be had.
    """
    weights = open_weights(request["source"])
    threads = request["threads"] or default_threads()
    matrix = imatrices.read(request["imatrix"]) if request["imatrix"] else None
    quantizer = Quantizer(weights, matrix, threads)
    corpus = read_corpus(request["corpus"])
    with Session(
        Path(request["source"]), n_ctx=request["n_ctx"], threads=threads, mmap=False, reuse=False
    ) as session:
        swapper = Swapper(session, weights, quantizer)
        runner = Evaluator(session, threads)
        chunks = session.chunks(session.tokenize(corpus.text), request["chunks"])
        if len(chunks) < request["chunks"]:
            raise UsageError(
                f"{corpus.path} gives {len(chunks)} chunks, {request['chunks']} are wanted: "
                f"use --chunks {len(chunks)}"
            )
        rows = [runner.encode(chunk) for chunk in chunks]

        def scores() -> Scores:
            return join([runner.score(c, b) for c, b in zip(chunks, rows, strict=True)])

        again = scores()
        around: dict[str, str] = request["around"]
        swapper.set_mix(around)
        emit({"base": _base(again, scores() if around else again)})
        for index, probe in enumerate(request["probes"]):
            emit({"starts": index})
            started = time.perf_counter()
            try:
                found = _probe(probe, around, swapper, weights, scores)
            except UsageError as err:
                emit({"index": index, "why": str(err)})
                continue
            emit({"index": index, **found, "seconds": time.perf_counter() - started})
    return {}


def _base(again: Scores, around: Scores) -> dict[str, Any]:
    """Describe the base: its own PPL, the KLD of a repeated pass, the KLD of the mix around."""
    assert again.kld is not None
    assert again.base_nll is not None
    floor = float(abs(again.kld).mean())
    mixed = around.divergence().mean
    return {
        "tokens": len(again.nll),
        "ppl_base": Scores(again.base_nll).perplexity().ppl,
        "noise_floor": floor,
        "around_kld": mixed if around is not again else 0.0,
    }


def _probe(
    probe: dict[str, Any],
    around: dict[str, str],
    swapper: Swapper,
    weights: WeightsFile,
    scores: Any,
) -> dict[str, Any]:
    """Swap one group, score, and return the values of a `measurements.Probe`."""
    names, asked = probe["tensors"], probe["type"]
    unseen = swapper.unseen(names)
    if len(unseen) == len(names):
        raise UsageError(f"the engine's graph never reads {unseen[0]}: swapping it does nothing")
    lost = swapper.set_mix({**around, **dict.fromkeys(names, asked)})
    result: Scores = scores()
    divergence, ratio = result.divergence(), result.log_ratio()
    infos = [weights.tensors[n][0] for n in names]
    elements = [i.n_bytes * i.type.block_size // i.type.type_size for i in infos]
    written = [types.resolve(asked, i.name, i.shape).name for i in infos]
    return {
        "kld": divergence.mean,
        "kld_err": divergence.err,
        "ln_ratio": ratio.mean,
        "ln_ratio_err": ratio.err,
        "err": sum(lost[n] * e for n, e in zip(names, elements, strict=True)) / sum(elements),
        "n_elements": sum(elements),
        "tokens": len(result.nll),
        "fallbacks": sum(w != asked for w in written),
    }


def mix_task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Set one mix by hot swap and score it against stored log-probabilities of the base."""
    started = time.perf_counter()
    weights = open_weights(request["source"])
    threads = request["threads"] or default_threads()
    matrix = imatrices.read(request["imatrix"]) if request["imatrix"] else None
    corpus = read_corpus(request["corpus"])
    base = BaseReader(Path(request["logits_base"]))
    with Session(
        Path(request["source"]), n_ctx=request["n_ctx"], threads=threads, mmap=False, reuse=False
    ) as session:
        tokens = session.tokenize(corpus.text)
        chunks = session.chunks(tokens, request["chunks"])
        base.require(describer(native.engine_id(), corpus, tokens, session, len(chunks))(weights))
        swapper = Swapper(session, weights, Quantizer(weights, matrix, threads))
        swapper.set_mix(request["mix"])
        runner = Evaluator(session, threads)
        parts = []
        for i, chunk in enumerate(chunks):
            parts.append(runner.score(chunk, base.rows(i)))
            emit({"chunk": i + 1, "of": len(chunks)})
    found = join(parts).divergence()
    return {
        "kld": found.mean,
        "kld_err": found.err,
        "seconds": time.perf_counter() - started,
        "forward_seconds": runner.forward_seconds,
    }


def errors_task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Quantize every (tensor, type) of `jobs`; return rows (tensor, type, error).

    With `max_rows` only about so many rows of each tensor.
    """
    weights = open_weights(request["source"])
    matrix = imatrices.read(request["imatrix"]) if request["imatrix"] else None
    quantizer = Quantizer(weights, matrix, request["threads"] or default_threads())
    rows = []
    for i, (name, asked) in enumerate(request["jobs"]):
        if request["max_rows"]:
            error = quantizer.sample_error(name, asked, request["max_rows"])
        else:
            error = quantizer.quantize(name, asked).error
        rows.append([name, asked, error])
        emit({"job": i + 1, "of": len(request["jobs"]), "tensor": name, "type": asked})
    return {"errors": rows}
