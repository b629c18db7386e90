"""document -> chunks: passages that follow headings, blocks and sentences, counted in the embedder's own tokens.

A document is divided at its headings into sections. Sections smaller than a quarter of a chunk join the ones beside or
below them; a larger one is divided between blocks where that leaves chunks of a fair size, otherwise between sentences,
and only a sentence, row or line that is too long by itself is divided between words.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
import unicodedata
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from semantic_text_splitter import TextSplitter

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import ChunkParams
from goldgate.pipeline.parsed import fold
from goldgate.pipeline.schema import Block, BlockKind, Chunk, Document
from goldgate.pipeline.sentences import sentence_spans

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATH_SEPARATOR = " > "

_NAMESPACE = uuid.UUID("6f0d3e0c-5d0f-5c39-9a53-2b1a5b6f8f31")
_SMALL_SECTION = 1 / 4  # of the room in a chunk
_FAIR_SIZE = 1 / 2  # of the room: a chunk that ends with a block is at least this large
_MOST_PATH = 1 / 4  # of a chunk's tokens for the heading path
_MOST_HEADER = 1 / 3  # of a chunk's tokens for the repeated table header
# WordPiece makes one [UNK] of any word over 100 characters: by that count a megabyte of base64 is one short chunk.
_CHARACTERS_PER_TOKEN = 12
_SEGMENT_CHARACTERS = 20_000  # encoded at a time
_SPLITTER_STEP = 16  # tokens; capacities are rounded down to it so that few splitters are made
_SPLITTER_CHARACTERS = 4_000  # given to a splitter at a time: its work grows faster than the length of a word
_BATCH = 256  # segments encoded at a time, which bounds the memory
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f")
_FENCES = ("```", "~~~")
_LINE = re.compile(r"[^\r\n]+")


def chunk_document(document: Document, tokenizer: Tokenizer, params: ChunkParams, max_tokens: int) -> list[Chunk]:
    """Divide `document` into chunks of at most `params.max_tokens` tokens, special tokens included, in order of span.

    `Chunk.text` is the heading path on a line (`Title > Section`), the header of the table that the chunk starts in
    the middle of, then exactly `document.text[start:end]`. Every character of every block that is not whitespace is in
    a chunk; a heading may be there as part of the path only. Raises UsageError when `params.max_tokens` is more than
    `max_tokens`, the most that the embedder can see.
    """
    if params.max_tokens > max_tokens:
        what = f"[chunk] max_tokens = {params.max_tokens} is more than the embedder can see"
        raise UsageError(what, f"at most {max_tokens}", "lower it or choose another embedder")
    counter = _Counter(document.text, document.blocks, _without_limits(tokenizer))
    sections = _sections(document)
    drafts: list[_Draft] = []
    for group in _groups(sections, counter, params):
        drafts += _divide_group(document, group, counter, params)
    return [_chunk(document, *each) for each in _fit(document.text, drafts, counter, params.max_tokens)]


# ---------------------------------------------------------------- counting


class _Counter:
    """Counts the tokens of any span of one text from a single pass of the tokenizer over it.

    Exact where spans begin and end between words, which is checked against the whole chunk at the end.
    """

    def __init__(self, text: str, blocks: Sequence[Block], tokenizer: Tokenizer) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.special = tokenizer.num_special_tokens_to_add(is_pair=False)
        self._starts = array("q")
        segments = _segments(text, blocks)
        while batch := list(itertools.islice(segments, _BATCH)):
            encodings = tokenizer.encode_batch([text[a:b] for a, b in batch], add_special_tokens=False)
            for (begin, _), encoding in zip(batch, encodings, strict=True):
                for start, end in encoding.offsets:
                    self._starts.extend(range(begin + start, begin + max(end, start + 1), _CHARACTERS_PER_TOKEN))

    def span(self, start: int, end: int) -> int:
        """Tokens that start in `text[start:end]`; a very long one counts for several."""
        return bisect.bisect_left(self._starts, end) - bisect.bisect_left(self._starts, start)

    def text_tokens(self, text: str) -> int:
        """Tokens of another text, without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def exact(self, texts: Sequence[str]) -> list[int]:
        """Tokens of whole chunks, special tokens included."""
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(list(texts))]

    def shorten(self, text: str, most: int) -> str:
        """`text`, or as much of its start as fits in `most` tokens, with an ellipsis."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= most and len(text) <= most * _CHARACTERS_PER_TOKEN:
            return text
        end = encoding.offsets[max(0, min(most, len(encoding.ids)) - 1)][0]
        return text[: min(end, most * _CHARACTERS_PER_TOKEN)].rstrip() + "…"


@lru_cache(maxsize=4)
def _without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding; the caller's own stays as it is."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _segments(text: str, blocks: Sequence[Block]) -> Iterator[tuple[int, int]]:
    """The whole text, cut where blocks start and, in very long ones, at whitespace."""
    cuts = sorted({0, *(block.start for block in blocks), len(text)})
    for start, end in itertools.pairwise(cuts):
        begin = start
        while end - begin > _SEGMENT_CHARACTERS:
            limit = begin + _SEGMENT_CHARACTERS
            space = max(text.rfind(" ", begin + 1, limit), text.rfind("\n", begin + 1, limit))
            yield begin, space if space > begin else limit
            begin = space if space > begin else limit
        yield begin, end


# ---------------------------------------------------------------- sections


@dataclass(frozen=True, slots=True)
class _Section:
    """A heading and the blocks up to the next heading."""

    path: tuple[str, ...]
    heading: Block | None
    blocks: tuple[Block, ...]

    @property
    def start(self) -> int:
        return self.heading.start if self.heading else self.blocks[0].start

    @property
    def end(self) -> int:
        return self.blocks[-1].end if self.blocks else (self.heading.end if self.heading else 0)


def _sections(document: Document) -> list[_Section]:
    sections: list[_Section] = []
    trail: list[Block] = []
    heading: Block | None = None
    blocks: list[Block] = []
    for block in document.blocks:
        if block.kind != "heading":
            blocks.append(block)
            continue
        if heading or blocks:
            sections.append(_Section(_path(document, trail), heading, tuple(blocks)))
        while trail and trail[-1].level >= block.level:
            trail.pop()
        trail.append(block)
        heading, blocks = block, []
    if heading or blocks:
        sections.append(_Section(_path(document, trail), heading, tuple(blocks)))
    return _without_bare_parents(sections)


def _path(document: Document, trail: Sequence[Block]) -> tuple[str, ...]:
    """Titles of the enclosing headings, the document's title first."""
    titles = [fold(block.title) for block in trail]
    title = fold(document.title)
    if title and (not titles or titles[0].casefold() != title.casefold()):
        titles.insert(0, title)
    return tuple(titles)


