"""Our figures against ik's own llama-perplexity and llama-imatrix, built from their source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mixes import mix_of, recipe_of
from programs import ik_programs

from quantmix.engine.imatrix import collect
from quantmix.engine.perplexity import evaluate
from quantmix.engine.quantize import preflight, quantize
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml.weights import open_weights
from quantmix.texts import text
from quantmix.verify import Target, verify

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNKS = 3
# One file each near 2.6, 3.4 and 5.5 bits, of types that are quantized within seconds.
TYPES = ["q2_K", "iq3_k", "q5_K"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two programs."""
    return ik_programs(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def matrix(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our importance matrix of the demo model."""
    out = tmp_path_factory.mktemp("matrix") / "ours.dat"
    collect(demo, text("imatrix"), out, chunks=2)
    return out


def test_perplexity_and_kld_of_three_files(
    demo: Path, programs: Path, matrix: Path, tmp_path: Path
) -> None:
    """PPL equals llama-perplexity's within 2e-4 relative, mean KLD within 2%, on real weights."""
    base_ours, base_theirs = tmp_path / "base.lp", tmp_path / "base.kld"
    for kind in TYPES:
        recipe = recipe_of(demo, mix_of(open_weights(demo), lambda role, layer, k=kind: k))
        made = quantize(preflight(recipe, demo, tmp_path / "q.gguf", imatrix=matrix)).path
        ours = evaluate(made, text("probe"), base=demo, logits_base=base_ours, chunks=CHUNKS)
        theirs = verify(
            Target(made, None),
            text("probe"),
            base=demo,
            logits_base=base_theirs,
            chunks=CHUNKS,
            llama_bin=programs,
            db=tmp_path / "m.db",
        ).evaluation
        made.unlink()
        assert theirs.engine.name == "ik"
        assert theirs.perplexity.tokens == ours.perplexity.tokens == 255 * CHUNKS
        assert ours.perplexity.ppl == pytest.approx(theirs.perplexity.ppl, rel=2e-4), kind
        assert ours.perplexity.ppl_err == pytest.approx(theirs.perplexity.ppl_err, rel=1e-3)
        assert ours.divergence is not None
        assert theirs.divergence is not None
        assert ours.divergence.mean == pytest.approx(theirs.divergence.mean, rel=0.02), kind
        assert ours.divergence.p90 == pytest.approx(theirs.divergence.p90, rel=0.02)
        assert ours.divergence.same_top == pytest.approx(theirs.divergence.same_top, abs=0.005)
        assert ours.log_ratio is not None
        assert theirs.log_ratio is not None
        assert ours.log_ratio.mean == pytest.approx(theirs.log_ratio.mean, rel=2e-3)


def test_importance_matrix_is_that_of_llama_imatrix(
    demo: Path, programs: Path, matrix: Path, tmp_path: Path
) -> None:
    """Same entries and, within float noise, the same means on the same chunks, head included."""
    import subprocess

    out = tmp_path / "theirs.dat"
    command = [str(programs / "llama-imatrix"), "-m", str(demo), "-f", str(text("imatrix"))]
    command += ["-o", str(out), "--chunks", "2", "-c", "512", "--no-escape", "--process-output"]
    command += ["--output-tensor-name", "token_embd.weight"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path)
    ours, theirs = imatrices.read(matrix), imatrices.read(out)
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in theirs.entries.items():
        want, found = entry.means().ravel(), ours.entries[name].means().ravel()
        np.testing.assert_allclose(found, want, rtol=2e-2, atol=1e-3 * want.mean(), err_msg=name)
        assert found.sum() == pytest.approx(want.sum(), rel=2e-3), name
