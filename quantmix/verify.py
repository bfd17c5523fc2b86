"""Keep the promise honest: measure a file, compare with what its recipe predicted, remember."""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantmix import anchor
from quantmix.anchor import AnchoredKld
from quantmix.engine import binaries
from quantmix.engine.child import Emit
from quantmix.engine.perplexity import Evaluation, evaluate, read_corpus
from quantmix.engine.quantize import compare
from quantmix.engine.scores import Scores
from quantmix.errors import BadFile, QuantmixError, UsageError
from quantmix.ggml.types import FLOATS, Engine
from quantmix.ggml.weights import WeightsFile, open_weights
from quantmix.loss.evidence import N_CTX, OTHER_BASE, base_ppl
from quantmix.recipe import Recipe
from quantmix.recipe import load as load_recipe
from quantmix.store import Measurement, Store
from quantmix.texts import wikitext

_QUANTILE = 1.645


@dataclass(frozen=True)
class Predicted:
    """What the recipe said, put on this text's scale.

    `ppl*` are the measured base PPL times exp(ln_ppl_ratio*) when a base was measured, else the
    recipe's own. `holds` says whether the measured value lies inside the interval, its own error
    granted; None when it cannot be compared: no interval, or another text and no base.
    """

    damage: float
    ln_ppl_ratio: float
    ppl: float | None
    ppl_low: float | None
    ppl_high: float | None
    interval: float
    holds: bool | None


