"""The KLD that probes predict for another text, held against really quantized files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "engine"))

from mixes import mix_of, recipe_of
from tiny import write_tiny

from quantmix import anchor, measure, measurements, verify
from quantmix.cli import verify as cli
from quantmix.engine.imatrix import collect
from quantmix.engine.quantize import preflight, quantize
from quantmix.errors import BadFile, EngineError, UsageError
from quantmix.ggml.weights import open_weights
from quantmix.store import Store
from quantmix.texts import text

pytestmark = pytest.mark.engine


class Bench:
    """A tiny model with an imatrix, probes on one text, a quantized mix, and another text."""

    def __init__(self, root: Path) -> None:
        self.source = write_tiny(root / "tiny.gguf")
        self.probe, self.other = root / "probe.txt", root / "other.txt"
        self.probe.write_text(text("probe").read_text()[3000:6000])
        self.other.write_text(text("test").read_text()[9000:12000])
        self.imatrix = root / "i.dat"
        collect(self.source, self.probe, self.imatrix, threads=1)
        self.probes = root / "roles.json"
        groups = measure.groups_of(open_weights(self.source), "role", ["q3_K", "q4_K", "iq3_k"])
        run = measure.Run(self.source, self.probe, self.imatrix, groups, {}, chunks=2, threads=1)
        measure.measure(run, self.probes)
        recipe = recipe_of(
            self.source,
            mix_of(open_weights(self.source), lambda role, _: "q4_K" if "ffn" in role else "iq3_k"),
        )
        self.file = root / "q.gguf"
        quantize(preflight(recipe, self.source, self.file, imatrix=self.imatrix), threads=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Made once."""
    return Bench(tmp_path_factory.mktemp("anchor"))


def _verify(
    bench: Bench, tmp_path: Path, target: Path | None = None, **more: object
) -> verify.Verified:
    arguments: dict[str, object] = {
        "base": bench.source, "probed": bench.probes, "imatrix": bench.imatrix, **more
    }  # fmt: skip
    asked = verify.find_target(target or bench.file)
    return verify.verify(asked, bench.other, threads=1, db=tmp_path / "s.db", **arguments)  # type: ignore[arg-type]


def test_the_anchor_shares_no_type_with_the_mix(bench: Bench) -> None:
    """Every quantized tensor has another type in the anchor, one that was probed."""
    types = _types(bench)
    planned = anchor.plan(_probed(bench), types)
    assert set(planned.types) == {n for n, q in types.items() if q in ("q4_K", "iq3_k")}
    assert all(planned.types[n] != types[n] for n in planned.types)
    assert set(planned.types.values()) <= {"q3_K", "q4_K", "iq3_k"}


def test_the_kld_on_another_text_is_predicted(bench: Bench, tmp_path: Path) -> None:
    """Within 15 % of what is measured there, though the text is another; the parts multiply."""
    found = _verify(bench, tmp_path)
    here, measured = found.kld_here, found.evaluation.divergence
    assert here is not None
    assert measured is not None
    assert here.kld == pytest.approx(measured.mean, rel=0.15)
    assert here.kld_low < measured.mean < here.kld_high
    assert here.kld == pytest.approx(here.probes_kld * here.text_factor)
    assert here.anchor_kld != pytest.approx(measured.mean, rel=1e-6)
    assert 0.0 < here.forward_seconds < here.seconds
    assert found.to_json()["predicted_kld"]["kld"] == here.kld
    assert _verify(bench, tmp_path, probed=None, imatrix=None).kld_here is None


def test_stored_log_probabilities_are_used_and_kept(bench: Bench, tmp_path: Path) -> None:
    """`--logits-base` serves the file and its anchor, and a second run leaves it as it is."""
    stored = tmp_path / "base.lp"
    first = _verify(bench, tmp_path, logits_base=stored)
    made = stored.stat()
    again = _verify(bench, tmp_path, logits_base=stored)
    assert (stored.stat().st_mtime_ns, stored.stat().st_ino) == (made.st_mtime_ns, made.st_ino)
    assert first.kld_here is not None
    assert again.kld_here is not None
    assert again.kld_here.kld == pytest.approx(first.kld_here.kld, rel=1e-6)


def test_an_interleaved_type_is_its_base(bench: Bench) -> None:
    """The same quantization under another name would measure the mix, not predict it."""
    types = {n: "iq3_k_r4" if q == "iq3_k" else q for n, q in _types(bench).items()}
    planned = anchor.plan(_probed(bench), types)
    swapped = {n for n, q in types.items() if q == "iq3_k_r4"}
    assert swapped
    assert {planned.types[n] for n in swapped} <= {"q3_K", "q4_K"}


