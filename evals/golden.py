"""cases.jsonl -> gold cases, and evidence -> where it lies in the documents at hand.

Evidence is anchored to document text, never to chunks: a quote, a span, a heading or a whole document. It resolves, has
moved (the text changed under the same heading, or stands elsewhere in the same document), or is stale and never scored.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
    for number, line in _lines(path):
        where = f"{path}:{number}"
        case = parse_record(_json(line, where), GoldCase, where)
        if case.id in seen:
            raise UsageError(f"{where}: duplicate id {case.id}", f"another id than line {seen[case.id]}'s", "rename it")
        seen[case.id] = number
        cases.append(case)
    if not cases:
        raise UsageError(f"{path} has no cases", "one JSON object per line", "add a gold case")
    return cases


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "a JSON-lines gold set", "name it with --golden") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "a UTF-8 file of JSON lines") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


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


def resolve(
    cases: Iterable[GoldCase],
    documents: Mapping[str, Document],
    previous: Mapping[str, Document] | None = None,
) -> dict[str, tuple[ResolvedEvidence, ...]]:
    """Find every piece of evidence in `documents`; case id -> one result per piece, in order.

    `previous` holds the documents that the gold set was last resolved against (production's): with it, a section whose
    text changed and a span that shifted are `moved`. Offsets are code points of `Document.text`. Never raises.
    """
    before = previous or {}
    return {
        case.id: tuple(resolve_evidence(e, documents.get(e.document), before.get(e.document)) for e in case.evidence)
        for case in cases
    }


def resolve_evidence(evidence: Evidence, document: Document | None, previous: Document | None) -> ResolvedEvidence:
    """Find one piece of evidence in its document."""
    if document is None:
        return _stale(evidence, "the document is not in the knowledge base")
    if evidence.quote is not None:
        return _resolve_quote(evidence, evidence.quote, document)
    if evidence.start is not None and evidence.end is not None:
        return _resolve_span(evidence, (evidence.start, evidence.end), document, previous)
    if evidence.heading is not None:
        return _resolve_heading(evidence, evidence.heading, document, previous)
    return _found(evidence, (0, len(document.text)), "whole document")


def _resolve_quote(evidence: Evidence, quote: str, document: Document) -> ResolvedEvidence:
    spans = occurrences(quote, document.text)
    section = section_of(document, evidence.heading) if evidence.heading else None
    if spans:
        within = [s for s in spans if section and section[0] <= s[0] and s[1] <= section[1]]
        note = f"the quote stands {len(spans)} times; the first is used" if len(within or spans) > 1 else ""
        return _found(evidence, (within or spans)[0], note)
    if section:
        return _moved(evidence, section, "the quote is gone; its section is used")
    return _stale(evidence, "the quote is not in the document")


def _resolve_span(evidence: Evidence, span: Span, document: Document, previous: Document | None) -> ResolvedEvidence:
    wanted = previous.text[span[0] : span[1]] if previous and span[1] <= len(previous.text) else None
    if span[1] <= len(document.text) and wanted in {None, document.text[span[0] : span[1]]}:
        return _found(evidence, span)
    if wanted is not None:
        nearest = sorted(occurrences(wanted, document.text), key=lambda s: abs(s[0] - span[0]))
        if nearest:
            return _moved(evidence, nearest[0], "the same text stands elsewhere in the document")
    section = section_of(document, evidence.heading) if evidence.heading else None
    if section:
        return _moved(evidence, section, "the span's text is gone; its section is used")
    reason = "the span lies beyond the document's end" if wanted is None else "the span's text is gone"
    return _stale(evidence, reason)


def _resolve_heading(
    evidence: Evidence, heading: str, document: Document, previous: Document | None
) -> ResolvedEvidence:
    section = section_of(document, heading)
    if section is None:
        return _stale(evidence, f"no heading {heading!r} in the document")
    before = section_of(previous, heading) if previous else None
    if previous and before and _words(previous.text[slice(*before)]) != _words(document.text[slice(*section)]):
        return _moved(evidence, section, "the section's text changed")
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
    headings = [block for block in document.blocks if block.kind == "heading"]
    for index, block in enumerate(headings):
        if _heading(document, block) == _title(heading):
            ends = (later.start for later in headings[index + 1 :] if later.level <= block.level)
            return block.start, next(ends, len(document.text))
    return None


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
    """Return the gold set's problems, one line each, in file order: evidence that is not in the documents or stands
    there more than once, unknown documents, questions asked twice, answerable cases that expect nothing, no cluster."""
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
    if not case.cluster:
        problems.append("names no cluster")
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
