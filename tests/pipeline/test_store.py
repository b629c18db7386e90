"""The store on a real disk: crash safety, locks between processes, disks that are full or read-only, wrong formats."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import Principal
from goldgate.pipeline.store import (
    STORE_FORMAT,
    Store,
    digest_bytes,
    digest_file,
    digest_json,
    json_bytes,
    replace_files,
)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below `root` with its bytes, folders with None; temporary and lock folders too."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB that is really full when it is full."""
    yield from mounted(tmp_path / "small", "size=2m")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", options, "none", str(folder)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---------------------------------------------------------------- opening


def test_open_creates_a_store_that_opens_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a" / "store")
    assert json.loads((store.root / "format.json").read_text()) == {"format_version": STORE_FORMAT}
    before = tree(store.root)
    assert Store.open(str(store.root)) == store
    assert tree(store.root) == before


def test_the_place_comes_from_the_variable_and_else_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GOLDGATE_STORE", raising=False)
    assert Store.open().root == tmp_path / ".goldgate"
    monkeypatch.setenv("GOLDGATE_STORE", str(tmp_path / "other"))
    assert Store.open().root == tmp_path / "other"
    assert Store.open(f"file://{tmp_path / 'third'}").root == tmp_path / "third"


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket", "memory://x"])
def test_a_remote_store_is_refused_in_words(url: str) -> None:
    with pytest.raises(UsageError, match="a local folder for now"):
        Store.open(url)


@pytest.mark.parametrize("content", ['{"format_version": 2}', "{}", "not json", '{"format_version": "1"}', "[1]", ""])
def test_a_newer_or_damaged_format_is_not_touched(tmp_path: Path, content: str) -> None:
    (tmp_path / "format.json").write_text(content)
    (tmp_path / "future").mkdir()
    before = tree(tmp_path)
    expected = "use a newer goldgate" if "2" in content else "is damaged"
    with pytest.raises(UsageError, match=expected):
        Store.open(tmp_path)
    assert tree(tmp_path) == before


def test_a_folder_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is not a goldgate store"):
        Store.open(tmp_path)
    assert tree(tmp_path) == before


def test_a_store_that_died_while_it_was_created_opens(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "left").mkdir(parents=True)
    Store.open(tmp_path)
    assert (tmp_path / "format.json").exists()


def test_a_path_below_a_file_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "store", tmp_path / "file"):
        with pytest.raises(EnvironmentFailure, match="cannot be written"):
            Store.open(place)


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    for folder in mounted(tmp_path / "ro", "ro,size=1m"):
        with pytest.raises(EnvironmentFailure, match=r"ro/store cannot be written: Read-only file system"):
            Store.open(folder / "store")


# ---------------------------------------------------------------- writing


def test_write_replaces_in_one_step_and_leaves_nothing_behind(store: Store) -> None:
    store.write_bytes("apps/default/x.bin", b"one")
    path = store.write_bytes("apps/default/x.bin", b"two")
    assert path.read_bytes() == b"two"
    assert list((store.root / "tmp").iterdir()) == []