@pytest.mark.parametrize("qtype", ["q8_0", "q6_K", "iq2_xxs"])
def test_types_far_from_the_probes_widen_the_interval(
    bench: Bench, tmp_path: Path, qtype: str
) -> None:
    """Probes at three and four bits say little of others: the interval holds what is measured."""
    near = anchor.plan(_probed(bench), _types(bench))
    assert near.beyond == pytest.approx(0.0)
    recipe = recipe_of(bench.source, mix_of(open_weights(bench.source), lambda *_: qtype))
    far = tmp_path / "far.gguf"
    quantize(preflight(recipe, bench.source, far, imatrix=bench.imatrix), threads=1)
    planned = anchor.plan(_probed(bench), open_weights(far).types())
    assert planned.beyond > 0.3
    assert planned.apart > near.apart
    found = _verify(bench, tmp_path, target=far)
    assert found.kld_here is not None
    assert found.evaluation.divergence is not None
    assert found.kld_here.kld_low < found.evaluation.divergence.mean < found.kld_here.kld_high


def test_an_anchor_that_fails_loses_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is printed and stored; then the error is reported, with its exit code."""

    def fail(*_: object, **__: object) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr(anchor, "predict", fail)
    found = _verify(bench, tmp_path)
    assert found.evaluation.divergence is not None
    assert found.kld_here is None
    assert isinstance(found.kld_error, EngineError)
    with Store(tmp_path / "s.db") as store:
        assert len(store.find()) == 1
    app = typer.Typer()
    cli.register(app)
    done = CliRunner().invoke(app, [
        str(bench.file), "--corpus", str(bench.other), "--base", str(bench.source),
        "--measurements", str(bench.probes), "--imatrix", str(bench.imatrix), "--threads", "1",
        "--db", str(tmp_path / "s.db"), "--json", "--quiet",
    ])  # fmt: skip
    assert json.loads(done.stdout)["kld"]["mean"] > 0.0
    assert "out of memory" in done.stderr
    assert done.exit_code == EngineError.exit_code


def _probed(bench: Bench) -> anchor.Probed:
    return anchor.open_probed(bench.source, bench.probes, bench.imatrix)


def _types(bench: Bench) -> dict[str, str]:
    return dict(open_weights(bench.file).types())


def test_what_does_not_belong_together_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Probes of another model or imatrix, no base, another engine: each names the mend."""
    other = write_tiny(tmp_path / "other.gguf", seed=5)
    with pytest.raises(BadFile, match="was not measured on"):
        _verify(bench, tmp_path, base=other)
    with pytest.raises(UsageError, match="give it by --imatrix"):
        _verify(bench, tmp_path, imatrix=None)
    foreign = tmp_path / "f.dat"
    foreign.write_bytes(bench.imatrix.read_bytes()[:-4] + b"abcd")
    with pytest.raises(BadFile, match="another imatrix"):
        _verify(bench, tmp_path, imatrix=foreign)
    with pytest.raises(BadFile, match="cannot be read"):
        _verify(bench, tmp_path, imatrix=tmp_path / "none.dat")
    with pytest.raises(BadFile, match="cannot be read"):
        _verify(bench, tmp_path, imatrix=tmp_path)
    with pytest.raises(UsageError, match="by --base"):
        _verify(bench, tmp_path, base=None)
    with pytest.raises(UsageError, match="packaged ik engine"):
        _verify(bench, tmp_path, engine="mainline")
    with pytest.raises(UsageError, match="belongs to --measurements"):
        _verify(bench, tmp_path, probed=None)


def test_what_the_probes_do_not_know_is_said(bench: Bench, tmp_path: Path) -> None:
    """Nothing quantized, and a mix whose damage lies mostly in roles that were not measured."""
    floats = dict.fromkeys(_types(bench), "f16")
    with pytest.raises(UsageError, match="nothing in the file is quantized"):
        anchor.plan(_probed(bench), floats)
    known = measurements.load(bench.probes)
    few = replace(known, probes=tuple(p for p in known.probes if p.role == "attn_v"))
    alone = tmp_path / "few.json"
    measurements.save(few, alone)
    with pytest.raises(UsageError, match="measure them too"):
        _verify(bench, tmp_path, probed=alone)


def test_one_probed_type_is_not_enough(bench: Bench, tmp_path: Path) -> None:
    """An anchor of the very types of the mix would measure, not predict."""
    known = measurements.load(bench.probes)
    kept = [p for p in known.probes if p.type == ("q4_K" if "ffn" in p.role else "iq3_k")]
    alone = tmp_path / "alone.json"
    measurements.save(replace(known, probes=tuple(kept)), alone)
    with pytest.raises(UsageError, match="two types or more"):
        _verify(bench, tmp_path, probed=alone)
