"""Tensor lists generated from hyper-parameters, against lists of real files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
from pathlib import Path

import pytest

from quantmix.errors import UnknownName
from quantmix.ggml.types import get, resolve
from quantmix.models.arch import ARCHITECTURES, base, tensors_of
from quantmix.models.catalog import catalog
from quantmix.models.model import Model
from quantmix.models.sources import load_model

HERE = Path(__file__).parent
DIGESTS = list(csv.DictReader((HERE / "tensor_digests.csv").open()))
ACTIVE = {r["model"]: r for r in csv.DictReader((HERE / "active_params.csv").open())}
RESEARCH = os.environ.get("QUANTMIX_RESEARCH")


def lines(model: Model) -> list[str]:
    """The tensor list as sorted `name shape dtype` lines."""
    return sorted(f"{t.name} {'x'.join(map(str, t.shape))} {t.source_type}" for t in model.tensors)


@pytest.mark.parametrize("row", DIGESTS, ids=lambda r: r["model"] + r["layout"])
def test_list_equals_the_digest_of_a_real_list(row: dict[str, str]) -> None:
    """Names, shapes and dtypes equal those of a published map or log, bytes included."""
    model = load_model(row["model"], layout=row["layout"] or None)
    assert len(model.tensors) == int(row["n_tensors"])
    assert model.n_elements == int(row["n_elements"])
    assert sum(get(t.source_type).tensor_bytes(t.shape) for t in model.tensors) == int(row["bytes"])
    assert hashlib.sha256("\n".join(lines(model)).encode()).hexdigest() == row["sha256"]


@pytest.mark.skipif(RESEARCH is None, reason="QUANTMIX_RESEARCH does not name the raw tables")
@pytest.mark.parametrize("row", DIGESTS, ids=lambda r: r["model"] + r["layout"])
def test_list_equals_the_raw_list(row: dict[str, str]) -> None:
    """The raw list, when at hand, is reproduced line by line."""
    slug = row["model"] + (".ik-mla" if row["layout"] == "ik" else "")
    path = Path(str(RESEARCH)) / "data" / "tensors" / f"{slug}.tsv.gz"
    with gzip.open(path, "rt") as f:
        raw = [
            (r["name"], base.drop_ones(map(int, r["shape"].split("x"))), r["dtype"])
            for r in csv.DictReader(f, delimiter="\t")
        ]
    real = sorted(f"{n} {'x'.join(map(str, s))} {d}" for n, s, d in raw)
    assert lines(load_model(row["model"], layout=row["layout"] or None)) == real


@pytest.mark.parametrize("model_id", list(catalog()))
def test_counts_and_sizes_of_every_model(model_id: str) -> None:
    """Counts, weights, active weights and bytes at bf16 and q8_0 equal independent figures."""
    entry, row, model = catalog()[model_id], ACTIVE[model_id], load_model(model_id)
    assert len(model.tensors) == len(model.by_name) == entry.n_tensors
    assert model.n_elements == entry.total_params
    active = sum(t.n_elements * t.active_fraction for t in model.tensors)
    assert active == pytest.approx(int(row["params_active"]), rel=1e-9)
    as_is = sum(get(t.source_type).tensor_bytes(t.shape) for t in model.tensors)
    assert as_is == int(row["bf16_bytes"])
    if entry.arch != "gpt-oss":  # its figure leaves the mxfp4 experts as they are
        written = (
            (t.shape, resolve("q8_0", t.name, t.shape) if t.quantizable else get(t.source_type))
            for t in model.tensors
        )
        q8 = sum(kind.tensor_bytes(shape) for shape, kind in written)
        assert q8 == int(row["q8_0_bytes"])


@pytest.mark.parametrize(
    ("model", "layout", "count"),
    [
        ("deepseek-r1", "split", 1086),
        ("deepseek-r1", "ik", 1147),
        ("deepseek-r1", "legacy", 1025),
        ("deepseek-v2-lite", "split", 404),
        ("deepseek-v2-lite", "ik", 431),
        ("deepseek-v2-lite", "legacy", 377),
        ("kimi-k2", "split", 1096),
        ("kimi-k2", "ik", 1157),
    ],
)
def test_mla_layouts(model: str, layout: str, count: int) -> None:
    """The three MLA layouts hold as many tensors as real files do."""
    assert len(load_model(model, layout=layout).tensors) == count


def test_ik_layout_reads_the_duplicate_once() -> None:
    """attn_kv_b beside its two halves adds bytes to the file but none to a token."""
    split, ik = load_model("r1", layout="split"), load_model("r1", layout="ik")
    assert ik.n_elements - split.n_elements == 61 * 16_777_216
    assert ik.by_name["blk.0.attn_kv_b.weight"].active_fraction == 0
    legacy = load_model("r1", layout="legacy")
    assert legacy.by_name["blk.0.attn_kv_b.weight"].active_fraction == 1


def test_mtp_blocks_are_in_the_file_but_not_loaded() -> None:
    """The NextN block counts for the file only."""
    air = load_model("glm-4.5-air")
    unloaded = [t for t in air.tensors if not t.loaded]
    assert {t.layer for t in unloaded} == {46}
    assert sum(t.n_elements for t in unloaded) == pytest.approx(3.62e9, rel=0.01)
    assert all(t.active_fraction == 0 for t in unloaded)


def test_embedding_is_read_in_full_only_when_tied() -> None:
    """A stored head makes the embedding a row lookup."""
    assert load_model("llama-3.1-8b").by_name["token_embd.weight"].active_fraction == 0
    assert load_model("llama-3.2-1b").by_name["token_embd.weight"].active_fraction == 1


def test_indexer_layers_with_a_step() -> None:
    """GLM-5.2 keeps an indexer in blocks 0-2, then every fourth from 6, and in the MTP block."""
    layers = {t.layer for t in load_model("glm-5.2").tensors if t.role == "indexer.proj"}
    assert layers == {0, 1, 2, *range(6, 79, 4)}


def test_file_order_starts_and_ends_as_the_converter_writes() -> None:
    """Embedding first, blocks by number, final norm and head last."""
    model = load_model("deepseek-r1")
    assert model.tensors[0].name == "token_embd.weight"
    assert [t.name for t in model.tensors[-2:]] == ["output_norm.weight", "output.weight"]
    layers = [t.layer for t in model.tensors if t.layer is not None]
    assert layers == sorted(layers)


def test_unknown_architecture_is_named() -> None:
    """An architecture nobody knows is refused with the nearest one."""
    with pytest.raises(UnknownName, match="glm4moe"):
        tensors_of(catalog()["glm-4.5"].hparams, "glm4mo")
    assert set(ARCHITECTURES) >= {e.arch for e in catalog().values()}
