"""Pipeline files: the documented example, defaults, and errors that name job and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmix.batch.pipeline import load
from quantmix.errors import BadFile, UsageError

EXAMPLE = """
[defaults]
engine = "ik"
ctx = 32768
out = "recipes"

[[job]]
model = "deepseek-r1"
budgets = ["--vram 192G", "--gpus 2x96G,1x32G --ram 256G"]
steps = ["design", "check"]

[[job]]
model = "models/smollm2-f16.gguf"
imatrix = "models/smollm2.imatrix"
budgets = ["--size 4.5bpw", "--size 3.0bpw"]
steps = ["design", "check", "quantize", "verify", "report"]
"""


def write(folder: Path, text: str) -> Path:
    """Write a pipeline file."""
    path = folder / "p.toml"
    path.write_text(text)
    return path


def test_the_documented_example(tmp_path: Path) -> None:
    """Jobs × budgets become requests with the defaults filled in."""
    found = load(write(tmp_path, EXAMPLE))
    first, second = found.jobs
    assert (found.out, found.keep, found.disk_bytes) == (Path("recipes"), "all", None)
    assert [r.vram or r.gpus for r in first.requests] == ["192G", "2x96G,1x32G"]
    assert first.requests[1].ram == "256G"
    assert {r.ctx for j in found.jobs for r in j.requests} == {"32768"}
    assert second.steps == ("design", "check", "quantize", "verify", "report")
    assert second.imatrix == "models/smollm2.imatrix"
    assert not any(r.no_imatrix for r in second.requests)


def test_a_job_overrides_defaults_and_a_budget_overrides_its_job(tmp_path: Path) -> None:
    """The nearest value wins; another kind of budget replaces the job's."""
    text = (
        '[defaults]\nctx = 1024\nctk = "q8_0"\nvram = "9G"\n[[job]]\nmodel = "m"\nctx = 2048\n'
        'budgets = ["--ctx 4096", "--size 3bpw"]\n'
    )
    one, two = load(write(tmp_path, text)).jobs[0].requests
    assert (one.ctx, one.ctk, one.vram) == ("4096", "q8_0", "9G")
    assert (two.ctx, two.vram, two.size) == ("2048", None, "3bpw")


def test_steps_run_in_order_and_default_to_design_and_check(tmp_path: Path) -> None:
    """The order of writing does not matter."""
    base = '[[job]]\nmodel = "m"\nbudgets = ["--vram 1G"]\n'
    jobs = load(write(tmp_path, base + base + 'steps = ["check", "design"]\n')).jobs
    assert [j.steps for j in jobs] == [("design", "check")] * 2


def test_without_an_imatrix_designs_need_none(tmp_path: Path) -> None:
    """A job that quantizes without an imatrix is designed for that."""
    text = '[[job]]\nmodel = "m.gguf"\nbudgets = ["--size 4bpw"]\nsteps = ["design", "quantize"]\n'
    assert load(write(tmp_path, text)).jobs[0].requests[0].no_imatrix


JOB = '[[job]]\nmodel = "deepseek-r1"\n'
BUDGET = 'budgets = ["--vram 1G"]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no job"),
        ("[jobs]\n", "unknown table 'jobs'"),
        ("[[job]]\n" + BUDGET, "job 1: model is missing"),
        (JOB, "job 1 (deepseek-r1): budgets"),
        (JOB + 'budgets = "--vram 1G"', "job 1 (deepseek-r1): budgets"),
        (JOB + 'budgets = ["--vrm 1G"]', "job 1 (deepseek-r1): budgets: number 1: unknown flag"),
        (JOB + 'budgets = ["--vram 1G", "--ctx 9"]', "budgets: number 2: '--ctx 9' must name one"),
        (JOB + 'budgets = ["--vram 1G --size 2G"]', "must name one"),
        (JOB + 'budgets = ["--size 4bpw --reserve 1G"]', "number 1: --reserve means nothing"),
        (JOB + 'budgets = ["--vram 1G --out x"]', "--out belongs to the pipeline"),
        (JOB + BUDGET + 'imatrx = "a"', "job 1 (deepseek-r1): unknown key 'imatrx'"),
        (JOB + BUDGET + "ubatch = 1.5", "job 1 (deepseek-r1): ubatch: 1.5 is not a whole number"),
        (JOB + BUDGET + "chunks = 0", "job 1 (deepseek-r1): chunks: 0"),
        (JOB + BUDGET + "kld = 1", "job 1 (deepseek-r1): kld: 1"),
        (JOB + BUDGET + 'steps = ["desing"]', "steps: 'desing' is none of design, check"),
        (JOB + BUDGET + 'steps = ["design", "verify"]', "steps: verify needs quantize"),
        (JOB + BUDGET + 'steps = ["check"]', "steps: check needs design"),
        (JOB + BUDGET + 'keep = "last"', "job 1 (deepseek-r1): keep is for the whole pipeline"),
        (JOB + BUDGET + 'name = "x"', "name: names belong to budgets"),
        (JOB + BUDGET + "resources = { verfy = { GPU = 1 } }", "resources: 'verfy' is none of"),
        (JOB + BUDGET + "resources = { verify = { GPU = -1 } }", "verify.GPU: -1 is not"),
        ('[defaults]\nkeep = "some"\n' + JOB + BUDGET, "defaults: keep: 'some'"),
        ('[defaults]\ndisk = "many"\n' + JOB + BUDGET, "defaults: disk"),
        ("[defaults]\nubatch = 'x'\n" + JOB + BUDGET, "defaults: ubatch: 'x'"),
        (JOB * 2 + BUDGET, "job 1 (deepseek-r1): budgets"),
    ],
)
def test_errors_name_job_and_key(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake is one line with file, job and key."""
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert words in str(caught.value)
    assert str(tmp_path / "p.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_pipeline(tmp_path: Path) -> None:
    """A missing file and broken TOML are bad files."""
    with pytest.raises(BadFile):
        load(tmp_path / "nothing.toml")
    with pytest.raises(BadFile):
        load(write(tmp_path, "[[job]\n"))
