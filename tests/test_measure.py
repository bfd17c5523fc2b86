"""Planning, resuming and surviving: the measure loop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

from tiny import write_tiny

from quantmix import measure, measurements
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.ggml.weights import open_weights
from quantmix.measurements import Failed, Measurements, Probe, TensorError
from quantmix.texts import text

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_tiny(tmp_path_factory.mktemp("m") / "tiny.gguf")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text."""
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_text(text("probe").read_text()[3000:6000])
    return path


def _run(model: Path, words: Path, scope: Any = "role", kinds: Any = ("q4_K",), **more: Any) -> Any:
    roles = more.pop("roles", ())
    groups = measure.groups_of(open_weights(model), scope, kinds, roles=roles, bands=2)
    return measure.Run(model, words, None, groups, {}, chunks=2, threads=1, **more)


def test_groups_cover_every_matrix_once(model: Path) -> None:
    """Roles, bands and tensors each partition the quantizable matrices."""
    weights = open_weights(model)
    matrices = sorted(n for n in weights.tensors if n.endswith("weight") and "norm" not in n)
    for scope, count in (("role", 8), ("band", 15), ("tensor", 15)):
        groups = measure.groups_of(weights, scope, ["q4_K"], bands=2)  # type: ignore[arg-type]
        assert len(groups) == count
        assert sorted(n for g in groups for n in g.tensors) == matrices
        assert len({g.key for g in groups}) == count


def test_names_that_do_not_exist(model: Path) -> None:
    """Unknown roles and types are refused with a suggestion."""
    weights = open_weights(model)
    with pytest.raises(UnknownName, match="ffn_down"):
        measure.groups_of(weights, "role", ["q4_K"], roles=["ffn_dwn"])
    with pytest.raises(UnknownName, match=r"'foo': it has .*ffn_down"):
        measure.groups_of(weights, "role", ["q4_K"], roles=["foo"])
    with pytest.raises(UnknownName, match="q4_K"):
        measure.groups_of(weights, "role", ["q4_k"])
    with pytest.raises(UsageError, match="q8_1 cannot be measured"):
        measure.groups_of(weights, "role", ["q8_1"])
    with pytest.raises(UsageError, match="q8_1 cannot be measured"):
        measure.tensor_errors(model, None, ["q4_K", "q8_1"])


def test_what_is_named_twice_is_measured_once(model: Path) -> None:
    """Types and roles of a list count once."""
    weights = open_weights(model)
    once = measure.groups_of(weights, "role", ["q4_K"], roles=["ffn_up"])
    assert measure.groups_of(weights, "role", ["q4_K"] * 2, roles=["ffn_up"] * 2) == once


def test_a_finished_probe_is_not_repeated(model: Path, words: Path, tmp_path: Path) -> None:
    """A second run does only what the first did not, and keeps the first's numbers."""
    out = tmp_path / "m.json"
    first = measure.measure(_run(model, words, roles=["attn_q"]), out)
    events: list[dict[str, Any]] = []
    second = measure.measure(_run(model, words, roles=["attn_q", "attn_v"]), out, events.append)
    assert [e["role"] for e in events] == ["attn_v"]
    assert second.probes[0] == first.probes[0]
    third = measure.measure(_run(model, words, roles=["attn_q", "attn_v"]), out)
    assert third.probes == second.probes