def _without_bare_parents(sections: Sequence[_Section]) -> list[_Section]:
    """Without the headings that have only subsections: the path of the first one names them."""
    kept = []
    for section, following in itertools.zip_longest(sections, sections[1:]):
        bare = not section.blocks and following is not None and _is_below(following.path, section.path)
        if not bare:
            kept.append(section)
    return kept


def _is_below(path: tuple[str, ...], parent: tuple[str, ...]) -> bool:
    return len(path) > len(parent) and path[: len(parent)] == parent


def _groups(sections: Sequence[_Section], counter: _Counter, params: ChunkParams) -> Iterator[list[_Section]]:
    """Sections one by one, small ones together with those beside or below them as far as they fit in one chunk."""
    room = params.max_tokens - counter.special
    small = int(room * _SMALL_SECTION)
    group: list[_Section] = []
    size = 0
    for section in sections:
        own = counter.span(section.start, section.end)
        if group and min(own, size) <= small and _belongs(section, group):
            together = counter.span(group[0].start, section.end)
            path = counter.text_tokens(PATH_SEPARATOR.join(_common_path([*group, section])))
            if together + path <= room:
                group.append(section)
                size = together
                continue
        if group:
            yield group
        group, size = [section], own
    if group:
        yield group


def _belongs(section: _Section, group: Sequence[_Section]) -> bool:
    """Whether the section stands beside or below the first one of the group."""
    first = group[0].path
    beside = len(section.path) >= len(first) and section.path[: len(first) - 1] == first[:-1]
    return beside or _is_below(section.path, first)


