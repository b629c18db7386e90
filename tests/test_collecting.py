"""gc: what nothing needs any more goes, and with a generation go the records of how it was made."""

from __future__ import annotations

import json
import os
from pathlib import Path

from goldgate.collecting import collect
from goldgate.pipeline.store import Store
from goldgate.workspace import Workspace

OLD = 1_000_000_000.0  # seconds, long ago


def test_records_go_with_their_generations(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    workspace = Workspace(build=tmp_path / "build", store_url=str(store.root))
    for name in ("old", "young"):
        folder = store.path("generations", name)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"files": {"documents.parquet": f"digest of {name}"}}))
        store.write_json(f"made/digest of {name}-maker.json", {})
        os.utime(store.path("made", f"digest of {name}-maker.json"), (OLD, OLD))
    os.utime(store.path("generations", "old"), (OLD, OLD))
    store.write_json("made/new-maker.json", {})  # of a build that has published nothing yet
    gone = ["generations/old", "made/digest of old-maker.json"]
    assert collect(workspace, dry_run=True) == gone
    assert collect(workspace) == gone
    assert sorted(path.name for path in store.path("made").iterdir()) == [
        "digest of young-maker.json",
        "new-maker.json",
    ]
    assert collect(workspace) == []