def test_kill_in_the_middle_loses_at_most_one(model: Path, words: Path, tmp_path: Path) -> None:
    """kill -9 after some probes; the rerun finishes without repeating them."""
    out = tmp_path / "m.json"
    command = [sys.executable, "-m", "quantmix.cli.main", "measure", str(model), "--types"]
    command += ["q4_K,q5_K,q3_K", "--by", "tensor", "--corpus", str(words), "--chunks", "2"]
    command += ["--threads", "1", "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, start_new_session=True)
    end = time.monotonic() + 60
    while not out.exists() or len(json.loads(out.read_text())["probes"]) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = measurements.load(out).probes
    assert 3 <= len(done) < 45
    subprocess.run(command, check=True)
    final = measurements.load(out).probes
    assert final[: len(done)] == done
    assert len(final) == len({p.key for p in final}) == 45


def test_other_conditions_are_refused(model: Path, words: Path, tmp_path: Path) -> None:
    """Results of one text, model or operating point never mix with another's."""
    out = tmp_path / "m.json"
    measure.measure(_run(model, words, roles=["attn_q"]), out)
    with pytest.raises(BadFile, match="another corpus"):
        measure.measure(_run(model, text("probe"), roles=["attn_q"]), out)


def test_a_type_that_would_abort_is_a_failed_probe(
    model: Path, words: Path, tmp_path: Path
) -> None:
    """A type that needs an imatrix and has none fails alone; the others are measured."""
    out = tmp_path / "m.json"
    found = measure.measure(_run(model, words, roles=["attn_q"], kinds=("iq1_s", "q4_K")), out)
    assert [p.type for p in found.probes] == ["q4_K"]
    (failed,) = found.failed
    assert failed.type == "iq1_s"
    assert "imatrix" in failed.why


def test_an_imatrix_of_another_model_is_refused(model: Path, words: Path, tmp_path: Path) -> None:
    """Entries of another width, or of other tensors, are named before anything runs."""
    from dataclasses import replace

    import numpy as np

    from quantmix.ggml.imatrix import Entry, Imatrix, write

    out = tmp_path / "m.json"
    for name, n, why in (("blk.0.attn_q", 512, "512 values"), ("blk.9.attn_q", 256, "0 of 15")):
        matrix = tmp_path / "i.dat"
        entry = Entry(np.ones((1, n), np.float32), np.ones(1))
        write(Imatrix({f"{name}.weight": entry}, "x", 1), matrix)
        run = replace(_run(model, words), imatrix=matrix)
        with pytest.raises(BadFile, match=f"{why}.*another model|another model.*{why}"):
            measure.measure(run, out)
    assert not out.exists()


def test_a_type_newer_than_the_engine_is_a_failed_probe(
    model: Path, words: Path, tmp_path: Path
) -> None:
    """The packaged library has no mxfp4_r8: said as such, no native crash."""
    run = _run(model, words, kinds=("mxfp4_r8",), roles=("attn_v",))
    (failed,) = measure.measure(run, tmp_path / "m.json").failed
    assert "does not know mxfp4_r8" in failed.why


def test_a_native_crash_costs_one_probe(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the child dies in a probe, that probe is noted as failed and the rest goes on."""
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('probing' in a for a in sys.argv):\n"
        "    from quantmix.engine import hotswap\n"
        "    whole = hotswap.Quantizer.quantize\n"
        "    def crash(self, name, asked):\n"
        "        if asked == 'q5_K':\n"
        "            os.write(2, b'GGML_ASSERT failed\\n')\n"
        "            os.abort()\n"
        "        return whole(self, name, asked)\n"
        "    hotswap.Quantizer.quantize = crash\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(shim))
    kinds = ("q4_K", "q5_K", "q6_K")
    found = measure.measure(_run(model, words, roles=["attn_q"], kinds=kinds), tmp_path / "m.json")
    assert [p.type for p in found.probes] == ["q4_K", "q6_K"]
    assert [f.type for f in found.failed] == ["q5_K"]
    assert "SIGABRT" in found.failed[0].why


def test_around_a_mix(model: Path, words: Path, tmp_path: Path) -> None:
    """Around a mix, a probe's KLD holds the mix's own; changing nothing gives exactly that."""
    weights = open_weights(model)
    mix = {n: "q4_K" for n in weights.tensors if ".ffn_" in n and "norm" not in n}
    groups = measure.groups_of(weights, "role", ["q4_K"], roles=["ffn_up"])
    run = measure.Run(model, words, None, groups, mix, chunks=2, threads=1)
    found = measure.measure(run, tmp_path / "m.json")
    assert found.around_kld > 100 * found.noise_floor
    assert found.probes[0].kld == pytest.approx(found.around_kld, rel=1e-9)


def test_errors_rank_types_without_a_model_run(model: Path) -> None:
    """Every matrix gets its quantization error, smaller for more bits."""
    found = measure.tensor_errors(model, None, ["q4_K", "q6_K", "iq1_s"], threads=1)
    by = {(e.tensor, e.type): e.err for e in found}
    assert len(by) == 2 * 15  # iq1_s would abort without an imatrix
    assert all(by[t, "q6_K"] < by[t, "q4_K"] / 4 for t, _ in by)


def test_sampled_errors_are_near_those_of_whole_roles(model: Path) -> None:
    """One layer of each role: types keep their order and ratio to a few percent of the whole."""
    kinds = ["q4_K", "iq4_ks", "q6_K"]
    whole = {(e.tensor, e.type): e.err for e in measure.tensor_errors(model, None, kinds)}
    sample = measure.tensor_errors(model, None, kinds, layers=1)
    assert len(sample) == 8 * 3
    assert all(e.err == pytest.approx(whole[e.tensor, e.type], rel=1e-6) for e in sample)
    few = measure.tensor_errors(model, None, ["q4_K"], layers=5)
    assert {e.tensor for e in few} == {t for t, _ in whole}


def test_errors_are_added_and_kept(model: Path, words: Path, tmp_path: Path) -> None:
    """Added errors are saved beside the probes; what was there already keeps its value."""
    out = tmp_path / "m.json"
    run = _run(model, words, roles=("attn_v",))
    first = measure.add_errors(run, measure.measure(run, out), out, ["q4_K"])
    second = measure.add_errors(run, first, out, ["q4_K", "q6_K"], layers=1)
    assert {e for e in second.errors if e.type == "q4_K"} == set(first.errors)
    assert {e.type for e in second.errors} == {"q4_K", "q6_K"}
    assert measurements.load(out) == second
    assert len(second.probes) == 1
    whole = measure.add_errors(run, second, out, ["q4_K", "q6_K"])
    assert sum(e.type == "q6_K" for e in whole.errors) == len(first.errors)
    assert measure.add_errors(run, whole, out, ["q4_K", "q6_K"]) is whole


def test_a_quantized_source_is_refused(model: Path, words: Path, tmp_path: Path) -> None:
    """Sensitivities are measured on an unquantized model."""
    from mixes import mix_of, recipe_of

    from quantmix.engine.quantize import preflight, quantize

    mix = mix_of(open_weights(model), lambda role, _: "q8_0")
    made = quantize(preflight(recipe_of(model, mix), model, tmp_path / "q.gguf"), threads=1)
    with pytest.raises(UsageError, match="already quantized"):
        measure.measure(_run(made.path, words), tmp_path / "m.json")


def test_files_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    """Every field survives; truncated, foreign and non-finite files are refused."""
    made = Measurements(
        "m", "name", "b", "ik 1", "c", None, 512, 8, 2040, 30.5, 1e-7, {"t": "q4_K"}, 0.1,
        (Probe("band", "ffn_up", (0, 1), "q4_K", 0.1, 0.01, 0.1, 0.02, 0.003, 10, 1.5, 0, 510),),
        (Failed("role", "ffn_up", (), "iq1_s", "why"),),
        (TensorError("t", "q4_K", 0.1),),
    )  # fmt: skip
    path = tmp_path / "m.json"
    measurements.save(made, path)
    assert measurements.load(path) == made
    whole = path.read_text()
    for damaged in (whole[:-40], "{}", whole.replace('"kld": 0.1', '"kld": NaN'), "[]"):
        path.write_text(damaged)
        with pytest.raises(BadFile):
            measurements.load(path)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("probes", "ln_ratio", math.nan),
        ("probes", "kld_err", "0.1"),
        ("probes", "layers", [[1]]),
        ("probes", "scope", "column"),
        ("probes", "tokens", None),
        ("errors", "err", math.inf),
        ("errors", "tensor", ["t"]),
        ("", "noise_floor", None),
        ("", "ppl_base", "30"),
        ("", "model_name", None),
        ("", "around", ["t"]),
        ("", "tokens", 10.5),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(
    tmp_path: Path, where: str, field: str, value: object
) -> None:
    """Every field of a results file is checked when it is read, numbers for being finite too."""
    path = tmp_path / "m.json"
    probe = Probe("role", "ffn_up", (), "q4_K", 0.1, 0.01, 0.1, 0.02, 0.003, 10, 1.5)
    errors = (TensorError("t", "q4_K", 0.1),)
    measurements.save(
        Measurements("m", "n", "b", "ik 1", "c", None, 512, 8, 2040, 30.5, 1e-7,
                     probes=(probe,), errors=errors), path
    )  # fmt: skip
    doc = json.loads(path.read_text())
    (doc[where][0] if where else doc)[field] = value
    path.write_text(json.dumps(doc))
    with pytest.raises(BadFile, match=f"is damaged: {field} is"):
        measurements.load(path)