def _common_path(group: Sequence[_Section]) -> tuple[str, ...]:
    """What the paths of a group share; a section that holds all the others gives its own."""
    first = group[0].path
    if all(section is group[0] or _is_below(section.path, first) for section in group):
        return first
    return first[:-1]


# ---------------------------------------------------------------- dividing


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is not divided again: a sentence, a line of code, a table row, a heading."""

    start: int
    end: int
    block: int  # number of the block it is part of
    kind: BlockKind
    holds_next: bool = False  # no chunk ends here: a heading, a table header, "as follows:"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A chunk without its text."""

    start: int
    end: int
    path: tuple[str, ...]
    path_line: str
    header: str = ""


def _divide_group(
    document: Document, group: Sequence[_Section], counter: _Counter, params: ChunkParams
) -> list[_Draft]:
    path = _common_path(group)
    if len(group) == 1 and group[0].blocks:
        blocks = group[0].blocks
    elif len(group) > 1 and path == group[0].path and group[0].blocks:
        blocks = tuple(_all_blocks(group))[1:] if group[0].heading else tuple(_all_blocks(group))
    else:  # sections side by side, or a heading with nothing below it
        blocks = tuple(_all_blocks(group))
        path = path[:-1] if len(group) == 1 and group[0].heading else path
    path_line = _path_line(path, counter, int(params.max_tokens * _MOST_PATH))
    used = counter.special + (counter.text_tokens(path_line) if path_line else 0)
    return _divide(document.text, blocks, _Draft(0, 0, path, path_line), counter, params.max_tokens - used, params)


def _all_blocks(group: Iterable[_Section]) -> Iterator[Block]:
    for section in group:
        if section.heading:
            yield section.heading
        yield from section.blocks


def _path_line(path: Sequence[str], counter: _Counter, most: int) -> str:
    """The path on one line; when it is too long, first and last title, then the last one alone, then its start."""
    for titles in (list(path), [path[0], "…", path[-1]] if len(path) > 2 else [], list(path[-1:])):
        line = PATH_SEPARATOR.join(titles)
        if line and counter.text_tokens(line) <= most and len(line) <= most * _CHARACTERS_PER_TOKEN:
            return line
    return counter.shorten(path[-1], most) if path else ""


def _divide(
    text: str, blocks: Sequence[Block], model: _Draft, counter: _Counter, room: int, params: ChunkParams
) -> list[_Draft]:
    headers = _headers(text, blocks, counter, int(params.max_tokens * _MOST_HEADER))
    units = list(_units(text, blocks, headers, counter, room))
    drafts: list[_Draft] = []
    first, previous = 0, -1
    while first < len(units):
        header, header_size = headers.get(units[first].block, ("", 0))
        start = _overlap_start(units, first, previous, counter, params.overlap_tokens)
        if counter.span(units[start].start, units[first].end) > room - header_size:
            start = first
        last = _last_that_fits(units, start, first, counter, room - header_size)
        stop = _best_stop(units, first, last + 1, counter, room - header_size)
        drafts.append(
            _Draft(
                units[start].start, units[stop - 1].end, model.path, model.path_line, header if start == first else ""
            )
        )
        previous, first = start, stop
    return drafts