@dataclass(frozen=True)
class Verified:
    """A measured file.

    `kld_here` is the KLD that own probes predict for this very text, `kld_error` what kept them
    from it, though asked to. `notes` say what the figures are not.
    """

    weights: WeightsFile
    evaluation: Evaluation
    predicted: Predicted | None
    n_elements: int
    kld_here: AnchoredKld | None = None
    kld_error: QuantmixError | None = None
    notes: tuple[str, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info, _, _ in self.weights.tensors.values())

    def to_json(self) -> dict[str, Any]:
        """Return the document of `verify --json` (docs/interface.md, verify)."""
        e = self.evaluation
        return {
            "ppl": e.perplexity.ppl,
            "ppl_err": e.perplexity.ppl_err,
            "nll": e.perplexity.nll,
            "n_ctx": e.n_ctx,
            "chunks": e.chunks,
            "tokens": e.perplexity.tokens,
            "corpus": {"sha256": e.corpus_sha256},
            "kld": asdict(e.divergence) if e.divergence else None,
            "ln_ppl_ratio": asdict(e.log_ratio) if e.log_ratio else None,
            "predicted": asdict(self.predicted) if self.predicted else None,
            # None without own probes; `predicted.damage` is on the text of the probes.
            "predicted_kld": asdict(self.kld_here) if self.kld_here else None,
            "engine": asdict(e.engine),
            "file": str(self.weights.path),
            "tensor_bytes": self.tensor_bytes,
            "bpw": 8 * self.tensor_bytes / self.n_elements,
            "forward_seconds": e.forward_seconds,
            "seconds": e.seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Target:
    """A file to measure and the recipe that promised it, if one is known."""

    file: Path
    recipe: Recipe | None


def find_target(target: str | Path, recipe: str | Path | None = None) -> Target:
    """Resolve TARGET: a GGUF, or a recipe folder whose quantized file lies in it.

    Without `recipe` it is the recipe.json in the folder, or beside the GGUF when there is one.

    Raises:
        BadFile: nothing there.
    """
    path = Path(target)
    if path.is_dir() and (path / "recipe.json").exists():
        loaded = load_recipe(recipe or path)
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise BadFile(
                f"{path} holds no quantized file yet: run `quantmix quantize {path} SOURCE`, "
                "or give the GGUF and --recipe"
            )
        return Target(_of_recipe(files, loaded), loaded)
    if recipe:
        return Target(path, load_recipe(recipe))
    beside = path.parent / "recipe.json"
    return Target(path, load_recipe(beside) if beside.exists() else None)


def _of_recipe(files: Sequence[Path], recipe: Recipe) -> Path:
    """Return the file that is the recipe's: a matrix or the source may lie beside it."""
    for file in files:
        try:
            compare(recipe, open_weights(file))
        except QuantmixError:
            continue
        return file
    named = [f for f in files if f.name.startswith(recipe.name)]
    return (named or files)[0]


def verify(
    target: Target,
    corpus: str | Path,
    *,
    base: str | Path | None = None,
    logits_base: str | Path | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    engine: Engine = "ik",
    llama_bin: str | Path | None = None,
    db: str | Path | None = None,
    probed: Path | None = None,
    imatrix: Path | None = None,
    on_event: Emit | None = None,
) -> Verified:
    """Measure, compare with the prediction, store.

    Args:
        probed: results of `measure` on `base`: the KLD they predict for this text (one pass more,
            see `quantmix.anchor`) is then reported; `imatrix` is the one they were made with.
        llama_bin: folder of the user's own llama-perplexity, used instead of the packaged library
            (GPUs, large models); `logits_base` is then a file in its own format.

    Raises:
        CheckFailed: the file's tensors are not those of the recipe.
        BadFile, UsageError, EngineError: as `perplexity.evaluate` and `anchor`.
    """
    weights = open_weights(target.file)
    if target.recipe:
        compare(target.recipe, weights)
    planned = _plan_anchor(weights, probed, base, imatrix, engine, llama_bin)
    with Store(db) as store, ExitStack() as stack:
        if planned and not logits_base:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmix-"))
            logits_base = Path(scratch) / "base.lp"
        if llama_bin:
            run = _OwnBinary(binaries.probe("llama-perplexity", llama_bin), n_ctx, chunks, threads)
            found = run.evaluate(weights.path, corpus, base, logits_base, on_event)
        else:
            found = evaluate(
                weights.path,
                corpus,
                base=base,
                logits_base=logits_base,
                n_ctx=n_ctx,
                chunks=chunks,
                threads=threads,
                engine=engine,
                on_event=on_event,
            )
        whole = chunks is None
        predicted = predict(target.recipe, found, whole_text=whole) if target.recipe else None
        n_elements = sum(math.prod(info.shape) for info, _, _ in weights.tensors.values())
        verified = Verified(weights, found, predicted, n_elements, notes=_base_note(base))
        store.add(_row(verified, base))
        if planned and logits_base:
            verified = _with_kld(
                verified, planned, Path(corpus), Path(logits_base), threads, on_event
            )
    return verified


def _base_note(base: str | Path | None) -> tuple[str, ...]:
    """Say so where the base is a quantized file itself, unless it was trained that way."""
    if base is None:
        return ()
    weights = open_weights(base)
    by_type: dict[str, int] = defaultdict(int)
    for info, _, _ in weights.tensors.values():
        by_type[info.type.name] += info.n_bytes
    top = max(by_type, key=lambda n: by_type[n])
    if top in (*FLOATS, "mxfp4"):
        return ()
    return (
        f"the base, {weights.path.name}, is quantized itself (mostly {top}): KLD and ln(PPL/base) "
        "are against it, not against the unquantized model",
    )


def _with_kld(
    verified: Verified,
    planned: anchor.Plan,
    corpus: Path,
    logits_base: Path,
    threads: int | None,
    on_event: Emit | None,
) -> Verified:
    """Return `verified` with the KLD that probes predict for this text, or why there is none.

    What was measured stands, perhaps after hours; the caller reports the error.
    """
    try:
        here = anchor.predict(
            planned,
            corpus,
            logits_base,
            chunks=verified.evaluation.chunks,
            n_ctx=verified.evaluation.n_ctx,
            threads=threads,
            on_event=on_event,
        )
    except QuantmixError as err:
        return replace(verified, kld_error=err)
    return replace(verified, kld_here=here)


def _plan_anchor(
    weights: WeightsFile,
    probed: Path | None,
    base: str | Path | None,
    imatrix: Path | None,
    engine: Engine,
    llama_bin: str | Path | None,
) -> anchor.Plan | None:
    """Return the anchor to predict the KLD with, None when no measurements are given.

    Raises:
        BadFile, UsageError: as `anchor`, which needs the base and the packaged engine: only there
            can weights be swapped.
    """
    if probed is None:
        if imatrix is not None:
            raise UsageError("--imatrix belongs to --measurements: give both, or neither")
        return None
    if base is None:
        raise UsageError("--measurements predicts a KLD: give the unquantized GGUF by --base")
    if engine != "ik" or llama_bin:
        raise UsageError(
            "--measurements needs the packaged ik engine: use neither --engine nor --llama-bin"
        )
    known = anchor.open_probed(Path(base), probed, imatrix)
    if weights.model_fingerprint != known.measured.model:
        raise BadFile(f"{base} is not the base of {weights.path}: names, shapes or norms differ")
    return anchor.plan(known, weights.types())


@dataclass(frozen=True, slots=True)
class _OwnBinary:
    """The user's llama-perplexity with the settings of one verification."""

    binary: binaries.Binary
    n_ctx: int
    chunks: int | None
    threads: int | None

    def evaluate(
        self,
        model: Path,
        corpus: str | Path,
        base: str | Path | None,
        logits_base: str | Path | None,
        on_event: Emit | None,
    ) -> Evaluation:
        """Run it, over the base first when its log-probabilities are not there yet."""
        started = time.perf_counter()
        text = read_corpus(corpus)
        with tempfile.TemporaryDirectory(prefix="quantmix-") as scratch:
            stored = Path(logits_base) if logits_base else Path(scratch) / "base.kld"
            if base and not stored.exists():
                self._run(base, corpus, stored, make_base=True)
            against = stored if base or logits_base else None
            found = self._run(model, corpus, against, on_event=on_event)
        seconds = time.perf_counter() - started
        return Evaluation(
            perplexity=found.perplexity,
            divergence=found.divergence,
            log_ratio=found.log_ratio,
            chunks=found.chunks,
            n_ctx=self.n_ctx,
            corpus_sha256=text.sha256,
            engine=self.binary.id,
            seconds=seconds,
            forward_seconds=seconds,
            per_token=Scores(np.empty(0)),
        )

    def _run(
        self,
        model: str | Path,
        corpus: str | Path,
        logits_base: Path | None,
        make_base: bool = False,
        on_event: Emit | None = None,
    ) -> binaries.ParsedRun:
        def report(index: int, value: float) -> None:
            if on_event:
                on_event({"chunk": index, "of": self.chunks, "ppl": value})

        return binaries.perplexity(
            self.binary,
            model,
            corpus,
            n_ctx=self.n_ctx,
            chunks=self.chunks,
            threads=self.threads,
            logits_base=logits_base,
            make_base=make_base,
            on_chunk=report,
        )


def predict(recipe: Recipe, found: Evaluation, *, whole_text: bool = True) -> Predicted:
    """Put the recipe's prediction on the scale of the measured text.

    `whole_text` is False when only some of its chunks were measured.
    """
    q = recipe.quality
    low, high = q.ln_ppl_ratio_low, q.ln_ppl_ratio_high
    if found.log_ratio is not None:
        ppl_base = found.perplexity.ppl / math.exp(found.log_ratio.mean)
        ppl: float | None = ppl_base * math.exp(q.ln_ppl_ratio)
        bounds = [ppl_base * math.exp(x) if x is not None else None for x in (low, high)]
    else:
        ppl, bounds = q.ppl, [q.ppl_low, q.ppl_high]
    holds = None
    if bounds[0] is not None and bounds[1] is not None and _comparable(recipe, found, whole_text):
        own = math.exp(_QUANTILE * found.log_ratio.err) if found.log_ratio else 1.0
        holds = bounds[0] / own <= found.perplexity.ppl <= bounds[1] * own
    return Predicted(q.damage, q.ln_ppl_ratio, ppl, bounds[0], bounds[1], q.interval, holds)


def _comparable(recipe: Recipe, found: Evaluation, whole_text: bool) -> bool:
    """Whether a measured perplexity is on the scale of the prediction.

    With a base it is. Without one only on the whole text that published perplexities are of, and
    not where own probes or files of another text were the basis: their base is another.
    """
    if found.log_ratio is not None:
        return True
    q, base = recipe.quality, base_ppl(recipe.model.id)
    published = found.corpus_sha256 == wikitext.SHA256 and found.n_ctx == N_CTX and whole_text
    other = base and q.ppl_base and abs(math.log(q.ppl_base / base)) > OTHER_BASE
    return published and q.basis != "measured" and not other


def _row(verified: Verified, base: str | Path | None) -> Measurement:
    """Return the store's row."""
    weights, found = verified.weights, verified.evaluation
    kld, ratio = found.divergence, found.log_ratio
    metadata: Mapping[str, Any] = weights.metadata
    return Measurement(
        model=weights.model_fingerprint,
        mix=weights.mix_fingerprint,
        data=weights.data_fingerprint,
        model_name=str(metadata.get("general.name", weights.path.stem)),
        file=str(weights.path),
        corpus=found.corpus_sha256,
        n_ctx=found.n_ctx,
        chunks=found.chunks,
        tokens=found.perplexity.tokens,
        engine=found.engine.name,
        build=found.engine.build,
        ctk="f16",
        ctv="f16",
        tensor_bytes=verified.tensor_bytes,
        bpw=8 * verified.tensor_bytes / verified.n_elements,
        ppl=found.perplexity.ppl,
        ppl_err=found.perplexity.ppl_err,
        seconds=found.seconds,
        kld=kld.mean if kld else None,
        kld_err=kld.err if kld else None,
        ln_ratio=ratio.mean if ratio else None,
        ln_ratio_err=ratio.err if ratio else None,
        base=open_weights(base).data_fingerprint if base and kld else None,
        same_top=kld.same_top if kld else None,
        predicted=asdict(verified.predicted) if verified.predicted else {},
        types=weights.types(),
        imatrix=int(any(str(key).startswith("quantize.imatrix.") for key in metadata)),
    )
