"""Rigs from what people type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.budget import with_cpu
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.rig.cards import cards, find_card, slug, usable_of_size
from quantmix.rig.rigs import (
    ideal_rig,
    load_rig,
    load_rig_file,
    parse_gpus,
    real_cards_for,
    rig_names,
)
from quantmix.units import GIB, MIB


def usable(text: str) -> list[int]:
    """Capacities of a list in whole MiB."""
    return [(g.capacity_bytes or 0) // MIB for g in parse_gpus(text).gpus]


def test_cards_by_name_in_cuda_order() -> None:
    """Names expand in the order given, with what nvidia-smi shows as total."""
    rig = parse_gpus("2xrtx-5090, 2xrtx-4090")
    assert usable("2xrtx-5090, 2xrtx-4090") == [32607, 32607, 24564, 24564]
    assert [g.name for g in rig.gpus] == ["GPU0", "GPU1", "GPU2", "GPU3"]
    assert rig.gpus[0].bandwidth_gbs == 1792
    assert not rig.has_ram


def test_marketing_sizes_are_capped_and_literal_ones_are_not() -> None:
    """96G is what the least 96 GB card shows; 96GiB, 96GB and a size nobody sells are literal."""
    assert usable("1x96G") == [97887]
    assert usable("96GiB,20G") == [98304, 20480]
    assert usable("96GB") == [96 * 10**9 // MIB]
    for size in (16, 24, 32, 48, 80):
        assert usable(f"{size}G")[0] * MIB == usable_of_size(size) < size * GIB


@pytest.mark.parametrize("text", ["4090", "RTX 4090", "rtx4090", "GeForce RTX 4090", "rtx_4090"])
def test_a_card_in_any_spelling(text: str) -> None:
    """Names match whatever the case, spaces and dashes; short numbers are aliases, not bytes."""
    assert parse_gpus(text).gpus[0].card == "rtx-4090"


def test_unknown_cards_suggest_the_nearest() -> None:
    """A card that is not in the table is an error that names near ones."""
    with pytest.raises(UnknownName, match="rtx-5090"):
        parse_gpus("rtx-5091")


@pytest.mark.parametrize("name", ["foo", "24G"])
def test_an_unknown_cpu_is_not_answered_with_sizes(name: str) -> None:
    """Only `quantmix rigs` knows CPU platforms; a size of memory is none."""
    with pytest.raises(UnknownName, match=f"unknown CPU platform '{name}'.*rigs") as caught:
        find_card(name, "cpu")
    assert "24G" not in str(caught.value).replace(f"'{name}'", "")


@pytest.mark.parametrize("text", ["", "0x24G", "65x24G", "24G,,24G", "0G"])
def test_lists_that_make_no_sense(text: str) -> None:
    """Empty items, no cards and absurd counts are refused."""
    with pytest.raises(UsageError):
        parse_gpus(text)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(sorted(cards()))), min_size=1, max_size=5)
)
def test_every_gpu_of_the_table_can_be_typed(items: list[tuple[int, str]]) -> None:
    """A list of any known cards gives exactly those, counted and in order."""
    gpus = [(n, key) for n, key in items if cards()[key].kind != "cpu"]
    if not gpus:
        return
    rig = parse_gpus(",".join(f"{n}x{key}" for n, key in gpus))
    assert [g.card for g in rig.gpus] == [key for n, key in gpus for _ in range(n)]
    assert all(g.capacity_bytes and g.capacity_bytes > 0 for g in rig.gpus)


def test_the_table_is_consistent() -> None:
    """Keys are slugs, no spelling means two cards, nothing is usable beyond the marketing size."""
    seen: dict[str, str] = {}
    for card in cards().values():
        assert card.key == slug(card.key)
        assert card.source
        assert find_card(card.key) is card
        if card.kind == "gpu":
            assert card.usable_bytes is not None
            assert card.memory_gib is not None
            assert card.usable_bytes <= card.memory_gib * GIB
            for name in {slug(s) for s in (card.key, card.name, *card.aliases)}:
                assert seen.setdefault(name, card.key) == card.key


def test_the_ideal_rig_is_literal() -> None:
    """--vram is one device of exactly that many bytes, without stated RAM."""
    rig = ideal_rig(192 * GIB)
    assert rig.ideal
    assert [g.capacity_bytes for g in rig.gpus] == [192 * GIB]
    assert rig.host.capacity_bytes is None


def test_what_192g_means_on_real_cards() -> None:
    """192 GiB are one 192 GB card, two RTX PRO 6000, 4x48G or 8x24G, each a little short."""
    found = {c.gpus: c for c in real_cards_for(192 * GIB)}
    assert {"1xmi300x", "2xrtx-pro-6000", "4x48G", "8x24G"} <= set(found)
    pro = found["2xrtx-pro-6000"]
    assert pro.usable_bytes == 2 * 97887 * MIB
    assert pro.shortfall_bytes == 192 * GIB - pro.usable_bytes
    for gpus, option in found.items():
        assert sum(g.capacity_bytes or 0 for g in parse_gpus(gpus).gpus) == option.usable_bytes


def test_an_odd_total_takes_enough_cards() -> None:
    """A total that no card divides is made up by a few cards that hold at least as much."""
    options = real_cards_for(100 * GIB)
    assert options
    assert all(c.count <= 8 for c in options)
    assert any(c.gpus == "2xrtx-pro-6000" and c.shortfall_bytes == 0 for c in options)


@pytest.mark.parametrize("name", rig_names())
def test_every_shipped_rig_loads(name: str) -> None:
    """Each rig of the field parses, has a source, and says what its file name says."""
    found = load_rig_file(name)
    assert found.source
    assert found.rig.name == name
    assert found.rig.gpus
    if name.endswith("g") and "-" in name:
        ram = name.rsplit("-", 1)[1]
        assert found.ram.lower() == ram


def test_rig_files_and_their_errors(tmp_path: Path) -> None:
    """A TOML file is read by its keys; an unknown key or bad value names itself."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'gpus = "1x24G"\nram = "64G"\ncpu = "desktop-ddr5-6000-2ch"\ncpu_cores = 8\n'
        'desktop = true\nram_reserve = "8G"\nreserve = "1G"\n'
    )
    rig = load_rig(file)
    assert (rig.name, rig.desktop, rig.cpu_cores) == ("mine", True, 8)
    assert rig.host.capacity_bytes == 64 * GIB
    assert rig.host.bandwidth_gbs == 96.0
    assert rig.ram_reserve_bytes == 8 * GIB
    assert rig.gpus[0].reserve_bytes == GIB
    for text, part in [
        ('gpu = "1x24G"', "unknown key 'gpu'"),
        ('gpus = "1x24G"\ncpu_cores = "many"', "cpu_cores"),
        ('gpus = "nonesuch-9000"', "nonesuch-9000"),
        ("name = 'x'", "neither"),
        ("gpus = ", "cannot be read"),
        ("gpus = 3", "mine.toml"),
        ('gpus = "1x24G"\ndesktop = "no"', "desktop = 'no' must be true or false"),
    ]:
        file.write_text(text)
        with pytest.raises(BadFile, match=part):
            load_rig(file)
    with pytest.raises(BadFile, match="no rig file"):
        load_rig(tmp_path / "gone.toml")
    with pytest.raises(UnknownName, match="16x3090"):
        load_rig("16x309")


def test_small_cards_are_left_out_in_turn() -> None:
    """The smallest first; none as large as the largest; a desktop goes with its card."""
    rig = replace(parse_gpus("8G,24G,2G,24G"), desktop=True)
    assert rig.card_sets() == ((0, 1, 2, 3), (0, 1, 3), (1, 3))
    assert [g.name for g in rig.only((1, 3)).gpus] == ["GPU1", "GPU3"]
    assert (rig.only((0, 1)).desktop, rig.only((1, 3)).desktop) == (True, False)
    assert parse_gpus("2x24G").card_sets() == ((0, 1),)


def test_a_cpu_is_the_same_by_flag_and_by_file(tmp_path: Path) -> None:
    """`--cpu` tells the speed model as much of a CPU as a rig file does."""
    file = tmp_path / "r.toml"
    file.write_text('gpus = "rtx-4090"\nram = "64G"\ncpu = "epyc-ddr5-4800-12ch"\n')
    by_flag = with_cpu(parse_gpus("rtx-4090"), "epyc-ddr5-4800-12ch", None)
    by_file = load_rig(file)
    assert by_flag.cpu_class == by_file.cpu_class == "zen4"
    assert by_flag.host.bandwidth_gbs == by_file.host.bandwidth_gbs
