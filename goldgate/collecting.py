"""store -> the same store without what nothing needs."""

from __future__ import annotations

import contextlib
import json
import shutil
import time

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Generation
from goldgate.pipeline.store import Store
from goldgate.serving.release import load_release
from goldgate.workspace import Workspace

MADE = "made"
"""Where pipeline/reuse.py keeps its records; that module needs pyarrow, which the core install does not have."""

YOUNG_S = 86_400
"""Entries younger than a day are kept: a build that has not been released yet may be using them."""


def collect(ws: Workspace, *, dry_run: bool = False) -> list[str]:
    """Remove generations and collections that no release and not this build folder names, and what belongs to them.

    That is the records of how they were made, and old garbage.

    Releases themselves are never removed. Returns what went (or would go), as paths relative to the store.
    """
    store = ws.store()
    needed = _needed(ws)
    gone: list[str] = []
    for kind in ("generations", "collections"):
        folder = store.path(kind)
        if not folder.is_dir():
            continue
        for entry in sorted(folder.iterdir()):
            if entry.name in needed or time.time() - entry.stat().st_mtime < YOUNG_S:
                continue
            gone.append(f"{kind}/{entry.name}")
            if not dry_run:
                shutil.rmtree(entry)
    gone += _collect_records(store, gone, dry_run=dry_run)
    if not dry_run:
        gone.extend(store.sweep())
    return gone


def _collect_records(store: Store, gone: list[str], *, dry_run: bool) -> list[str]:
    """Remove records of what was made (`pipeline/reuse.py`) whose file is in no generation that stays."""
    kept: set[str] = set()
    generations, records = store.path("generations"), store.path(MADE)
    for entry in generations.iterdir() if generations.is_dir() else ():
        if f"generations/{entry.name}" not in gone:
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):  # then its records are of no use
                kept.update(json.loads((entry / "manifest.json").read_bytes())["files"].values())
    removed = []
    for path in sorted(records.iterdir()) if records.is_dir() else []:
        if path.stem.split("-")[0] not in kept and time.time() - path.stat().st_mtime >= YOUNG_S:
            removed.append(f"{MADE}/{path.name}")
            if not dry_run:
                path.unlink()
    return removed


def _needed(ws: Workspace) -> set[str]:
    store = ws.store()
    needed: set[str] = set()
    releases = store.path("releases")
    for entry in sorted(releases.iterdir()) if releases.is_dir() else []:
        # A release that cannot be read stops the collection: what it needs is not known.
        needed.add(load_release(store, entry.name).generation)
    manifest = ws.build / "generation.json"
    if manifest.is_file():
        try:
            needed.add(Generation.model_validate(json.loads(manifest.read_bytes())).digest)
        except ValueError:
            raise UsageError(f"{manifest} is damaged", "", "run goldgate build again") from None
    return needed
