"""folder or URL -> files: a deterministic list with sizes, and the bytes, from a disk or any fsspec file system."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.utils import glob_translate

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.schema import Unreadable

_REMOTE_BATCH_FILES = 64
_REMOTE_BATCH_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file below the knowledge root."""

    id: str
    path: str
    size: int
    problem: str = ""
    """Why it cannot be read, where that is known from its entry alone."""


@dataclass(slots=True)
class Listing:
    """Everything below the root: files in order of id, and folders that cannot be listed."""

    files: list[SourceFile] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


class Source(Protocol):
    """Where the documents are."""

    def listing(self) -> Listing:
        """List every file that is not hidden."""
        ...

    def read(self, files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, bytes | str]]:
        """Give each file's bytes, or the reason why there are none, in the order of `files`."""
        ...


def open_source(url: str, max_bytes: int, excluded: Selection) -> Source:
    """Open a folder or an fsspec URL. Raises UsageError when it is not there, EnvironmentFailure without its driver."""
    if "://" not in url and "::" not in url:
        return _Folder(Path(url), max_bytes, excluded)
    if url.startswith(("file://", "local://")):
        return _Folder(Path(url.split("://", 1)[1]), max_bytes, excluded)
    try:
        file_system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url} cannot be opened: {error}", "a folder, or a URL that fsspec knows") from None
    return _Remote(file_system, root, url)


class Selection:
    """Glob patterns as one question; `**` stands for any number of folders."""

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        """Compile the patterns. Raises UsageError naming `where` for one that is no pattern."""
        try:
            self._patterns = [re.compile(glob_translate(pattern)) for pattern in patterns]
        except (ValueError, re.error) as error:
            raise UsageError(f"{where} holds a bad pattern: {error}", "glob patterns such as **/*.md") from None

    def holds(self, identity: str) -> bool:
        """Whether one of the patterns matches the whole relative path."""
        return any(pattern.match(identity) for pattern in self._patterns)


def bad_name(identity: str) -> str:
    """Why a file name is refused, or "": a name must fit on one line of a report and survive every store."""
    for character in identity:
        category = unicodedata.category(character)
        if category in {"Cc", "Zl", "Zp"}:
            return "has a control character in its name"
        if category == "Cs":
            return "has a name that is not UTF-8"
    return ""


def _hidden(name: str) -> bool:
    return name.startswith(".")


# ---------------------------------------------------------------- a folder on disk


class _Folder:
    """Files below a folder. The folder itself may be a link; a link inside it must not lead out of it."""

    def __init__(self, root: Path, max_bytes: int, excluded: Selection) -> None:
        if not root.exists():
            raise UsageError(f"{root} does not exist", "a folder with documents")
        if not root.is_dir():
            raise UsageError(f"{root} is a file", "a folder with documents")
        self._root = os.path.realpath(root)
        self._max_bytes = max_bytes
        self._excluded = excluded

    def listing(self) -> Listing:
        found = Listing()
        self._scan(self._root, "", (self._root,), found)
        found.files.sort(key=lambda file: file.id)
        return found

    def _scan(self, folder: str, prefix: str, trail: tuple[str, ...], found: Listing) -> None:
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(Unreadable(id=prefix.rstrip("/") or ".", reason=_reason(error)))
            return
        for entry in ordered:
            identity = prefix + entry.name
            if not _hidden(entry.name) and not self._excluded.holds(identity):
                self._entry(entry, identity, trail, found)

    def _entry(self, entry: os.DirEntry[str], identity: str, trail: tuple[str, ...], found: Listing) -> None:
        folder, size, problem = False, 0, ""
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(trail[-1], entry.name)  # noqa: PTH118
        try:
            status = entry.stat()  # follows a link; a loop of links fails here
            folder, size = stat.S_ISDIR(status.st_mode), status.st_size
            if not (folder or stat.S_ISREG(status.st_mode)):
                problem = "is not a regular file"
        except OSError as error:
            problem = "is a link that points to nothing" if isinstance(error, FileNotFoundError) else _reason(error)
        if not problem and not (real + os.sep).startswith(self._root.rstrip(os.sep) + os.sep):
            problem = "is a link that leaves the knowledge folder"
        elif folder and real in trail:
            problem = "is a link to a folder that it is in: a loop"
        if folder and not problem:
            self._scan(entry.path, f"{identity}/", (*trail, real), found)
        elif folder:
            found.unreadable.append(Unreadable(id=identity, reason=problem))
        else:
            found.files.append(SourceFile(identity, entry.path, size, problem))

    def read(self, files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, bytes | str]]:
        for file in files:
            try:
                with open(file.path, "rb") as stream:  # noqa: PTH123  (a name that is not UTF-8 stays as it is)
                    data = stream.read(self._max_bytes + 1)
            except OSError as error:
                yield file, _reason(error)
                continue
            yield file, data if len(data) <= self._max_bytes else "grew while it was read"


def _reason(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "may not be read: no permission"
    if isinstance(error, FileNotFoundError):
        return "disappeared while it was read"
    return f"cannot be read: {error.strerror or error}"


# ---------------------------------------------------------------- any other file system


class _Remote:
    """Files below a prefix of an fsspec file system such as S3, read several at a time."""

    def __init__(self, file_system: Any, root: str, url: str) -> None:  # noqa: ANN401  (fsspec has no types)
        self._file_system = file_system
        self._root = root.rstrip("/")
        self._url = url

    def listing(self) -> Listing:
        try:
            entries = self._file_system.find(self._root, detail=True)
        except FileNotFoundError:
            raise UsageError(f"{self._url} does not exist", "a URL with documents below it") from None
        except Exception as error:  # noqa: BLE001  (each file system raises its own; all mean it cannot be reached)
            do = "check address and credentials"
            raise EnvironmentFailure(f"{self._url} cannot be listed: {error}", "", do) from None
        found = Listing()
        for path, info in sorted(entries.items()):
            identity = path.removeprefix(self._root).lstrip("/")
            if identity and info.get("type") == "file" and not any(map(_hidden, identity.split("/"))):
                found.files.append(SourceFile(identity, path, int(info.get("size") or 0)))
        found.files.sort(key=lambda file: file.id)
        return found

    def read(self, files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, bytes | str]]:
        for batch in _batches(files):
            paths = [file.path for file in batch]
            try:
                answers = self._file_system.cat(paths, on_error="return")
            except Exception as error:  # noqa: BLE001  (as above)
                raise EnvironmentFailure(f"{self._url} cannot be read: {error}", "", "try again") from None
            for file in batch:
                yield file, self._answer(file, answers.get(file.path))

    def _answer(self, file: SourceFile, answer: object) -> bytes | str:
        if isinstance(answer, bytes):
            return answer
        if isinstance(answer, FileNotFoundError | PermissionError):
            return _reason(answer)
        raise EnvironmentFailure(f"{self._url}: {file.id} cannot be read: {answer!r:.200}", "", "try again")


def _batches(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) >= _REMOTE_BATCH_FILES or size + file.size > _REMOTE_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch
