"""folder or URL -> documents: every document as text with its structure and its access labels, or a reason why not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from goldgate.pipeline.errors import UnreadableDocument, UsageError, one_line
from goldgate.pipeline.metadata import SIDECAR_SUFFIX, Metadata, MetadataError, merge, read_metadata, split_front_matter
from goldgate.pipeline.params import ReadParams
from goldgate.pipeline.parse import MEDIA_TYPES, media_type_of, parse
from goldgate.pipeline.parsed import Parsed, UnparsableError
from goldgate.pipeline.schema import PUBLIC, Document, Unreadable
from goldgate.pipeline.source import Listing, Selection, Source, SourceFile, bad_name, open_source

Progress = Callable[[str, int, int], None]
_LARGEST_SIDECAR = 1_000_000  # bytes
_MOST_NAMED = 3
_NO_EXTENSION = "none"


class Before(Protocol):
    """Documents of earlier builds (`reuse.ReadBefore`)."""

    def look(self, ids: Iterable[str]) -> None:
        """Prepare for these ids."""

    def get(self, identity: str, digest: str) -> tuple[Document, tuple[str, ...]] | None:
        """The document with that id as it was made from the bytes of that digest, with what there was to tell of it."""

    def keep(self, document: Document, notes: tuple[str, ...]) -> None:
        """Take note of a document that was read now."""


def read_documents(
    source: str, params: ReadParams, progress: Progress | None = None, before: Before | None = None
) -> tuple[list[Document], list[Unreadable]]:
    """Read every document below `source`, a folder or an fsspec URL such as `s3://bucket/prefix`, in order of id.

    Hidden files and sidecars (`<name>.meta.yaml`) are not documents; files of unknown extension are ignored, and how
    many is reported through `progress(what, done, total)`. A document that `before` has from the same bytes is not
    parsed again. Raises UnreadableDocument, whose attribute `unreadable` names all of them, unless
    `params.skip_unreadable`; UsageError when no document is left or the source is not there; EnvironmentFailure when
    the file system fails.
    """
    include, exclude = Selection(params.include, "[read] include"), Selection(params.exclude, "[read] exclude")
    opened = open_source(source, params.max_bytes, exclude)
    listing = opened.listing()
    selected = [file for file in listing.files if include.holds(file.id) and not exclude.holds(file.id)]
    plan = _plan(selected, listing, params.max_bytes)
    if progress and plan.ignored:
        progress(f"ignored {_count(plan.ignored)}", plan.ignored.total(), plan.ignored.total())
    documents, unreadable = _read_all(opened, plan, params.max_bytes, progress, before)
    unreadable.sort(key=lambda each: each.id)
    if unreadable and not params.skip_unreadable:
        raise _unreadable_error(unreadable)
    if not documents:
        raise _nothing_left(source, plan.ignored, unreadable)
    return documents, unreadable


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read, with which sidecar; what cannot be read; what is ignored, by extension."""

    documents: list[SourceFile]
    sidecars: Mapping[str, SourceFile]
    unreadable: list[Unreadable]
    ignored: Counter[str]


def _plan(selected: Sequence[SourceFile], listing: Listing, max_bytes: int) -> _Plan:
    names = {file.id for file in listing.files}
    # A sidecar counts whatever `include` says: leaving it out would show the document to everyone.
    sidecars = {
        file.id.removesuffix(SIDECAR_SUFFIX): file for file in listing.files if file.id.endswith(SIDECAR_SUFFIX)
    }
    documents: list[SourceFile] = []
    unreadable = [Unreadable(id=one_line(each.id), reason=each.reason) for each in listing.unreadable]
    ignored: Counter[str] = Counter()
    for file in selected:
        if file.id.endswith(SIDECAR_SUFFIX):
            if file.id.removesuffix(SIDECAR_SUFFIX) not in names:
                reason = f"belongs to no document: expected the document's whole file name before {SIDECAR_SUFFIX}"
                unreadable.append(Unreadable(id=one_line(file.id), reason=reason))
        elif media_type_of(file.id) is None and not (file.problem and _extension(file.id) == _NO_EXTENSION):
            ignored[_extension(file.id)] += 1  # a broken link without extension may have been a folder of documents
        elif reason := file.problem or bad_name(file.id):
            unreadable.append(Unreadable(id=one_line(file.id), reason=reason))
        elif file.size > max_bytes:
            reason = f"is {file.size} bytes, larger than [read] max_bytes = {max_bytes}"
            unreadable.append(Unreadable(id=file.id, reason=reason))
        else:
            documents.append(file)
    return _Plan(documents, sidecars, unreadable, ignored)


