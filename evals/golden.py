"""cases.jsonl -> gold cases, and evidence -> where it lies in the documents at hand.

Evidence is anchored to document text, never to chunks: a quote, a span, a heading or a whole document. It resolves,
wherever in its section the same text now stands; has moved (the text changed under the same heading, or the same text
stands under another one), which is scored and listed for review; or is stale and never scored.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import parse_record
from goldgate.pipeline.schema import Block, Document, Evidence, GoldCase, ResolvedEvidence
from goldgate.pipeline.store import digest_json

Span = tuple[int, int]

# ---------------------------------------------------------------- load


def load_cases(path: Path) -> list[GoldCase]:
    """Read a JSON-lines gold set, in file order.

    Raises UsageError naming file and line: not JSON, an unknown field (with the nearest known one), a duplicate id, no
    expectation; and for a file that is absent, not UTF-8 or without a case.
    """
    seen: dict[str, int] = {}
    cases: list[GoldCase] = []
    for number, raw in json_lines(path, "a JSON-lines gold set", "name it with --golden"):
        where = f"{path}:{number}"
        case = parse_record(raw, GoldCase, where)
        if case.id in seen:
            raise UsageError(f"{where}: duplicate id {case.id}", f"another id than line {seen[case.id]}'s", "rename it")
        seen[case.id] = number
        cases.append(case)
    if not cases:
        raise UsageError(f"{path} has no cases", "one JSON object per line", "add a gold case")
    return cases


def json_lines(path: Path, expected: str, do: str) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) of every line that is not blank.

    Raises UsageError, with `expected` and `do` where there is no file, else naming the line that is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", expected, do) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "a UTF-8 file of JSON lines") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json(line, f"{path}:{number}")


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_closed, parse_constant=_reject)
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{where}: not JSON: {reason}", "one JSON object per line") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply", "one JSON object per line") from None


def _closed(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


def _reject(constant: str) -> object:
    raise ValueError(f"{constant} is not a number")


def case_digest(case: GoldCase) -> str:
    """Return the SHA-256 of everything the case states; a field left at its default does not count."""
    return digest_json(case.model_dump(mode="json", exclude_defaults=True))


def gold_digest(cases: Iterable[GoldCase]) -> str:
    """Return the SHA-256 of the gold set, whatever the order of its cases."""
    return digest_json(sorted((case.id, case_digest(case)) for case in cases))


def cluster_of(case: GoldCase) -> str:
    """Return the case's cluster: the one it names, else its evidence's first document, else its own id."""
    return case.cluster or (case.evidence[0].document if case.evidence else case.id)


# ---------------------------------------------------------------- resolve

ENDINGS = frozenset((".md", ".markdown", ".rst", ".rest", ".txt", ".html", ".htm", ".pdf", ".docx", ".ipynb"))
"""What may follow a document's name: a page that changes its format keeps its name."""


def resolve(
    cases: Iterable[GoldCase],
    documents: Mapping[str, Document],
    previous: Mapping[str, Document] | None = None,
    places: Mapping[Evidence, ResolvedEvidence] | None = None,
) -> dict[str, tuple[ResolvedEvidence, ...]]:
    """Find every piece of evidence in `documents`; case id -> one result per piece, in order.

    `previous` holds the documents that the gold set was last resolved against (production's): with it, a text that
    stands elsewhere is followed, and a section whose text changed is `moved`. `places` says where production's report
    found each piece: a span was counted in the documents it was written for, and these may be several releases old.
    Evidence that `places` does not know is new, and was written for `documents`. Without `places`, all of it was
    written for `previous`. Offsets are code points of `Document.text`. Never raises.
    """
    return {
        case.id: tuple(_follow(evidence, documents, previous or {}, places) for evidence in case.evidence)
        for case in cases
    }


def _follow(
    evidence: Evidence,
    documents: Mapping[str, Document],
    previous: Mapping[str, Document],
    places: Mapping[Evidence, ResolvedEvidence] | None,
) -> ResolvedEvidence:
    document = documents.get(evidence.document) or _successor(evidence.document, documents)
    place = places.get(evidence) if places is not None else None
    if places is not None and place is None:
        return resolve_evidence(evidence, document, None)
    before = previous.get(place.document if place else evidence.document)
    return resolve_evidence(evidence, document, before, place)


def resolve_evidence(
    evidence: Evidence, document: Document | None, previous: Document | None, place: ResolvedEvidence | None = None
) -> ResolvedEvidence:
    """Find one piece of evidence in its document. `place` is where it lies in `previous`, if not where it says."""
    if document is None:
        return _stale(evidence, "the document is not in the knowledge base")
    found = _resolve_in(evidence, document, previous, place)
    if found.state == "stale" and evidence.or_document:
        found = _moved(evidence, (0, len(document.text)), f"{found.note}; the whole document is used")
    if document.id == evidence.document or found.state == "stale":
        return found
    if place is not None and place.document == document.id:  # known since production
        return found.model_copy(update={"document": document.id})
    note = "; ".join(filter(None, (f"stood in {evidence.document}", found.note)))
    return found.model_copy(update={"document": document.id, "state": "moved", "note": note})


