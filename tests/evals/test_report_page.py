"""The HTML report in a real browser: it renders, calls nothing, and logs no error."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from goldgate.evals.gate import decide
from goldgate.evals.policy import load_policy
from goldgate.evals.report import pages
from goldgate.pipeline.store import write_files
from tests.evals.reports import candidate, production, touch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("the Debian package chromium is not installed (GOLDGATE_APT=1 installs it)")
    return found


def browse(chromium: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", *options, (folder / "report.html").as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_page_renders_without_errors_or_requests(chromium: str, tmp_path: Path) -> None:
    policy = load_policy(ROOT / "golden" / "gate.toml")
    report, baseline = (
        candidate(touch(range(0, 60, 2), scores={"evidence_recall": 0.0, "correctness": 0.0})),
        production(),
    )
    verdict = decide(report, baseline, policy, baseline_release="b" * 64)
    assert verdict.verdict == "FAIL"
    write_files(tmp_path, pages(verdict, report, baseline))
    shown = browse(chromium, tmp_path, "--dump-dom")
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "FAIL" in shown.stdout
    assert "evidence_recall" in shown.stdout
    assert "<svg" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if ":CONSOLE" in line] == []
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for attribute in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert attribute not in page


def test_a_script_error_would_be_seen(chromium: str, tmp_path: Path) -> None:
    """The check above can fail: a page that logs an error does."""
    (tmp_path / "report.html").write_text("<html><script>undefined_function()</script></html>", encoding="utf-8")
    shown = browse(chromium, tmp_path, "--dump-dom")
    assert [line for line in shown.stderr.splitlines() if ":CONSOLE" in line] != []