def _read_all(
    source: Source, plan: _Plan, max_bytes: int, progress: Progress | None, before: Before | None
) -> tuple[list[Document], list[Unreadable]]:
    if before:
        before.look(file.id for file in plan.documents)
    wanted = [plan.sidecars[file.id] for file in plan.documents if file.id in plan.sidecars]
    sidecars = {file.id.removesuffix(SIDECAR_SUFFIX): data for file, data in _read_sidecars(source, wanted)}
    documents: list[Document] = []
    unreadable = list(plan.unreadable)
    total = len(plan.documents)
    for done, (file, data) in enumerate(source.read(plan.documents), 1):
        try:
            document, notes = _known_or_new(file, data, sidecars.get(file.id), max_bytes, before)
            documents.append(document)
        except (UnparsableError, MetadataError) as error:
            unreadable.append(Unreadable(id=file.id, reason=one_line(str(error))[:300]))
            notes = ()
        if progress:
            for note in notes:
                progress(f"{file.id}: {note}", done, total)
            progress("read", done, total)
    return documents, unreadable


def _read_sidecars(source: Source, files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, bytes | str]]:
    sound = [file for file in files if file.size <= _LARGEST_SIDECAR and not file.problem]
    yield from ((file, file.problem or "is too large") for file in files if file not in sound)
    yield from source.read(sound)


def _known_or_new(
    file: SourceFile, data: bytes | str, sidecar: bytes | str | None, max_bytes: int, before: Before | None
) -> tuple[Document, tuple[str, ...]]:
    """The document as it was read before, or made now. Raises UnparsableError or MetadataError with the reason."""
    if isinstance(data, str):
        raise UnparsableError(data)
    known = before.get(file.id, _digest(data, sidecar)) if before and not isinstance(sidecar, str) else None
    document, notes = known or _document(file, data, sidecar, max_bytes)
    if before:
        before.keep(document, notes)
    return document, notes


def _document(
    file: SourceFile, data: bytes, sidecar: bytes | str | None, max_bytes: int
) -> tuple[Document, tuple[str, ...]]:
    """Make one document. Raises UnparsableError or MetadataError with the reason."""
    outer = _sidecar_metadata(sidecar)
    media_type = media_type_of(file.id) or ""
    parsed = parse(data, media_type, outer.charset or "", max_bytes)
    metadata = merge(_front_matter(parsed, media_type), outer)
    document = Document(
        id=file.id,
        text=parsed.text,
        title=parsed.title,
        blocks=parsed.blocks,
        media_type=media_type,
        parser=parsed.parser,
        digest=_digest(data, sidecar),
        tenant=metadata.tenant or PUBLIC,
        access=metadata.access or (),
        version=metadata.version or "",
        date=metadata.date or "",
    )
    return document, parsed.notes


def _sidecar_metadata(sidecar: bytes | str | None) -> Metadata:
    if sidecar is None:
        return Metadata()
    if isinstance(sidecar, str):
        raise MetadataError(f"its sidecar {sidecar}")
    try:
        return read_metadata(sidecar.decode("utf-8-sig"), "its sidecar")
    except UnicodeDecodeError:
        raise MetadataError("its sidecar is not UTF-8") from None


def _front_matter(parsed: Parsed, media_type: str) -> Metadata:
    if media_type != MEDIA_TYPES[".md"]:
        return Metadata()
    source, _ = split_front_matter(parsed.text)
    return read_metadata(source, "its front matter") if source else Metadata()


def _digest(data: bytes, sidecar: bytes | str | None) -> str:
    """SHA-256 of the source bytes; with a sidecar, of the two digests one after the other."""
    digest = hashlib.sha256(data)
    if isinstance(sidecar, bytes):
        digest = hashlib.sha256(digest.digest() + hashlib.sha256(sidecar).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- messages


def _unreadable_error(unreadable: list[Unreadable]) -> UnreadableDocument:
    first = f"{unreadable[0].id} {unreadable[0].reason}"
    more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
    error = UnreadableDocument(
        f"{_plural(len(unreadable), 'document')} cannot be read: {first}{more}",
        "",
        "repair or remove them, or record and skip them with --skip-unreadable",
    )
    error.unreadable = tuple(unreadable)
    return error


def _nothing_left(source: str, ignored: Counter[str], unreadable: Sequence[Unreadable]) -> UsageError:
    why = f"; ignored {_count(ignored)}" if ignored else ""
    if unreadable:
        why += (
            f"; {_plural(len(unreadable), 'document')} cannot be read, first {unreadable[0].id} {unreadable[0].reason}"
        )
    known = " ".join(MEDIA_TYPES)
    return UsageError(
        f"{source} holds no document{why}", f"files that end in {known}", "check [read] include and exclude"
    )


def _count(ignored: Counter[str]) -> str:
    kinds = sorted(ignored.items(), key=lambda each: (-each[1], each[0]))
    named = ", ".join(f"{extension} {count}" for extension, count in kinds[:_MOST_NAMED])
    more = ", ..." if len(kinds) > _MOST_NAMED else ""
    return f"{_plural(ignored.total(), 'file')} of unknown extension ({one_line(named)}{more})"


def _extension(identity: str) -> str:
    name = identity.rsplit("/", 1)[-1]
    return f".{name.rsplit('.', 1)[1].lower()}" if "." in name else _NO_EXTENSION


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