def test_json_is_canonical_and_takes_records(store: Store) -> None:
    path = store.write_json("apps/a.json", {"b": Principal(tenant="t"), "a": ["ü", 1.5, None]})
    assert path.read_bytes() == json_bytes({"a": ["ü", 1.5, None], "b": {"labels": [], "tenant": "t"}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("apps/a.json", {"score": float("nan")})
    assert b"NaN" not in path.read_bytes()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a//b", "a/./b", "a\nb", "a\\b", "a\0b", "a/"])
def test_a_name_cannot_leave_the_store(store: Store, name: str) -> None:
    before = tree(store.root.parent)
    with pytest.raises(UsageError, match="not a name inside the store"):
        store.path(name)
    with pytest.raises(UsageError):
        store.write_bytes(name, b"x")
    with pytest.raises(UsageError):
        store.publish("models", name, lambda folder: None)
    with pytest.raises(UsageError), store.lock(name):
        pass
    assert tree(store.root.parent) == before


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    store = Store.open(small_disk / "store")
    store.write_bytes("apps/pointer", b"old")
    before = tree(store.root)
    with pytest.raises(EnvironmentFailure, match=r"the disk of the store .*small/store is full"):
        store.write_bytes("apps/pointer", b"n" * 4_000_000)
    with pytest.raises(EnvironmentFailure, match="is full"):
        store.publish("models", "d" * 64, fill_disk)
    with pytest.raises(EnvironmentFailure, match=r"the disk of the folder .* is full"):
        replace_files(store.root / "apps", ["pointer"], fill_disk)
    assert tree(store.root) == before
    store.write_bytes("apps/pointer", b"new")  # and the store goes on working


def fill_disk(folder: Path) -> None:
    (folder / "first").write_bytes(b"x" * 1000)
    (folder / "weights").write_bytes(b"x" * 4_000_000)


# ---------------------------------------------------------------- publishing


def test_publish_is_complete_or_absent(store: Store) -> None:
    def breaks(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("the step failed")

    before = tree(store.root)
    with pytest.raises(ValueError, match="the step failed"):
        store.publish("generations", "abc", breaks)
    assert tree(store.root) == before
    assert not store.has("generations", "abc")
    path = store.publish("generations", "abc", lambda folder: write(folder / "deep" / "file", "whole"))
    assert (path / "deep" / "file").read_text() == "whole"
    assert store.has("generations", "abc")


def test_what_is_published_is_returned_untouched(store: Store) -> None:
    store.publish("models", "abc", lambda folder: write(folder / "file", "first"))
    called: list[Path] = []
    again = store.publish("models", "abc", called.append)
    assert (called, (again / "file").read_text()) == ([], "first")


def test_the_first_of_two_publishers_wins(store: Store) -> None:
    def meanwhile(folder: Path) -> None:
        write(folder / "file", "second")
        store.publish("models", "abc", lambda other: write(other / "file", "first"))

    assert (store.publish("models", "abc", meanwhile) / "file").read_text() == "first"
    assert list((store.root / "tmp").iterdir()) == []


def test_an_error_of_the_step_is_not_blamed_on_the_store(store: Store) -> None:
    with pytest.raises(NotADirectoryError):
        store.publish("models", "abc", lambda folder: Path("/dev/null/x").read_text() and None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ---------------------------------------------------------------- processes

CHILD = """
import sys, time
from pathlib import Path
from goldgate.pipeline.store import Store
store = Store.open(sys.argv[1])
def hold(folder):
    (folder / "half").write_text("half")
    print("in", flush=True)
    time.sleep(60)
with store.lock("build"):
    store.publish("models", "abc", hold)
"""


@pytest.fixture
def other_process(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A second process in the middle of publishing, with the build lock."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_two_processes_contend_for_a_lock(store: Store, other_process: subprocess.Popen[str]) -> None:
    with pytest.raises(Refused, match="another build is running in the store"), store.lock("build"):
        pass
    with store.lock("promote"):
        pass  # other names are free
    other_process.send_signal(signal.SIGKILL)
    with store.lock("build", wait_s=30):
        pass  # the lock ended with its process


def test_a_killed_process_leaves_only_garbage(store: Store, other_process: subprocess.Popen[str]) -> None:
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert not store.has("models", "abc")
    assert len(list((store.root / "tmp").iterdir())) == 1
    assert store.sweep() == []  # young: it may belong to a running process
    assert len(store.sweep(older_than_s=0)) == 1
    assert list((store.root / "tmp").iterdir()) == []
    assert store.publish("models", "abc", lambda folder: write(folder / "file", "whole")).is_dir()


def test_ctrl_c_while_publishing_leaves_the_store_as_it_was(store: Store, other_process: subprocess.Popen[str]) -> None:
    other_process.send_signal(signal.SIGINT)
    other_process.wait()
    assert not store.has("models", "abc")
    assert list((store.root / "tmp").iterdir()) == []


def test_a_lock_is_held_against_the_same_process_too(store: Store) -> None:
    with store.lock("build"):
        begin = time.monotonic()
        with pytest.raises(Refused), store.lock("build", wait_s=0.2):
            pass
        assert time.monotonic() - begin >= 0.2
    with store.lock("build"):
        pass


# ---------------------------------------------------------------- digests

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN, PLAIN)
def test_digest_of_json_tells_values_apart(a: object, b: object) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (digest_json(a) == digest_json(b)) is same


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_digest_of_json_does_not_know_the_order_of_keys(value: dict[str, int]) -> None:
    assert digest_json(dict(reversed(value.items()))) == digest_json(value)


def test_digest_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "f") == digest_bytes(b"abc") == known