def _headers(text: str, blocks: Sequence[Block], counter: _Counter, most: int) -> dict[int, tuple[str, int]]:
    """For each table row's block number, its table's header and the header's tokens."""
    headers: dict[int, tuple[str, int]] = {}
    lines: list[str] = []
    current = ("", 0)
    for number, block in enumerate(blocks):
        if block.kind == "table_header":
            if number == 0 or blocks[number - 1].kind != "table_header":
                lines = []
            lines.append(text[block.start : block.end])
            header = counter.shorten("\n".join(lines), most)
            current = (header, counter.text_tokens(header))
        elif block.kind == "table_row" and current[0]:
            headers[number] = current
        else:
            current = ("", 0)
    return headers


def _units(
    text: str, blocks: Sequence[Block], headers: dict[int, tuple[str, int]], counter: _Counter, room: int
) -> Iterator[_Unit]:
    for number, block in enumerate(blocks):
        limit = room - headers.get(number, ("", 0))[1]
        following = blocks[number + 1].kind if number + 1 < len(blocks) else None
        spans = [
            piece for start, end in _parts(text, block) for piece in _short_enough(text, start, end, counter, limit)
        ]
        held = _held(text, spans, block.kind, following)
        for index, (start, end) in enumerate(spans):
            yield _Unit(start, end, number, block.kind, index in held)


def _held(text: str, spans: Sequence[tuple[int, int]], kind: BlockKind, following: BlockKind | None) -> set[int]:
    """The units of a block after which no chunk ends, by number."""
    last = len(spans) - 1
    held = set()
    introduces = following in {"list", "code", "table_header", "table_row"} and text[spans[-1][1] - 1] == ":"
    if following is not None and (kind in {"heading", "table_header"} or introduces):
        held.add(last)
    if kind == "code" and text.startswith(_FENCES, spans[0][0]):  # no lone fence at an end of a chunk
        held.add(0)
        if text.startswith(_FENCES, spans[-1][0]):
            held.add(last - 1)
    return held


def _parts(text: str, block: Block) -> Iterator[tuple[int, int]]:
    """Sentences of prose, lines of code, a row as it is."""
    if block.kind in {"table_header", "table_row", "heading"}:
        yield block.start, block.end
    elif block.kind == "code":
        yield from (line.span() for line in _LINE.finditer(text, block.start, block.end) if line.group().strip())
    else:
        yield from sentence_spans(text, block.start, block.end)


def _short_enough(text: str, start: int, end: int, counter: _Counter, limit: int) -> Iterator[tuple[int, int]]:
    """The span itself, or its lines, or the pieces of a line: between words, then inside them."""
    if counter.span(start, end) <= limit:
        yield start, end
        return
    lines = [line.span() for line in _LINE.finditer(text, start, end) if line.group().strip()]
    if len(lines) > 1:
        for begin, stop in lines:
            yield from _short_enough(text, begin, stop, counter, limit)
        return
    capacity = limit if limit < 2 * _SPLITTER_STEP else limit - limit % _SPLITTER_STEP
    for begin, stop in _slabs(text, start, end):
        for offset, piece in _splitter(counter.tokenizer, capacity).chunk_indices(text[begin:stop]):
            yield from _short_words(begin + offset, begin + offset + len(piece), counter, limit)


