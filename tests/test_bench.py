"""The measurements in bench/ run: each says what it compares, and the cheap ones end with a ratio at a tiny size.

What they find is not asserted: a figure belongs to a machine, and this one may be busy.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
DATA = ROOT.parent / "shared" / "data"
SHARED = {"measure", "__init__"}
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in SHARED)
LAST_LINE = r"{name}: (target met|TARGET MISSED): .+ ÷ .+, at (least|most) [\d.]+, is (\d+\.\d\d)"


def run(name: str, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and the lines of stdout."""
    try:
        code = importlib.import_module(f"bench.{name}").main(list(options))
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().out.splitlines()


def check_last(name: str, code: int, lines: list[str]) -> None:
    """The contract: the last number of the last line is the ratio; the exit code says whether that is enough."""
    assert code in {0, 1}
    found = re.fullmatch(LAST_LINE.format(name=name), lines[-1])
    assert found
    assert re.findall(r"[\d.]+", lines[-1])[-1] == found[3]
    assert lines[0].startswith("machine: ")
    if found[1] == "TARGET MISSED":
        assert code == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_path", [False, True])
def test_each_says_what_it_compares(name: str, by_path: bool) -> None:
    command = [f"bench/{name}.py"] if by_path else ["-m", f"bench.{name}"]
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")
    assert len(done.stdout.splitlines()) > 8
    assert done.stderr == ""


def test_the_page_lists_each() -> None:
    page = (BENCH / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}.py`" not in page] == []


def test_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the handbook, with the shipped double: tmp_path holds no corpora."""
    options = ["--data", str(tmp_path), "--model", "hashing", "--rounds", "1", "--queries", "12", "--texts", "90"]
    code, lines = run("query", *options, "--points", "60", "--large", "120", capsys=capsys)
    check_last("query", code, lines)
    assert sum("recall@10" in line for line in lines) == 4
    same = next(
        re.match(r"same passages in the same order: (\d+) of (\d+); (\d+) more", line)
        for line in lines
        if "same" in line
    )
    assert same
    assert int(same[1]) + int(same[3]) == int(same[2]) == 12


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("QDRANT_URL", raising=False)
    options = ["--data", str(tmp_path), "--rounds", "1", "--points", "60", "--single", "5"]
    code, lines = run("load", *options, capsys=capsys)
    check_last("load", code, lines)
    assert "a Qdrant server: not measured, QDRANT_URL is not set" in lines


@pytest.mark.engine
def test_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run("embed", "--data", str(tmp_path), "--rounds", "1", "--texts", "9", capsys=capsys)
    check_last("embed", code, lines)
    least = next(re.search(r"cosine .* least ([\d.]+)", line) for line in lines if "cosine" in line)
    assert least
    assert float(least[1]) >= 0.999


@pytest.mark.skipif(not (DATA / "evouna").is_dir(), reason="../shared/data/evouna is absent")
def test_verdict_error_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule has a row, in which what was decided at the null adds up."""
    code, lines = run("verdict_error_rates", "--samples", "2", "--sizes", "50", "--half", "tuning", capsys=capsys)
    check_last("verdict_error_rates", code, lines)
    heads, rows = None, {}
    for line in lines:
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if heads is None:
                heads = cells
            else:
                rows[name] = dict(zip(heads, map(int, cells), strict=True))
    assert len(rows) == 6
    for row in rows.values():
        assert 99 <= row["false block"] + row["null passed"] + row["null left to a person"] <= 101
    assert rows["mean drop > 1.5 points blocks"]["false block"] > rows["this gate"]["false block"]


def test_a_gate_that_passes_everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the replay of a broken rule shows its bad promotions."""
    bench = importlib.import_module("bench.verdict_error_rates")
    monkeypatch.setattr(bench, "gate_rule", lambda _policy: lambda *_: "PASS")
    rng = np.random.default_rng(0)
    labels = rng.random((600, 5)) < np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    tally = bench.replay(labels, [50], 3, 0.05)["this gate"][50]
    assert tally.share("bad", "PASS") == 1
    assert tally.share("null", "FAIL") == 0


def test_what_is_not_here_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a pass nor a miss: an exit code of its own, and the reason."""
    options = ["--data", str(tmp_path), "--documents", "100000", "--few", "100000"]
    code, lines = run("memory", *options, capsys=capsys)
    assert code == 77
    assert re.fullmatch(r"not measured: the handbook has \d+ documents; 100000 are wanted, .*", lines[-1])
    code, lines = run("memory", "--serving", str(tmp_path), capsys=capsys)
    assert code == 77
    assert lines[-1].startswith("not measured: ")