def _successor(name: str, documents: Mapping[str, Document]) -> Document | None:
    """Return the only document of the same path and name with another ending: `a.ipynb.md` became `a.rst`."""
    found = [document for document in documents.values() if _without_endings(document.id) == _without_endings(name)]
    return found[0] if len(found) == 1 else None


def _without_endings(name: str) -> str:
    path = PurePosixPath(name)
    while path.suffix.lower() in ENDINGS:
        path = path.with_suffix("")
    return str(path)


def _resolve_in(
    evidence: Evidence, document: Document, previous: Document | None, place: ResolvedEvidence | None
) -> ResolvedEvidence:
    if evidence.quote is not None:
        return _resolve_quote(evidence, evidence.quote, document)
    if evidence.start is not None and evidence.end is not None:
        span = (evidence.start, evidence.end)
        if previous is None:
            return _resolve_fresh_span(evidence, span, document)
        if place is not None:
            return _resolve_span(evidence, (place.start, place.end), document, previous)
        counted_here = _under_heading(evidence, span, previous)
        return _resolve_span(evidence, span if counted_here else (0, 0), document, previous)
    if evidence.heading is not None:
        return _resolve_heading(evidence, evidence.heading, document, previous)
    return _found(evidence, (0, len(document.text)), "whole document")


def _resolve_quote(evidence: Evidence, quote: str, document: Document) -> ResolvedEvidence:
    spans = occurrences(quote, document.text)
    section = section_of(document, evidence.heading) if evidence.heading else None
    if spans:
        within = [span for span in spans if section and _holds(section, span)]
        note = f"the quote stands {len(spans)} times; the first is used" if len(within or spans) > 1 else ""
        return _found(evidence, (within or spans)[0], note)
    if section:
        return _moved(evidence, section, "the quote is gone; its section is used")
    return _stale(evidence, "the quote is not in the document")


def _resolve_fresh_span(evidence: Evidence, span: Span, document: Document) -> ResolvedEvidence:
    """Take a span at its word, when it lies under its heading."""
    if span[1] <= len(document.text) and _under_heading(evidence, span, document):
        return _found(evidence, span)
    section = section_of(document, evidence.heading) if evidence.heading else None
    if section:
        return _moved(evidence, section, "the span does not lie under its heading; the section is used")
    return _stale(evidence, f"no heading {evidence.heading!r} there" if evidence.heading else BEYOND_THE_END)


BEYOND_THE_END = "the span lies beyond the document's end"


def _resolve_span(evidence: Evidence, span: Span, document: Document, previous: Document) -> ResolvedEvidence:
    """Follow a span from `previous`: its text, else the section that it stood in. An empty span is not known there."""
    sections, deep = _sections_like(evidence, span, document, previous)
    wanted = previous.text[slice(*span)]
    if wanted and document.text[slice(*span)] == wanted:
        return _found(evidence, span)
    hits = sorted(occurrences(wanted, document.text), key=lambda hit: abs(hit[0] - span[0])) if wanted else []
    within = [hit for hit in hits if any(_holds(section, hit) for section in deep)]
    if within or (len(hits) == 1 and evidence.heading is None):
        return _found(evidence, (within or hits)[0], _shift((within or hits)[0][0] - span[0]))
    if hits:
        return _moved(evidence, hits[0], "the same text stands elsewhere in the document")
    if sections:
        changed = "the text under this heading changed" if wanted else "the span was counted in another text"
        return _moved(evidence, sections[0], f"{changed}; the section is used")
    if evidence.heading:
        return _stale(evidence, f"the text is gone, and so is the heading {evidence.heading!r}")
    return _stale(evidence, "the span's text is gone" if wanted else BEYOND_THE_END)


def _sections_like(
    evidence: Evidence, span: Span, document: Document, previous: Document
) -> tuple[list[Span], list[Span]]:
    """Return (the sections that correspond to the one that held the span, best first; the same with subsections).

    A span that ended before the first subsection is looked for before the first subsection. Of several headings of the
    same name, the one in the same place of their order comes first.
    """
    if evidence.heading is None:
        return [], []
    own, deep = sections_of(previous, evidence.heading, subsections=False), sections_of(previous, evidence.heading)
    above = any(_holds(section, span) for section in own)
    order = next((i for i, section in enumerate(own if above else deep) if _holds(section, span)), 0)
    found = sections_of(document, evidence.heading, subsections=not above)
    if order < len(found):
        found = [found[order], *found[:order], *found[order + 1 :]]
    return found, sections_of(document, evidence.heading)


