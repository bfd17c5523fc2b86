"""Published measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantmix.errors import BadFile
from quantmix.ggml.types import get
from quantmix.loss import evidence, features, load, prior
from quantmix.loss.predictor import FittedModel
from quantmix.models.catalog import catalog
from quantmix.models.model import Model
from quantmix.store import Measurement

from .conftest import catalog_model


def test_every_published_row_has_a_source_a_catalog_model_and_the_one_bench() -> None:
    """Nothing is shipped without its page; corpora and contexts are never mixed."""
    rows = evidence.published()
    assert len(rows) > 500
    for r in rows:
        assert r.source.startswith("https://")
        assert r.model in catalog()
        assert (r.corpus, r.n_ctx) == ("wiki.test.raw", 512)
        assert r.ppl > 1.0


def test_bases_of_the_two_r1_are_the_published_ones() -> None:
    """The unquantized perplexities that the field quotes."""
    assert evidence.base_ppl("deepseek-r1") == 3.3490
    assert evidence.base_ppl("deepseek-r1-0528") == 3.2130
    assert evidence.base_ppl("gemma-3-27b-it") is None


def test_no_measured_mix_of_r1_is_silently_dropped() -> None:
    """Rows used and rows skipped with a reason are all rows."""
    model = catalog_model("deepseek-r1-0528")
    rows = evidence.of_model(model)
    bench = evidence.bench(model, prior.shares(model), rows)
    assert len(bench.rows) + len(bench.skipped) == len(rows)
    assert all(why for _, why in bench.skipped)
    assert sum(r.exact for r in bench.rows) >= 10


def test_size_alone_is_evidence_for_sparse_models_only(r1: Model, small: Model) -> None:
    """A dense model's rows without a mix are skipped with a reason."""
    for model, used in ((r1, True), (small, False)):
        rows = evidence.of_model(model)
        bench = evidence.bench(model, prior.shares(model), rows)
        assert any(not r.exact for r in bench.rows) == used


def test_features_of_exact_rows_sum_to_one() -> None:
    """A fully quantized mix has all of the sensitivity on some type."""
    model = catalog_model("deepseek-r1-0528")
    bench = evidence.bench(model, prior.shares(model), evidence.of_model(model))
    for row in bench.rows:
        if row.exact:
            assert np.isclose(row.w.sum(), 1.0)


def test_experts_and_feed_forward_are_told_apart_by_depth(r1: Model) -> None:
    """A mix that spares the late experts has other features than one that spares the early ones."""
    share = prior.shares(r1)
    early, late = (
        features.of_types(
            r1,
            share,
            [
                "iq2_k" if t.role.endswith("_exps") and ((t.layer or 0) < 30) == low else "q8_0"
                for t in r1.tensors
            ],
        )
        for low in (True, False)
    )
    column = features.columns()["iq2_k"]
    at = {g: i for i, g in enumerate(features.GROUPS)}
    assert early[at["experts, early"], column] > 0.0
    assert early[at["experts, late"], column] == 0.0
    assert late[at["experts, early"], column] == 0.0
    assert late[at["experts, late"], column] > 0.0


def test_published_mixes_nearest_in_size_carry_their_source() -> None:
    """Three mixes around the size asked for, largest first."""
    model = catalog_model("deepseek-r1-0528")
    found = evidence.nearest(model, 220 * 2**30)
    bits = [b for _, b in found]
    assert len(found) == 3
    assert bits == sorted(bits, reverse=True)
    assert all(abs(b - 2.8) < 0.3 for b in bits)
    assert all(p.source.startswith("https://") for p, _ in found)


def _own(model: Model, name: str, ln_ratio: float, corpus: str = "c") -> Measurement:
    types = {t.name: name for t in model.tensors if t.quantizable}
    return Measurement(
        model="f", mix=name, data="d", model_name="m", file=f"{name}.gguf", corpus=corpus,
        n_ctx=512, chunks=8, tokens=2040, engine="ik", build="b", ctk="f16", ctv="f16",
        tensor_bytes=1, bpw=4.0, ppl=20.0 * float(np.exp(ln_ratio)), ppl_err=0.1, seconds=1.0,
        ln_ratio=ln_ratio, base="x", types=types,
    )  # fmt: skip


