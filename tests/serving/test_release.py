"""Releases, the production pointer and the ledger, through the front door."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import Release
from goldgate.pipeline.store import Store
from goldgate.serving import release as r

FIELDS = {
    "generation": "g" * 64, "model": "m" * 64, "prompt": "p" * 64, "retrieval": "r" * 64, "embedder": "e" * 64,
    "code": "c" * 64, "gold": "d" * 64, "policy": "o" * 64, "report": "t" * 64, "verdict": "v" * 64, "actor": "ada",
}  # fmt: skip


def make(store: Store, tmp_path: Path, name: str, *, baseline: str | None = None, word: str | None = "PASS") -> Release:
    folder = tmp_path / f"files-{name}"
    folder.mkdir(exist_ok=True)
    files = {}
    for file in r.RELEASE_FILES:
        files[file] = folder / file
        files[file].write_text(f"{file} of {name}\n", encoding="utf-8")
    fields = {**FIELDS, "baseline": baseline, "verdict_word": word}
    return r.make_release(store, files, fields, application="default", bootstrap=baseline is None)


def two_live(store: Store, tmp_path: Path) -> tuple[Release, Release]:
    first = make(store, tmp_path, "first", word=None)
    r.promote(store, first.digest, actor="ada")
    second = make(store, tmp_path, "second", baseline=first.digest)
    r.promote(store, second.digest, actor="ada")
    return first, second


def test_promote_status_rollback_and_log(store: Store, tmp_path: Path) -> None:
    first, second = two_live(store, tmp_path)
    live = r.status(store)
    assert live is not None
    assert (live.release, live.verdict, live.actor) == (second.digest, "PASS", "ada")
    r.rollback(store, actor="night", note="errors after the switch")
    assert r.production(store) == first.digest
    events = r.read_ledger(store)
    assert [e.kind for e in events] == ["promoted", "promoted", "rolled_back"]
    assert events[-1].note == "errors after the switch"
    with pytest.raises(Refused, match="no release to roll back to"):
        r.rollback(store)
    assert r.production(store) == first.digest


def test_the_same_input_is_the_same_release(store: Store, tmp_path: Path) -> None:
    assert make(store, tmp_path, "a", word=None).digest == make(store, tmp_path, "a", word=None).digest


@pytest.mark.parametrize("word", ["FAIL", "INCONCLUSIVE", "NOT_COMPUTED"])
def test_only_a_pass_is_promoted(store: Store, tmp_path: Path, word: str) -> None:
    first = make(store, tmp_path, "first", word=None)
    r.promote(store, first.digest)
    worse = make(store, tmp_path, "worse", baseline=first.digest, word=word)
    with pytest.raises(Refused, match=f"is {word}; expected PASS"):
        r.promote(store, worse.digest)
    assert r.production(store) == first.digest


def test_a_verdict_against_another_release_is_refused(store: Store, tmp_path: Path) -> None:
    first, second = two_live(store, tmp_path)
    late = make(store, tmp_path, "late", baseline=first.digest)
    with pytest.raises(Refused, match=f"judged against {first.digest[:12]}, but {second.digest[:12]} is live"):
        r.promote(store, late.digest)


def test_bootstrap_only_once(store: Store, tmp_path: Path) -> None:
    two_live(store, tmp_path)
    with pytest.raises(Refused, match="without a comparison"):
        r.promote(store, make(store, tmp_path, "again", word=None).digest)


def test_promoting_what_is_live_is_refused(store: Store, tmp_path: Path) -> None:
    _, second = two_live(store, tmp_path)
    with pytest.raises(Refused, match="already live"):
        r.promote(store, second.digest)


@pytest.mark.parametrize("name", [*r.RELEASE_FILES, "release.json"])
def test_changed_bytes_are_never_promoted(store: Store, tmp_path: Path, name: str) -> None:
    first = make(store, tmp_path, "first", word=None)
    path = r.release_folder(store, first.digest) / name
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(Refused, match=r"was changed after it was made|is damaged"):
        r.promote(store, first.digest)
    assert r.production(store) is None


def test_a_missing_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"params.toml is missing"):
        r.make_release(store, {}, FIELDS, application="default", bootstrap=True)


@pytest.mark.parametrize("prefix", ["abc", "not-hex", "../../etc", "ABCDEF0123"])
def test_bad_digests(store: Store, prefix: str) -> None:
    with pytest.raises(UsageError, match="is no release digest"):
        r.resolve_release(store, prefix)


def test_unknown_digest(store: Store) -> None:
    with pytest.raises(Refused, match="not in this store"):
        r.resolve_release(store, "0123456789ab")


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65, "büro"])
def test_bad_application_names(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        r.read_pointer(store, name)


def test_a_ledger_line_without_its_pointer_was_never_acknowledged(store: Store, tmp_path: Path) -> None:
    """A crash between the ledger and the pointer: readers see the old state, the next writer drops the line."""
    first, second = two_live(store, tmp_path)
    pointer = store.path("apps", "default") / "production.json"
    before = pointer.read_bytes()
    r.rollback(store)
    pointer.write_bytes(before)  # what the disk holds when the process died before the pointer was renamed
    assert r.production(store) == second.digest
    assert len(r.read_ledger(store)) == 2
    r.rollback(store, note="again")
    assert r.production(store) == first.digest
    assert [e.note for e in r.read_ledger(store)] == ["", "", "again"]


def test_a_forged_ledger_line_is_seen(store: Store, tmp_path: Path) -> None:
    two_live(store, tmp_path)
    path = store.path("apps", "default") / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    forged = json.loads(lines[0])
    forged["actor"] = "mallory"
    path.write_text("\n".join([json.dumps(forged, separators=(",", ":")), lines[1]]) + "\n", encoding="utf-8")
    with pytest.raises(EnvironmentFailure, match="line 2 does not follow"):
        r.read_ledger(store)


def _race(root: str, digest: str, gate: object, results: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    try:
        r.promote(Store.open(root), digest)
        results.put("won")  # type: ignore[attr-defined]
    except Refused as error:
        results.put(str(error))  # type: ignore[attr-defined]


def test_two_promoters_race_and_one_wins(store: Store, tmp_path: Path) -> None:
    first = make(store, tmp_path, "first", word=None)
    r.promote(store, first.digest)
    rivals = [make(store, tmp_path, name, baseline=first.digest).digest for name in ("left", "right")]
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_race, args=(str(store.root), d, gate, results)) for d in rivals]
    for process in processes:
        process.start()
    said = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert said[1] == "won"
    assert "judged against" in said[0]
    assert r.production(store) in rivals
    assert len(r.read_ledger(store)) == 2