def _under_heading(evidence: Evidence, span: Span, document: Document) -> bool:
    """False when the span cannot have been counted in this document: it lies outside the section that it names."""
    if span[1] > len(document.text):
        return False
    return evidence.heading is None or any(_holds(section, span) for section in sections_of(document, evidence.heading))


def _holds(outer: Span, inner: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _shift(distance: int) -> str:
    return f"the same text, {abs(distance)} characters {'later' if distance > 0 else 'earlier'}" if distance else ""


def _resolve_heading(
    evidence: Evidence, heading: str, document: Document, previous: Document | None
) -> ResolvedEvidence:
    section = section_of(document, heading)
    if section is None:
        return _stale(evidence, f"no heading {heading!r} in the document")
    before = section_of(previous, heading) if previous else None
    if previous and before and _words(previous.text[slice(*before)]) != _words(document.text[slice(*section)]):
        return _moved(evidence, section, "the text under this heading changed")
    return _found(evidence, section)


def occurrences(quote: str, text: str) -> list[Span]:
    """Return where `quote` stands in `text`: exactly, else with any white space for white space; no overlaps."""
    exact = [match.span() for match in re.finditer(re.escape(quote), text)]
    words = quote.split()
    if exact or not words:
        return exact
    return [match.span() for match in re.finditer(r"\s+".join(map(re.escape, words)), text)]


def section_of(document: Document, heading: str) -> Span | None:
    """Return the span from the first such heading to the next one of the same or a higher level."""
    return next(iter(sections_of(document, heading)), None)


def sections_of(document: Document, heading: str, *, subsections: bool = True) -> list[Span]:
    """Return the section of every heading of this name, in order; without `subsections`, up to the next heading."""
    headings = [block for block in document.blocks if block.kind == "heading"]
    found: list[Span] = []
    for index, block in enumerate(headings):
        if _heading(document, block) == _title(heading):
            ends = (later.start for later in headings[index + 1 :] if not subsections or later.level <= block.level)
            found.append((block.start, next(ends, len(document.text))))
    return found


def _heading(document: Document, block: Block) -> str:
    return _title(block.title or document.text[block.start : block.end])


def _title(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"^#+\s*|[`*_¶]|\s#+\s*$", "", text.strip()).split())


def _words(text: str) -> list[str]:
    return text.split()


def _found(evidence: Evidence, span: Span, note: str = "") -> ResolvedEvidence:
    return ResolvedEvidence(document=evidence.document, start=span[0], end=span[1], state="resolved", note=note)


def _moved(evidence: Evidence, span: Span, note: str) -> ResolvedEvidence:
    return ResolvedEvidence(document=evidence.document, start=span[0], end=span[1], state="moved", note=note)


def _stale(evidence: Evidence, note: str) -> ResolvedEvidence:
    return ResolvedEvidence(document=evidence.document, state="stale", note=note)


# ---------------------------------------------------------------- lint


def lint(cases: Sequence[GoldCase], documents: Mapping[str, Document]) -> list[str]:
    """Return the gold set's problems, one line each, in file order.

    Evidence that is not in the documents or stands there more than once, unknown documents, questions asked twice,
    answerable cases that expect nothing, no cluster and no evidence to take it from.
    """
    problems: list[str] = []
    asked: dict[str, str] = {}
    for case in cases:
        problems += [f"{case.id}: {problem}" for problem in _case_problems(case, documents)]
        key = digest_json([_title(case.query().question), case.query().model_dump(mode="json", exclude={"question"})])
        if key in asked:
            problems.append(f"{case.id}: asks the same question as {asked[key]}")
        asked.setdefault(key, case.id)
    return problems


def _case_problems(case: GoldCase, documents: Mapping[str, Document]) -> list[str]:
    problems = []
    if not case.cluster and not case.evidence:
        problems.append("names no cluster, and has no evidence to take it from")
    if case.answerable is True and not (case.evidence or case.expected_answer or case.must_say):
        problems.append("is answerable, but has neither evidence nor an expected answer")
    for evidence in case.evidence:
        found = resolve_evidence(evidence, documents.get(evidence.document), None)
        if found.state != "resolved" or found.note.startswith("the quote stands"):
            problems.append(f"evidence in {evidence.document}: {found.note}")
        if evidence.heading and found.state == "resolved" and _ambiguous(evidence, documents[evidence.document]):
            problems.append(f"evidence in {evidence.document}: heading {evidence.heading!r} stands more than once")
    unknown = [name for name in case.must_not_retrieve if name not in documents]
    return problems + [f"must_not_retrieve: {name} is not in the knowledge base" for name in unknown]


def _ambiguous(evidence: Evidence, document: Document) -> bool:
    title = _title(evidence.heading or "")
    return sum(_heading(document, block) == title for block in document.blocks if block.kind == "heading") > 1
