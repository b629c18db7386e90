"""content -> address: one local folder of immutable artifacts named by their SHA-256, and the locks around it.

    format.json   made/   embeddings/   generations/   collections/   models/   answers/   releases/   apps/   tmp/
    locks/

A write goes to a temporary name in `tmp/`, is flushed to the disk and then renamed, so that a crash leaves garbage in
`tmp/` and never half an artifact. What the disk refuses (full, read-only, not permitted) is an EnvironmentFailure.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock
from pydantic import BaseModel

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError

STORE_FORMAT = 1
"""Written to format.json. A store with a higher number was made by a newer goldgate and is not touched."""

DEFAULT_STORE = ".goldgate"
STORE_VARIABLE = "GOLDGATE_STORE"

_FORMAT_FILE = "format.json"
_SYNC_THREADS = 16
_OWN_BEFORE_FORMAT = {"tmp", "locks"}  # what a crash during creation can leave beside a missing format.json
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EIO,
    errno.ELOOP,
}


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 lower-case hex digits. Raises OSError as open() does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of the canonical JSON of `value` (a record, or plain JSON data): sorted keys, no spaces, ASCII only.

    Raises ValueError for NaN and infinity, TypeError for what JSON cannot express.
    """
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return digest_bytes(text.encode("ascii"))


def json_bytes(value: object) -> bytes:
    """The stored form of a record or of plain JSON data: sorted keys, indented by 2, UTF-8, one newline at the end."""
    text = json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form; escaping it keeps the file readable and the text intact.
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Store:
    """A local folder of content-addressed artifacts. Use `Store.open`."""

    root: Path

    @classmethod
    def open(cls, url: str | Path | None = None) -> Store:
        """Open the store at `url`, else at $GOLDGATE_STORE, else at `.goldgate`; create it where it is absent.

        Raises UsageError for a store of a newer format, a folder that is something else, or a URL that is not local;
        EnvironmentFailure where it cannot be created or written. Nothing is touched in these cases.
        """
        root = _local_root(url)
        with _disk(root):
            return cls._open(root)

    @classmethod
    def _open(cls, root: Path) -> Store:
        store = cls(root)
        marker = root / _FORMAT_FILE
        if marker.exists():
            _check_format(marker)
        else:
            _check_is_ours(root)
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable", str(root))
        for name in sorted(_OWN_BEFORE_FORMAT):
            (root / name).mkdir(exist_ok=True)
        if not marker.exists():
            store.write_json(_FORMAT_FILE, {"format_version": STORE_FORMAT})
        return store

    def path(self, *parts: str) -> Path:
        """The path of `parts` below the store. Raises UsageError for a part that would leave it."""
        return self.root.joinpath(*_components(*parts))

    def has(self, kind: str, digest: str) -> bool:
        """Whether `kind/digest` was published. A published folder is always complete."""
        return self.path(kind, digest).is_dir()

    @contextlib.contextmanager
    def lock(self, name: str, wait_s: float = 0) -> Iterator[None]:
        """Hold the lock `name` against every other process and thread; it ends with the process, however that ends.

        Raises Refused when it is still held elsewhere after `wait_s` seconds.
        """
        _components(name)
        with _disk(self.root):
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            held = filelock.FileLock(self.root / "locks" / f"{name.replace('/', '--')}.lock", thread_local=False)
            try:
                held.acquire(timeout=wait_s, poll_interval=0.05)
            except filelock.Timeout:
                raise Refused(
                    f"another {name} is running in the store {self.root}", "", "wait for it to end, then try again"
                ) from None
        try:
            yield
        finally:
            held.release()

    def write_bytes(self, relative: str, data: bytes) -> Path:
        """Put `data` at `relative`, replacing what was there in one step. Raises EnvironmentFailure (disk)."""
        target = self.path(relative)
        with _disk(self.root), self._temporary_folder() as folder:
            temporary = folder / "data"
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)
            _sync_folders(target.parent, self.root)
        return target

    def write_json(self, relative: str, record: object) -> Path:
        """Put a record or plain JSON data at `relative`, as `write_bytes` does."""
        return self.write_bytes(relative, json_bytes(record))

    def publish(self, kind: str, digest: str, fill: Callable[[Path], None]) -> Path:
        """Let `fill` write into an empty folder, flush it to the disk and rename it to `kind/digest`.

        An artifact that is there already is returned untouched and `fill` is not called. Whatever `fill` raises leaves
        the store as it was; a full or read-only disk raises EnvironmentFailure.
        """
        target = self.path(kind, digest)
        if target.is_dir():
            return target
        with _disk(self.root), self._temporary_folder() as folder:
            content = folder / "content"
            content.mkdir()
            fill(content)
            sync_tree(content)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                content.rename(target)
            except OSError as error:
                # Someone else published the same content first: it is the same by its name.
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST} or not target.is_dir():
                    raise
            _sync_folders(target.parent, self.root)
        return target

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """An empty folder on the store's own file system, removed at the end. Disk trouble: EnvironmentFailure."""
        with _disk(self.root), self._temporary_folder() as folder:
            yield folder

    def sweep(self, older_than_s: float = 86_400) -> list[str]:
        """Remove what crashes left in `tmp/` and has not changed for `older_than_s` seconds; returns the names."""
        removed = []
        with _disk(self.root):
            for entry in sorted((self.root / "tmp").iterdir()):
                if time.time() - entry.stat().st_mtime >= older_than_s:
                    shutil.rmtree(entry, ignore_errors=True)
                    removed.append(entry.name)
        return removed

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_files(folder: Path, names: Sequence[str], fill: Callable[[Path], None]) -> None:
    """Let `fill` write files `names` into an empty folder, flush them, and move them into `folder` in that order.

    For outputs outside the store. Raises EnvironmentFailure when the disk is full or read-only; whatever is raised
    before the first move leaves `folder` as it was.
    """
    _replace(folder.absolute(), names, fill, "the folder")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put `files` (name -> content) into `folder`, outside the store, each whole or not at all, in their order.

    Raises as `replace_files` does.
    """

    def fill(partial: Path) -> None:
        for name, data in files.items():
            (partial / name).write_bytes(data)

    _replace(folder.absolute(), list(files), fill, f"{', '.join(files)} in")


def _replace(folder: Path, names: Sequence[str], fill: Callable[[Path], None], what: str) -> None:
    with _disk(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
            partial = Path(name)
            fill(partial)
            sync_tree(partial)
            for file in names:
                (partial / file).replace(folder / file)
            _sync(folder)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and the folder itself, to the disk.

    Several at a time: a journalling file system then writes its journal once for many of them.
    """
    walked = [(Path(parent), names) for parent, _, names in os.walk(folder, topdown=False)]
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        for paths in ([parent / name for parent, names in walked for name in names], [parent for parent, _ in walked]):
            list((pool.map if len(paths) > _SYNC_THREADS else map)(_sync, paths))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(folder: Path, root: Path) -> None:
    """Flush `folder` and its parents up to `root`: a rename or a new folder lasts only once its parent is flushed."""
    while True:
        _sync(folder)
        if folder == root:
            return
        folder = folder.parent