def test_own_measurements_calibrate_on_their_own_base_and_are_never_mixed(small: Model) -> None:
    """Three mixes on one text make a bench; another text, or two mixes, do not add to it."""
    rows = [_own(small, "iq4_k", 0.09), _own(small, "iq3_k", 0.5), _own(small, "q6_K", 0.01)]
    other = [
        _own(small, "iq5_k", 2.0, corpus="another"),
        replace(_own(small, "q8_0", 2.0), ln_ratio=None),
    ]
    model = load(small, own=[*rows, *other])
    quality = model.quality(small, [get("iq4_k") if t.quantizable else None for t in small.tensors])
    assert quality.ppl_base == pytest.approx(20.0)
    assert quality.ln_ppl_ratio == pytest.approx(0.09, rel=0.15)
    published = load(small).quality(small, [None] * len(small.tensors))
    few = load(small, own=rows[:2]).quality(small, [None] * len(small.tensors))
    assert few.ppl_base == published.ppl_base != pytest.approx(20.0)


def _rise(model: Model, own: list[Measurement], name: str) -> tuple[float, float]:
    mix = [get(name) if t.quantizable else None for t in model.tensors]
    q = load(model, own=own).quality(model, mix)
    return q.ln_ppl_ratio, (q.ln_ppl_ratio_high or 0.0) - (q.ln_ppl_ratio_low or 0.0)


def test_the_error_of_own_rows_counts(small: Model) -> None:
    """Rows of a short text move the prediction less, and leave it less sure, than sure ones."""
    ratios = {"q6_K": 0.03, "iq4_k": 0.3, "iq3_k": 1.2}
    found = []
    for err in (1e-5, 0.05, 0.5):
        rows = [replace(_own(small, n, r), ln_ratio_err=err) for n, r in ratios.items()]
        found.append(_rise(small, rows, "iq4_xs"))
    alone = FittedModel.of(small, measured=()).quality(
        small, [get("iq4_xs") if t.quantizable else None for t in small.tensors]
    )
    away = [abs(rise - alone.ln_ppl_ratio) for rise, _ in found]
    assert away == sorted(away, reverse=True)
    assert away[2] < 0.5 * away[0]
    relative = [width / rise for rise, width in found]
    assert relative == sorted(relative)


def test_more_files_of_little_text_do_not_replace_few_of_much(small: Model) -> None:
    """The group that tells most calibrates, not the one with most rows."""
    much = [
        replace(_own(small, n, r), ln_ratio_err=0.001)
        for n, r in (("q6_K", 0.01), ("iq4_k", 0.09), ("iq3_k", 0.5))
    ]
    little = [
        replace(_own(small, n, 3 * r, corpus="short"), ln_ratio_err=0.05)
        for n, r in (("q8_0", 0.01), ("q6_K", 0.01), ("iq4_k", 0.09), ("iq3_k", 0.5))
    ]
    assert _rise(small, [*much, *little], "iq4_xs") == _rise(small, much, "iq4_xs")


def test_two_sure_files_do_not_hide_three(small: Model) -> None:
    """Only groups of three mixes compete; the base measured against itself is no mix."""
    three = [
        replace(_own(small, n, r), ln_ratio_err=0.004)
        for n, r in (("q6_K", 0.01), ("iq4_k", 0.09), ("iq3_k", 0.5))
    ]
    sure = [replace(r, corpus="sure", ln_ratio_err=1e-4) for r in three[:2]]
    assert _rise(small, [*sure, *three], "iq4_xs") == _rise(small, three, "iq4_xs")
    base = replace(_own(small, "bf16", 0.0), corpus="sure", ln_ratio_err=0.0)
    assert _rise(small, [*sure, base], "iq4_xs") == _rise(small, [], "iq4_xs")


def test_own_files_made_without_a_matrix_do_not_calibrate(small: Model) -> None:
    """They would count the missing matrix twice."""
    rows = [_own(small, n, r) for n, r in (("q4_K", 0.2), ("iq4_xs", 0.3), ("q3_K", 2.0))]
    without = [replace(r, imatrix=0) for r in rows]
    assert (
        _rise(small, without, "iq4_k") == _rise(small, [], "iq4_k") != _rise(small, rows, "iq4_k")
    )


def test_a_mix_measured_twice_is_one_row(small: Model) -> None:
    """The mean of both runs counts, whichever was first."""
    rows = [_own(small, n, r) for n, r in (("q6_K", 0.01), ("iq4_k", 0.09), ("iq3_k", 0.5))]
    again = replace(rows[1], ln_ratio=0.11, ppl=20.0 * float(np.exp(0.11)))
    mean = replace(rows[1], ln_ratio=0.10, ppl=20.0 * float(np.exp(0.10)))
    one = _rise(small, [*rows, again], "iq4_k")
    assert one[0] == pytest.approx(_rise(small, [again, *rows], "iq4_k")[0])
    assert one[0] == pytest.approx(_rise(small, [rows[0], mean, rows[2]], "iq4_k")[0], rel=1e-3)