def _slabs(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Parts that a splitter handles quickly, cut at a space, or else not before a combining character."""
    while end - start > _SPLITTER_CHARACTERS:
        cut = start + _SPLITTER_CHARACTERS
        space = text.rfind(" ", start + 1, cut)
        if space > start:
            cut = space
        else:
            longest = cut - 64
            while cut > longest and (
                unicodedata.combining(text[cut]) or not _JOINERS.isdisjoint(text[cut - 1 : cut + 1])
            ):
                cut -= 1
        yield start, cut
        start = cut
    yield start, end


def _short_words(start: int, end: int, counter: _Counter, limit: int) -> Iterator[tuple[int, int]]:
    """The span, or pieces of what the tokenizer took for a single token."""
    if counter.span(start, end) <= limit:
        yield start, end
    else:
        step = max(1, limit - 1) * _CHARACTERS_PER_TOKEN
        yield from ((at, min(at + step, end)) for at in range(start, end, step))


@lru_cache(maxsize=64)
def _splitter(tokenizer: Tokenizer, capacity: int) -> TextSplitter:
    return TextSplitter.from_huggingface_tokenizer(tokenizer, capacity)


def _overlap_start(units: Sequence[_Unit], first: int, previous: int, counter: _Counter, most: int) -> int:
    """The unit where a chunk starts that repeats at most `most` tokens of the last one; never a table or a heading."""
    start = first
    if previous < 0 or units[first].kind in {"table_header", "table_row", "heading"}:
        return start
    while (
        start - 1 > previous
        and units[start - 1].kind not in {"table_header", "table_row", "heading"}
        and counter.span(units[start - 1].start, units[first].start) <= most
    ):
        start -= 1
    return start


def _last_that_fits(units: Sequence[_Unit], start: int, first: int, counter: _Counter, room: int) -> int:
    low, high = first, len(units) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if counter.span(units[start].start, units[middle].end) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _best_stop(units: Sequence[_Unit], first: int, stop: int, counter: _Counter, room: int) -> int:
    """Where to end a chunk that could go up to `stop`: with a block when it and what is left are of fair size."""
    if stop == len(units):
        return stop
    fair, small = room * _FAIR_SIZE, room * _SMALL_SECTION
    end = units[-1].end
    allowed = [at for at in range(stop, first, -1) if not units[at - 1].holds_next] or [stop]
    for least_left in (small, 0):
        for at in allowed:
            size = counter.span(units[first].start, units[at - 1].end)
            if size < fair:
                break
            if units[at].block != units[at - 1].block and counter.span(units[at].start, end) >= least_left:
                return at
    for at in allowed:
        if counter.span(units[first].start, units[at - 1].end) < fair:
            break
        if counter.span(units[at].start, end) >= small:
            return at
    return allowed[0]


# ---------------------------------------------------------------- chunks


def _fit(text: str, drafts: Sequence[_Draft], counter: _Counter, most: int) -> Iterator[tuple[_Draft, str, int]]:
    """Each draft with its text and tokens, divided again where the whole has more tokens than its parts had."""
    texts = [
        "\n".join(filter(None, (draft.path_line, draft.header, text[draft.start : draft.end]))) for draft in drafts
    ]
    for draft, whole, tokens in zip(drafts, texts, counter.exact(texts), strict=True):
        if tokens <= most:
            yield draft, whole, tokens
        elif draft.end - draft.start > 1:
            yield from _fit(text, list(_halves(text, draft)), counter, most)
        elif draft.path_line or draft.header:  # one character that does not fit beside its headings
            yield from _fit(text, [_Draft(draft.start, draft.end, draft.path, "")], counter, most)
        else:
            raise UsageError(f"one character is {tokens} tokens", f"at most {most}", "raise [chunk] max_tokens")


def _halves(text: str, draft: _Draft) -> Iterator[_Draft]:
    middle = (draft.start + draft.end) // 2
    space = max(text.rfind(" ", draft.start + 1, middle), text.rfind("\n", draft.start + 1, middle))
    cut = space if space > draft.start + (middle - draft.start) // 2 else middle
    for start, end in ((draft.start, cut), (cut, draft.end)):
        visible = end - len(text[start:end].lstrip())
        if visible < end:
            yield _Draft(visible, end, draft.path, draft.path_line, draft.header)


def _chunk(document: Document, draft: _Draft, text: str, tokens: int) -> Chunk:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Chunk(
        id=str(uuid.uuid5(_NAMESPACE, f"{document.id}\n{draft.start}\n{draft.end}\n{digest}")),
        document=document.id,
        start=draft.start,
        end=draft.end,
        text=text,
        heading=draft.path,
        tokens=tokens,
        tenant=document.tenant,
        access=document.access,
        version=document.version,
        date=document.date,
    )