def _local_root(url: str | Path | None) -> Path:
    text = str(url if url is not None else os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UsageError(
            f"the store {text} is not a local folder", "a local folder for now", "set GOLDGATE_STORE to one"
        )
    return Path(text).expanduser().absolute()


def _components(*parts: str) -> list[str]:
    names = [name for part in parts for name in part.split("/")]
    for name in names:
        if name in {"", ".", ".."} or "\\" in name or not name.isprintable():
            raise UsageError(f"{'/'.join(parts)!r} is not a name inside the store", "names without '..' or a root")
    return names


def _check_format(marker: Path) -> None:
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))["format_version"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(f"{marker} is damaged", '{"format_version": 1}', "restore it, or use another store")
    if found > STORE_FORMAT:
        raise UsageError(
            f"the store {marker.parent} has format {found}", f"at most {STORE_FORMAT}", "use a newer goldgate for it"
        )


def _check_is_ours(root: Path) -> None:
    if root.is_dir() and any(entry.name not in _OWN_BEFORE_FORMAT for entry in root.iterdir()):
        raise UsageError(f"{root} is not a goldgate store", "an empty folder or a store", "choose another folder")


@contextlib.contextmanager
def _disk(root: Path, what: str = "the store") -> Iterator[None]:
    """Turn what the disk refuses into an EnvironmentFailure that names `root`; everything else passes."""
    try:
        yield
    except OSError as error:
        code = _errno(error)
        if code in _DISK_FULL:
            raise EnvironmentFailure(
                f"the disk of {what} {root} is full", "", "free some space; what was there before is unchanged"
            ) from error
        if code in _NOT_WRITABLE and _is_about(error, root):
            raise EnvironmentFailure(
                f"{what} {root} cannot be written: {os.strerror(code)}", "a folder that can be written"
            ) from error
        raise


def _is_about(error: OSError, root: Path) -> bool:
    """Whether the error is about the store: `fill` may as well have failed on a file of its own elsewhere."""
    if error.filename is None:
        return True
    path = Path(os.fsdecode(error.filename)).absolute()
    return path.is_relative_to(root) or root.is_relative_to(path)


def _errno(error: OSError) -> int:
    """The error number; pyarrow gives some of its errors only in the text."""
    if error.errno is not None:
        return error.errno
    found = re.search(r"errno (\d+)", str(error), re.IGNORECASE)
    return int(found[1]) if found else 0
