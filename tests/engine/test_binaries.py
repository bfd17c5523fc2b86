"""The user's own programs: probing, running, reading what they print."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from quantmix.engine import binaries
from quantmix.errors import EngineError, EngineMissing

IK_TAIL = "Final estimate: PPL over 3 chunks for n_ctx=512 = 7.3210 +/- 0.04521"
ML_TAIL = "0.01.234.567 I Final estimate: PPL = 7.3210 +/- 0.04521"
KLD = """
====== Perplexity statistics ======
Mean PPL(Q)                   :   8.100000 ±   0.100000
Mean PPL(base)                :   8.000000 ±   0.090000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.12%
Mean ln(PPL(Q)/PPL(base))     :   0.012423 ±   0.001200
Mean PPL(Q)/PPL(base)         :   1.012500 ±   0.001215
Mean PPL(Q)-PPL(base)         :   0.100000 ±   0.010000

====== KL divergence statistics ======
Mean    KLD:   0.021000 ±   0.000300
Maximum KLD:   3.500000
99.9%   KLD:   1.100000
99.0%   KLD:   0.210000
95.0%   KLD:   0.070000
90.0%   KLD:   0.050000
Median  KLD:   0.010000
10.0%   KLD:   0.000100

====== Token probability statistics ======
Mean    Δp: -0.190 ± 0.030 %
Same top p: 93.250 ± 0.300 %
"""

# The head of ik's real output (it states no number of chunks), and what a base against itself says.
TABLE = """kl_divergence: 1.16 seconds per pass - ETA 0.03 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS
   1      24.4402 ±    4.7557      -0.00000 ±       -nan      -0.00000 ±    0.00000     0.001 ±
   2      32.1595 ±    4.3197      -0.00000 ±       -nan       0.00000 ±    0.00000     0.001 ±
