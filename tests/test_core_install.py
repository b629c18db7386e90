"""The core install: a fresh environment without torch, ray or vllm judges an application over HTTP and gates it."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 400
FACTS = {
    f"How tall is tower {name}?": f"Tower {name} is {40 + n} metres tall." for n, name in enumerate("ABCDEFGHIJKL")
}
REFUSAL = "I don't know."


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with requirements-core.lock and goldgate's wheel, nothing else."""
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".venv*", ".git", ".goldgate", "build", ".dvc", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    uv = str(ROOT / ".venv" / "bin" / "uv")
    python = str(folder / "venv" / "bin" / "python")

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    run(uv, "venv", "--python", sys.executable, str(folder / "venv"))
    lock = str(ROOT / "requirements-core.lock")
    run(uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes", "-r", lock)
    build = [uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(folder / "dist")]
    run(*build, str(source))
    wheel = next((folder / "dist").glob("*.whl"))
    run(uv, "pip", "install", "--python", python, "--no-deps", str(wheel))
    return folder / "venv"


class Application(http.server.BaseHTTPRequestHandler):
    """Somebody else's application, in its own shape: it answers and does not tell what it retrieved."""

    broken = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = FACTS.get(body["q"], REFUSAL)
        if self.broken and body["q"] in FACTS:
            text = "The tower is made of cheese."
        data = json.dumps({"result": {"says": text}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def application() -> Iterator[tuple[str, type[Application]]]:
    handler = type("Handler", (Application,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/ask", handler
    server.shutdown()
    server.server_close()


def goldgate(core: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "GOLDGATE_STORE"}}
    command = [str(core / "bin" / "goldgate"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_it_is_small_and_carries_nothing_heavy(core: Path) -> None:
    site = core / "lib" / "python3.11" / "site-packages"
    heavy = {"torch", "ray", "vllm", "transformers", "qdrant_client", "qdrant_edge", "dvc"}
    assert {path.name for path in site.iterdir()} & heavy == set()
    size_mb = sum(p.stat().st_size for p in core.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6
    print(f"core install: {size_mb:.0f} MB")
    assert size_mb < LIMIT_MB


def write_project(folder: Path, url: str) -> None:
    cases = [
        {"id": f"fact-{n}", "question": q, "expected_answer": a, "must_say": [a.split()[3]], "answerable": True}
        for n, (q, a) in enumerate(FACTS.items())
    ]
    cases.append({"id": "unknown", "question": "What does it weigh?", "answerable": False})
    (folder / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    (folder / "params.toml").write_text("", encoding="utf-8")
    (folder / "system.toml").write_text(
        f'url = "{url}"\nbody = {{ q = "{{question}}" }}\n[reply]\nanswer = "$.result.says"\n', encoding="utf-8"
    )
    (folder / "gate.toml").write_text(
        'zero_tolerance = ["leaks"]\n'
        '[[conditions]]\nmetric = "correctness"\nmargin = 0.5\nfloor = 0.1\n'
        '[[conditions]]\nmetric = "abstention"\nmargin = 0.5\n',
        encoding="utf-8",
    )


def measure(core: Path, folder: Path, build: str) -> None:
    common = ("--golden", "cases.jsonl", "--build", build)
    answered = goldgate(core, folder, "answer", "--system", "system.toml", *common)
    assert answered.returncode == 0, answered.stderr
    evaluated = goldgate(core, folder, "evaluate", *common)
    assert evaluated.returncode == 0, evaluated.stderr
    for metric in ("contextual_relevance", "evidence_recall", "answer_relevance"):
        assert f"{metric}: not measured:" in evaluated.stdout


def test_it_judges_an_application_over_http(
    core: Path, application: tuple[str, type[Application]], tmp_path: Path
) -> None:
    url, handler = application
    write_project(tmp_path, url)
    measure(core, tmp_path, "production")
    alone = goldgate(
        core, tmp_path, "gate", "--policy", "gate.toml", "--golden", "cases.jsonl", "--build", "production"
    )
    assert alone.returncode == 4, alone.stdout + alone.stderr
    assert "NO BASELINE" in alone.stdout
    measure(core, tmp_path, "same")
    against = ("--against", "production/report.json", "--policy", "gate.toml", "--golden", "cases.jsonl", "--json")
    same = goldgate(core, tmp_path, "gate", *against, "--build", "same")
    assert same.returncode == 0, same.stdout + same.stderr
    assert json.loads(same.stdout)["verdict"] == "PASS"
    handler.broken = True
    measure(core, tmp_path, "worse")
    worse = goldgate(core, tmp_path, "gate", *against, "--build", "worse")
    assert worse.returncode == 1, worse.stdout + worse.stderr
    assert json.loads(worse.stdout)["verdict"] == "FAIL"


def test_what_needs_the_extras_says_so(core: Path, tmp_path: Path) -> None:
    (tmp_path / "params.toml").write_text("", encoding="utf-8")
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "a.md").write_text("# A\n\nSome text.\n", encoding="utf-8")
    done = goldgate(core, tmp_path, "build")
    assert done.returncode == 6, done.stderr
    assert "install goldgate[cpu]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
