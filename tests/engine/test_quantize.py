"""Quantizing by a recipe with the real llama-quantize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixes import mix_of, recipe_of
from tiny import write_tiny

from quantmix.engine import quantize as work
from quantmix.engine.shards import split
from quantmix.errors import (
    BadFile,
    CheckFailed,
    EngineError,
    EngineMissing,
    SourceMismatch,
    UsageError,
)
from quantmix.ggml import imatrix, types
from quantmix.ggml.weights import open_weights
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata, write_sparse
from quantmix.recipe import Recipe

pytestmark = pytest.mark.engine

# These build tables or codebooks for seconds in each process that writes them.
SLOW_TABLES = {
    "iq1_s", "iq1_m", "iq2_xs", "iq2_s", "iq2_kt", "iq3_kt", "iq4_kt",
    "iq1_s_r4", "iq1_m_r4", "iq2_xxs_r4", "iq2_xs_r4", "iq2_s_r4",
}  # fmt: skip
# Known to the newest ik, not to the packaged build.
NEWER = {"mxfp4_r8"}


def _recipe(source: Path, kind: str | None = "q4_K") -> Recipe:
    return recipe_of(source, mix_of(open_weights(source), lambda role, layer: kind))


def _write_all(kinds: list[str], source: Path, matrix: Path, folder: Path) -> None:
    """Write every type in as few files as it takes; `quantize` compares types and bytes."""
    left = list(kinds)
    while left:

        def next_type(role: str, layer: int | None) -> str:
            return left.pop() if left else "q8_0"

        recipe = recipe_of(source, mix_of(open_weights(source), next_type))
        plan = work.preflight(recipe, source, folder / "q.gguf", imatrix=matrix)
        made = work.quantize(plan, threads=1)
        assert made.tensor_bytes == sum(t.bytes for t in recipe.tensors)


def test_every_writable_type_is_written_as_planned(
    tiny: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """All writable types, spread over the tensors of a few files: types and bytes as planned."""
    kinds = [
        t.name
        for t in types.table("ik").values()
        if t.is_quantized and t.writable and t.family != "ternary"
    ]
    assert set(kinds) > SLOW_TABLES
    fast = [k for k in kinds if k not in SLOW_TABLES | NEWER]
    assert len(fast) > 40
    _write_all(fast, tiny, tiny_imatrix, tmp_path)


@pytest.mark.slow
def test_types_with_big_tables_are_written_as_planned(
    tiny: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """The very-low-bit and trellis types too."""
    _write_all(sorted(SLOW_TABLES), tiny, tiny_imatrix, tmp_path)


@pytest.mark.slow
def test_every_type_on_the_demo_model(demo: Path, tmp_path: Path) -> None:
    """On the 768-wide SmolLM2 all writable types, one per small tensor: written as planned."""
    from quantmix.engine.imatrix import collect
    from quantmix.texts import text

    matrix = tmp_path / "demo.dat"
    collect(demo, text("imatrix"), matrix, chunks=2)
    kinds = [
        t.name
        for t in types.table("ik").values()
        if t.is_quantized and t.writable and t.family != "ternary" and t.name not in NEWER
    ]
    left = list(kinds)
    small = ("attn_k", "attn_v", "attn_q")
    assert 60 < len(left) <= 3 * 30

    def next_type(role: str, layer: int | None) -> str:
        return left.pop() if role in small and left else "q8_0"

    recipe = recipe_of(demo, mix_of(open_weights(demo), next_type))
    plan = work.preflight(recipe, demo, tmp_path / "q.gguf", imatrix=matrix)
    made = work.quantize(plan, threads=1)
    written = open_weights(made.path).types()
    assert {t.name: t.type for t in recipe.tensors} == written
    assert set(kinds) <= set(written.values())
    assert made.tensor_bytes == sum(t.bytes for t in recipe.tensors)


@pytest.mark.slow
def test_rows_that_do_not_divide_fall_back_as_planned(tmp_path: Path) -> None:
    """On the plain 576-wide SmolLM2 every 256-block type falls back exactly as `resolve` says."""
    from quantmix.demo import build

    try:
        source = build("plain").path
    except EngineError as err:
        pytest.skip(str(err))
    kinds = ["iq2_k", "iq4_ks", "q4_K", "iq5_k", "q6_K", "iq3_k", "q4_k_r4"]
    roles = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    by_role = dict(zip(roles, kinds, strict=True))
    mix = mix_of(open_weights(source), lambda role, _: by_role.get(role, "q6_0"))
    recipe = recipe_of(source, mix)
    fallen = sum(mix[t.name] != t.type for t in recipe.tensors)
    assert fallen > 100
    work.quantize(work.preflight(recipe, source, tmp_path / "q.gguf"))


def test_progress_and_no_debris(tiny: Path, tmp_path: Path) -> None:
    """Progress names every tensor; afterwards the folder holds the file alone."""
    events: list[dict[str, Any]] = []
    plan = work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf")
    work.quantize(plan, threads=1, on_event=events.append)
    assert [e["tensor"] for e in events] == list(range(1, len(plan.recipe.tensors) + 1))
    assert [p.name for p in tmp_path.iterdir()] == ["q.gguf"]


def test_shards_hold_the_same_tensors(tiny: Path, tmp_path: Path) -> None:
    """`--split-max-size` writes shards that load as one model, data unchanged."""
    one = work.quantize(work.preflight(_recipe(tiny), tiny, tmp_path / "one.gguf"), threads=1)
    plan = work.preflight(_recipe(tiny), tiny, tmp_path / "cut.gguf", split_max_bytes=100_000)
    cut = work.quantize(plan, threads=1)
    assert len(cut.files) > 3
    assert cut.path.name == f"cut-00001-of-{len(cut.files):05d}.gguf"
    a, b = open_weights(one.path), open_weights(cut.files[-1])
    assert list(a.tensors) == list(b.tensors)
    assert all(a.read(name) == b.read(name) for name in a.tensors)
    assert a.model_fingerprint == b.model_fingerprint == open_weights(tiny).model_fingerprint


def test_a_source_that_gets_shorter_while_it_is_cut_is_named(tmp_path: Path) -> None:
    """Reading beyond the end of a file is an error, not a wait without end."""
    whole = open_weights(write_tiny(tmp_path / "m.gguf"))
    with whole.path.open("r+b") as file:
        file.truncate(whole.n_bytes - 1000)
    with pytest.raises(BadFile, match=r"m\.gguf ends 1000 bytes early"):
        split(whole, whole.n_bytes, tmp_path / "shards")


def test_shards_of_an_aligned_file_hold_its_data(tmp_path: Path) -> None:
    """Only the first shard carries an alignment of its own; the others are read without one."""
    rows = [NewTensor(f"{letter}.weight", (40,), types.get("f32")) for letter in "abc"]
    head, size = encode_header(encode_metadata({"general.alignment": 1024}), rows, 1024)
    data = np.arange(size, dtype=np.uint32).astype(np.uint8).tobytes()
    (tmp_path / "m.gguf").write_bytes(head + data)
    whole = open_weights(tmp_path / "m.gguf")
    cut = open_weights(split(whole, 160, tmp_path / "shards")[0])
    assert len(cut.shards) == 3
    assert all(cut.read(name) == whole.read(name) for name in whole.tensors)


def test_a_shard_too_small_for_a_tensor_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    """The largest tensor decides; nothing is run."""
    with pytest.raises(UsageError, match="alone"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf", split_max_bytes=1000)


def test_no_output_takes_the_name_of_a_shard_of_the_source(tiny: Path, tmp_path: Path) -> None:
    """Neither a file nor the shards of a cut one may replace any shard of the source."""
    whole = open_weights(tiny)
    shards = split(whole, whole.n_bytes // 2, tmp_path)
    assert len(shards) > 1
    recipe = _recipe(tiny)
    for out in shards:
        with pytest.raises(UsageError, match="source itself"):
            work.preflight(recipe, shards[0], out)
    out = tmp_path / f"{tiny.stem}.gguf"
    with pytest.raises(UsageError, match="beside shards of the source"):
        work.preflight(recipe, shards[0], out, split_max_bytes=100_000)
    work.preflight(recipe, shards[0], out)
    work.preflight(recipe, shards[0], tmp_path / "new" / out.name, split_max_bytes=100_000)


def test_a_name_of_one_shard_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    """A file that says it is one of several could not be read again after the run."""
    with pytest.raises(UsageError, match="--split-max-size"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "q-00001-of-00002.gguf")


def test_types_that_need_an_imatrix_are_refused_without(tiny: Path, tmp_path: Path) -> None:
    """The message names the tensor and the command that makes one."""
    with pytest.raises(UsageError, match=r"iq2_xs needs an entry.*quantmix imatrix"):
        work.preflight(_recipe(tiny, "iq2_xs"), tiny, tmp_path / "q.gguf")


def test_a_recipe_designed_for_an_imatrix_asks_for_it(tiny: Path, tmp_path: Path) -> None:
    """Without one a warning says what that costs; not where none was planned, or at 8 bits."""
    commands = {"quantize": ["llama-quantize", "--imatrix", "IMATRIX", "SOURCE", "OUT"]}
    for kind, told in (("q4_K", [True]), ("q8_0", [])):
        recipe = _recipe(tiny, kind)
        designed = replace(recipe, commands=commands)
        plan = work.preflight(designed, tiny, tmp_path / "q.gguf")
        assert ["no --imatrix" in w for w in plan.warnings] == told
        assert work.preflight(recipe, tiny, tmp_path / "q.gguf").warnings == ()


def test_an_imatrix_of_another_model_is_refused(
    tiny: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    """Few common names, or entries of another shape, are found before the run."""
    read = imatrix.read(tiny_imatrix)
    foreign = {f"x{name}": entry for name, entry in read.entries.items()}
    imatrix.write(imatrix.Imatrix(foreign), tmp_path / "foreign.dat")
    with pytest.raises(BadFile, match="another model"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf", imatrix=tmp_path / "foreign.dat")
    short = {
        name: imatrix.Entry(np.ascontiguousarray(e.sums[:, 1:]), e.counts)
        for name, e in read.entries.items()
    }
    imatrix.write(imatrix.Imatrix(short), tmp_path / "short.dat")
    with pytest.raises(BadFile, match="shape needs"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf", imatrix=tmp_path / "short.dat")


def test_a_missing_head_entry_is_a_warning(tiny: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """Without an entry for the tied head the run goes on, warned."""
    read = imatrix.read(tiny_imatrix)
    entries = {n: e for n, e in read.entries.items() if n != "token_embd.weight"}
    imatrix.write(imatrix.Imatrix(entries), tmp_path / "i.dat")
    plan = work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf", imatrix=tmp_path / "i.dat")
    assert any("token_embd.weight" in w for w in plan.warnings)


def test_a_mainline_program_on_path_is_not_taken_for_ik(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packaged llama-quantize runs; mainline's that is named by --llama-bin is refused."""
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho 'usage: --tensor-type-file --dry-run'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    plan = work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf")
    assert plan.binary.engine == "ik"
    with pytest.raises(EngineMissing, match="mainline's llama-quantize"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf", llama_bin=tmp_path)


def test_another_model_is_a_mismatch(tiny: Path, tiny_moe: Path, tmp_path: Path) -> None:
    """A source with other tensors than the recipe's is refused by name."""
    with pytest.raises(SourceMismatch, match="not the model of this recipe"):
        work.preflight(_recipe(tiny), tiny_moe, tmp_path / "q.gguf")


def test_another_mla_layout_names_the_flag(tiny: Path) -> None:
    """A recipe for one MLA layout and a source of another names `--layout`."""
    recipe, weights = _recipe(tiny), open_weights(tiny)
    planned = replace(recipe.tensors[0], name="blk.0.attn_k_b.weight", shape=(128, 512, 4))
    split = replace(recipe, tensors=(*recipe.tensors, planned))
    weights.tensors["blk.0.attn_kv_b.weight"] = next(iter(weights.tensors.values()))
    with pytest.raises(SourceMismatch, match="design again with --layout legacy"):
        work.require_same_tensors(split, weights)


def test_a_model_without_mla_is_another_model(tiny: Path, tiny_moe: Path) -> None:
    """No `--layout` mends a recipe of DeepSeek on a file of something else."""
    recipe = _recipe(tiny)
    planned = replace(recipe.tensors[0], name="blk.0.attn_k_b.weight", shape=(128, 512, 4))
    split = replace(recipe, tensors=(*recipe.tensors, planned))
    for source in (tiny, tiny_moe):
        with pytest.raises(SourceMismatch, match="not the model of this recipe"):
            work.require_same_tensors(split, open_weights(source))


def test_a_quantized_source_needs_consent(tiny: Path, tmp_path: Path) -> None:
    """Quantizing twice is refused unless asked for, and then works."""
    first = work.quantize(
        work.preflight(_recipe(tiny, "q8_0"), tiny, tmp_path / "q8.gguf"), threads=1
    )
    again = recipe_of(first.path, mix_of(open_weights(first.path), lambda r, _: "q4_K"))
    with pytest.raises(UsageError, match="--allow-requantize"):
        work.preflight(again, first.path, tmp_path / "q4.gguf")
    plan = work.preflight(again, first.path, tmp_path / "q4.gguf", allow_requantize=True)
    work.quantize(plan, threads=1)


@pytest.mark.parametrize("kind", ["tq1_0", "nvfp4"])
def test_a_source_in_a_type_of_the_other_engine_is_quantized_too(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    """Types that mainline alone knows are named like all others."""
    source = tmp_path / "m.gguf"
    written = types.get(kind, "mainline")
    new = [
        NewTensor(name, info.shape, written if name.endswith("ffn_up.weight") else info.type)
        for name, (info, _, _) in open_weights(tiny).tensors.items()
    ]
    write_sparse(source, *encode_header(encode_metadata({"general.architecture": "llama"}), new))
    with pytest.raises(UsageError, match=rf"ffn_up.weight is {kind}\) .*--allow-requantize"):
        work.preflight(_recipe(tiny), source, tmp_path / "q.gguf")


def test_a_full_disk_and_the_source_as_out_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are found before the run."""
    with pytest.raises(UsageError, match="source itself"):
        work.preflight(_recipe(tiny), tiny, tiny)
    usage = work.shutil._ntuple_diskusage(1, 1, 1 << 20)
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="free"):
        work.preflight(_recipe(tiny), tiny, tmp_path / "new" / "q.gguf")


def test_what_the_engine_refuses_is_an_engine_error(tmp_path: Path) -> None:
    """NaN weights abort llama-quantize: its last lines are shown, nothing is left behind."""
    broken = write_tiny(tmp_path / "nan.gguf", nan=True)
    plan = work.preflight(_recipe(broken, "iq4_k"), broken, tmp_path / "out" / "q.gguf")
    with pytest.raises(EngineError, match="llama-quantize"):
        work.quantize(plan, threads=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_differs_is_named(tiny: Path, tmp_path: Path) -> None:
    """Comparison finds one differing type among all tensors."""
    made = work.quantize(work.preflight(_recipe(tiny), tiny, tmp_path / "q.gguf"), threads=1)
    recipe = _recipe(tiny)
    index = next(i for i, t in enumerate(recipe.tensors) if t.role == "ffn_down")
    changed = list(recipe.tensors)
    changed[index] = replace(changed[index], type="q5_K")
    with pytest.raises(CheckFailed, match=r"in 1 of .*ffn_down.weight is q4_K, not q5_K"):
        work.compare(replace(recipe, tensors=tuple(changed)), open_weights(made.path))