"""


def _program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _perplexity(
    folder: Path, output: str, status: int = 0, flags: str = "-mla --no-escape"
) -> Path:
    return _program(
        folder,
        "llama-perplexity",
        f"if sys.argv[1] == '--help': print({('usage: -m -f ' + flags)!r}); sys.exit(1)\n"
        "if sys.argv[1] == '--version':\n"
        "    print('version: 4567 (abc1234)', file=sys.stderr); sys.exit(0)\n"
        f"open({str(folder / 'argv')!r}, 'w').write(' '.join(sys.argv))\n"
        f"sys.stdout.write({output!r}); sys.exit({status})",
    )


def _run(folder: Path, **more: object) -> binaries.ParsedRun:
    binary = binaries.probe("llama-perplexity", folder)
    return binaries.perplexity(binary, "m.gguf", "t.txt", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", [IK_TAIL, ML_TAIL])
def test_the_final_line_of_both_engines(tmp_path: Path, tail: str) -> None:
    """PPL and its error come from the final line, chunks from the table before it."""
    out = f"perplexity: calculating perplexity over 3 chunks\n[1]7.1,[2]7.2,[3]7.3210,\n{tail}\n"
    _perplexity(tmp_path, out)
    seen: list[tuple[int, float]] = []
    found = _run(tmp_path, on_chunk=lambda i, v: seen.append((i, v)))
    assert (found.perplexity.ppl, found.perplexity.ppl_err) == (7.3210, 0.04521)
    assert (found.chunks, found.perplexity.tokens) == (3, 765)
    assert seen == [(1, 7.1), (2, 7.2), (3, 7.3210)]


def test_nan_with_exit_zero_is_a_failure(tmp_path: Path) -> None:
    """ik prints nan and no final line, and exits 0."""
    _perplexity(tmp_path, "[1]7.1,[2]nan,\nUnexpected negative standard deviation of log(prob)\n")
    with pytest.raises(EngineError, match="NaN"):
        _run(tmp_path)


def test_no_final_line_is_a_failure(tmp_path: Path) -> None:
    """Success is the final line, whatever the exit code."""
    _perplexity(tmp_path, "[1]7.1,[2]7.2,\n")
    with pytest.raises(EngineError, match="no final estimate"):
        _run(tmp_path)


def test_a_failing_program_shows_what_it_complained_of(tmp_path: Path) -> None:
    """The lines that say what went wrong are in the message, not the noise after them."""
    _perplexity(tmp_path, "noise\nerror: failed to load model\nmore noise\n" + "bye\n" * 9, 1)
    with pytest.raises(EngineError, match="exited with 1: error: failed to load model"):
        _run(tmp_path)


def test_kld_statistics(tmp_path: Path) -> None:
    """Every figure of the statistics block is read."""
    _perplexity(tmp_path, "kl_divergence: computing over 8 chunks\n" + KLD)
    found = _run(tmp_path, logits_base="b.kld")
    assert found.divergence == binaries.Divergence(
        0.021, 0.0003, 0.01, 0.05, 0.21, 3.5, pytest.approx(0.9325)
    )
    assert found.log_ratio == binaries.LogRatio(0.012423, 0.0012)
    assert found.perplexity.ppl == 8.1
    assert "--kl-divergence " in (tmp_path / "argv").read_text() + " "


def test_chunks_of_the_kld_table_are_counted(tmp_path: Path) -> None:
    """ik counts chunks only by the rows of its table: progress and tokens come from there."""
    _perplexity(tmp_path, TABLE + KLD.replace("±   0.001200", "±       -nan"))
    seen: list[tuple[int, float]] = []
    found = _run(tmp_path, logits_base="b.kld", on_chunk=lambda i, v: seen.append((i, v)))
    assert (found.chunks, found.perplexity.tokens) == (2, 510)
    assert seen == [(1, 24.4402), (2, 32.1595)]
    assert found.log_ratio == binaries.LogRatio(0.012423, 0.0)


def test_a_kld_of_nan_is_a_failure(tmp_path: Path) -> None:
    """A NaN among the logits makes the mean KLD NaN, with exit 0."""
    _perplexity(tmp_path, TABLE + KLD.replace("0.021000 ±", "nan ±"))
    with pytest.raises(EngineError, match="NaN"):
        _run(tmp_path, logits_base="b.kld")


def test_each_engine_gets_its_flags(tmp_path: Path) -> None:
    """ik must not read escapes in the text, mainline must not move tensors."""
    _perplexity(tmp_path, IK_TAIL)
    _run(tmp_path)
    assert "--no-escape" in (tmp_path / "argv").read_text()
    _perplexity(tmp_path, ML_TAIL, flags="-fit -ngl")
    _run(tmp_path)
    arguments = (tmp_path / "argv").read_text()
    assert "--no-escape" not in arguments
    assert "-fit off" in arguments
    assert binaries.probe("llama-perplexity", tmp_path).id == binaries.EngineId(
        "mainline", "4567 (abc1234)"
    )


def test_missing_or_foreign_programs(tmp_path: Path) -> None:
    """A folder without the program, and a program that is something else, are named."""
    with pytest.raises(EngineMissing, match="holds no executable"):
        binaries.probe("llama-perplexity", tmp_path)
    _program(tmp_path, "llama-perplexity", "print('hello')")
    with pytest.raises(EngineError, match="names no flags"):
        binaries.probe("llama-perplexity", tmp_path)


def test_progress_arrives_while_the_program_runs(tmp_path: Path) -> None:
    """Pieces without line ends are passed on as they come."""
    path = _program(
        tmp_path,
        "slow",
        "import time\nfor i in range(3):\n    sys.stdout.write(f'[{i}]4.5,'); sys.stdout.flush()\n"
        "    time.sleep(0.2)\n",
    )
    import time

    times: list[float] = []
    status, _ = binaries.run([str(path)], lambda _: times.append(time.monotonic()))
    assert status == 0
    assert len(times) >= 2
    assert times[-1] - times[0] > 0.1


def test_characters_cut_between_two_reads_stay_whole(tmp_path: Path) -> None:
    """A ± whose two bytes come apart is read as one: its error is not lost."""
    program = _program(
        tmp_path,
        "slow",
        "import time\n"
        "for part in (b'Mean KLD: 0.021 \\xc2', b'\\xb1 0.0003\\n', b'end \\xff\\xc2'):\n"
        "    sys.stdout.buffer.write(part); sys.stdout.flush(); time.sleep(0.2)",
    )
    status, lines = binaries.run([str(program)])
    assert status == 0
    assert lines == ["Mean KLD: 0.021 ± 0.0003", "end \ufffd\ufffd"]