def test_an_own_file_that_contradicts_the_others_is_named(small: Model) -> None:
    """q8_0 half a nat above the base, while iq3_k costs less, is no fact about q8_0."""
    rows = [_own(small, n, r) for n, r in (("q8_0", 0.5), ("iq4_k", 0.09), ("iq3_k", 0.4))]
    mix = [get("iq4_k") if t.quantizable else None for t in small.tensors]
    assert any("q8_0.gguf" in w for w in load(small, own=rows).quality(small, mix).warnings)
    fine = [_own(small, n, r) for n, r in (("q8_0", 0.0005), ("iq4_k", 0.09), ("iq3_k", 0.4))]
    assert not any(".gguf" in w for w in load(small, own=fine).quality(small, mix).warnings)


def test_rows_are_compared_with_their_own_base() -> None:
    """Another run of the base moves a row with it; another text is no evidence and says so."""
    model = catalog_model("llama-3-8b")
    rows = [r for r in evidence.of_model(model) if r.mix and r.imatrix][:6]
    base = evidence.base_ppl(model.id)
    assert base is not None
    share = prior.shares(model)
    plain = evidence.bench(model, share, [replace(r, base_ppl=base) for r in rows])
    moved = [replace(r, base_ppl=base * 1.01, ppl=r.ppl * 1.01) for r in rows]
    assert [r.ln_ppl for r in evidence.bench(model, share, moved).rows] == pytest.approx(
        [r.ln_ppl for r in plain.rows]
    )
    other = evidence.bench(model, share, [replace(r, base_ppl=7.0) for r in rows])
    assert not other.rows
    assert all("compared with a base of 7" in why for _, why in other.skipped)


def test_no_matrix_is_read_in_any_case(tmp_path: Path) -> None:
    """`No` is as good as `no`."""
    row = {"model": "m", "label": "x", "ppl": "5", "corpus": "c", "n_ctx": "512"}
    read = evidence.parse_rows([{**row, "imatrix": v} for v in ("no", "No ", "NO", "yes", "")])
    assert [r.imatrix for r in read] == [False, False, False, True, True]


def test_a_csv_of_other_measurements(tmp_path: Path) -> None:
    """Columns are checked, names become catalog ids, numbers must be numbers."""
    file = tmp_path / "m.csv"
    head = "model,label,bpw,ppl,corpus,n_ctx,mix\n"
    file.write_text(head + "DeepSeek-R1,mine,4.5,3.4,wiki.test.raw,512,all=q4_K\n")
    row = evidence.read_csv(file)[0]
    assert (row.model, row.ppl, row.mix) == ("deepseek-r1", 3.4, "all=q4_K")
    file.write_text(head + "DeepSeek-R1,mine,4.5,x,wiki.test.raw,512,\n")
    with pytest.raises(BadFile, match=r"m\.csv: ppl 'x' of 'mine' is not a positive number"):
        evidence.read_csv(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(BadFile, match="columns"):
        evidence.read_csv(file)
    with pytest.raises(BadFile, match="cannot be read"):
        evidence.read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("ppl", "nan"),
        ("ppl", "inf"),
        ("bpw", "-4"),
        ("n_ctx", "many"),
        ("base_ppl_bf16_or_q8", "0"),
    ],
)
def test_what_is_no_positive_number_is_named(tmp_path: Path, column: str, value: str) -> None:
    """A number that is none, not finite or not above zero is a bad file, in every column."""
    row = {"model": "DeepSeek-R1", "label": "mine", "bpw": "4.5", "ppl": "3.4",
           "corpus": "wiki.test.raw", "n_ctx": "512", "base_ppl_bf16_or_q8": "3.2"}  # fmt: skip
    row[column] = value
    file = tmp_path / "m.csv"
    file.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    with pytest.raises(BadFile, match=f"{column} '{value}' of 'mine'"):
        evidence.read_csv(file)


def test_a_csv_that_is_none_is_a_bad_file(tmp_path: Path) -> None:
    """A field longer than the reader takes, or a line cut short, is no traceback."""
    file = tmp_path / "m.csv"
    head = "ppl,label,n_ctx,corpus,model\n"
    file.write_text(head + "3.4," + "x" * 200_000 + "\n")
    with pytest.raises(BadFile, match="cannot be read"):
        evidence.read_csv(file)
    file.write_text(head + "3.4,mine\n")
    assert evidence.read_csv(file)[0].model == ""
