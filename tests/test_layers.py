"""Draws the arrows: imports point left, and heavy packages stay in the modules named for them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("pipeline", "serving", "evals", "goldgate")  # pipeline <- serving <- evals <- the command line
HEAVY_HOMES = {
    "ray": {"pipeline/stream.py", "serving/app.py", "serving/engine.py", "serving/ingress.py"},
    "vllm": {"serving/generate.py", "serving/engine.py"},
    "torch": {
        "pipeline/embedder.py",
        "serving/model.py",
        "serving/generate.py",
        "serving/training/lora.py",
        "serving/training/train.py",
    },
    "transformers": {"pipeline/embedder.py", "serving/model.py", "serving/generate.py", "serving/training/train.py"},
    "deepeval": {"evals/metrics.py", "evals/llm_judge.py"},
    "qdrant_client": {"pipeline/server.py"},
    "qdrant_edge": {"pipeline/edge.py", "pipeline/shard.py"},
}


def modules() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def home(path: Path) -> str:
    """Return the path below the repository (or, in a test, below the folder that stands for it)."""
    parts = path.parts
    first = max(index for index, part in enumerate(parts) if part in LAYERS)
    # `serving/training/x.py` lies two levels down, and the repository's own folder may be named goldgate.
    while first > 0 and parts[first - 1] in LAYERS[:3]:
        first -= 1
    return "/".join(parts[first:])


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def arrows(path: Path) -> list[str]:
    """Return the imports of `path` that point right."""
    layer = LAYERS.index(home(path).split("/")[0])
    wrong = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "goldgate":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in LAYERS[:3] else "goldgate"
        # The version, and the package itself, belong to nobody.
        if LAYERS.index(target) > layer and name not in {"goldgate", "goldgate.__version__"}:
            wrong.append(f"{home(path)} -> {name}")
    return sorted(wrong)


def test_imports_point_left() -> None:
    assert [arrow for path in modules() for arrow in arrows(path)] == []


def test_an_arrow_to_the_right_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "pipeline" / "read.py"
    wrong.parent.mkdir()
    wrong.write_text("from goldgate.evals.gate import decide\n", encoding="utf-8")
    assert arrows(wrong) == [
        "pipeline/read.py -> goldgate.evals.gate",
        "pipeline/read.py -> goldgate.evals.gate.decide",
    ]


@pytest.mark.parametrize("package", sorted(HEAVY_HOMES))
def test_heavy_packages_stay_home(package: str) -> None:
    users = {
        home(path)
        for path in modules()
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }
    assert users <= HEAVY_HOMES[package], f"{package} is imported in {sorted(users - HEAVY_HOMES[package])}"


def test_no_bare_imports_of_our_folders() -> None:
    bare = [f"{p}: {n}" for p in modules() for n in imports(p) if n.split(".")[0] in {"pipeline", "serving", "evals"}]
    assert bare == []


@pytest.mark.parametrize("module", ["goldgate.evals.gate", "goldgate.cli", "goldgate.pipeline.schema"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """`import goldgate.evals.gate` is instant because it loads none of these."""
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert loaded & {*HEAVY_HOMES, "scipy", "pandas", "pyarrow", "numpy"} == set()


def test_no_test_classes_outside_tests() -> None:
    """DeepEval and pytest collect `Test*`; only tests may be named so."""
    wrong = [
        f"{path.name}: {node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
    ]
    assert wrong == []
