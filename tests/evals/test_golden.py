"""Gold sets: every mistake has its line number, and evidence survives what it should and no more."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldgate.evals.golden import case_digest, gold_digest, lint, load_cases, occurrences, resolve, resolve_evidence
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Evidence, ResolvedEvidence
from tests.evals.samples import GUIDE, case, document

GOOD = '{"id": "c1", "question": "Why?", "answerable": true}'


# ---------------------------------------------------------------- load


def test_load_keeps_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(f"\n{GOOD}\n\n" + GOOD.replace("c1", "c0") + "\n", encoding="utf-8")
    assert [c.id for c in load_cases(path)] == ["c1", "c0"]


def test_a_line_separator_inside_a_string_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"id": "c1", "question": "a\u2028b\u0085c", "answerable": True}, ensure_ascii=False))
    assert load_cases(path)[0].question == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD, "cases.jsonl:2: duplicate id c1; expected another id than line 1's"),
        ('{"id": "c2", "question": "q"}', "cases.jsonl:2: the record: has no expectation"),
        ('{"id": "c2", "question": "q", "expected_anser": "a"}', "is unknown; did you mean expected_answer"),
        ('{"id": "c2", "question": "q", "evidence": [{"document": "d", "qoute": "x"}]}', "did you mean quote"),
        ('{"id": "c2", "answerable": true}', "cases.jsonl:2: the record: needs a question or messages"),
        ('{"id": "c2", "question": "q", "answerable": false, "must_say": ["x"]}', "cannot expect an answer"),
        ('{"id": "c2", "question": "q", "evidence": [{"document": "d", "start": 5}]}', "both start and end"),
        ('{"id": "c2", "question": "q", "evidence": [{"document": "d", "start": 5, "end": 5}]}', "before end"),
        ('{"id": "bad id", "question": "q", "answerable": true}', "cases.jsonl:2: id: String should match"),
        ('{"id": "c2", "id": "c3", "question": "q", "answerable": true}', "cases.jsonl:2: not JSON: id is given twice"),
        ('{"id": "c2", "question": "q", "answerable": NaN}', "cases.jsonl:2: not JSON: NaN is not a number"),
        ('["c2"]', "cases.jsonl:2: the record: Input should be a valid dictionary"),
        ("{'id': 'c2'}", "cases.jsonl:2: not JSON"),
        ("[" * 100_000, "cases.jsonl:2: nested too deeply"),
    ],
)  # fmt: skip
def test_every_mistake_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_cases(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_gold_set_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="has no cases"):
        load_cases(path)


def test_absent_and_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_cases(tmp_path / "cases.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.replace("Why", "Warüm").encode("latin-1"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_cases(tmp_path / "latin.jsonl")


def test_digests_follow_content_and_not_order() -> None:
    one, two = case("c1", answerable=True), case("c2", answerable=True)
    assert gold_digest([one, two]) == gold_digest([two, one])
    assert gold_digest([one]) != gold_digest([one, two])
    assert case_digest(one) != case_digest(one.model_copy(update={"must_hold": True}))
    assert case_digest(one) == case_digest(case("c1", answerable=True, slices=()))  # a default does not count


# ---------------------------------------------------------------- resolve

DOC = document("gate.md", GUIDE)


def found(evidence: Evidence, text: str = GUIDE, before: str | None = None) -> ResolvedEvidence:
    previous = document("gate.md", before) if before is not None else None
    return resolve_evidence(evidence, document("gate.md", text), previous)


def said(evidence: Evidence, text: str = GUIDE, before: str | None = None) -> tuple[str, str]:
    result = found(evidence, text, before)
    return result.state, text[result.start : result.end]


def ev(**fields: object) -> Evidence:
    return Evidence.model_validate({"document": "gate.md", **fields})


def test_quote() -> None:
    assert said(ev(quote="PASS is 0")) == ("resolved", "PASS is 0")
    wrapped = GUIDE.replace("PASS is 0", "PASS\n  is\t0")
    assert said(ev(quote="PASS is 0"), wrapped) == ("resolved", "PASS\n  is\t0")
    assert said(ev(quote="PASS is 00")) == ("stale", "")


def test_quote_that_stands_twice_is_taken_from_its_section() -> None:
    twice = GUIDE + "\nPASS is 0\n"
    assert found(ev(quote="PASS is 0"), twice).start == GUIDE.index("PASS is 0")
    assert "2 times" in found(ev(quote="PASS is 0"), twice).note
    within = found(ev(quote="PASS is 0", heading="Margins"), twice)
    assert within.start == len(GUIDE) + 1
    assert within.note == ""


def test_a_quote_that_is_gone_moves_to_its_section_or_is_stale() -> None:
    changed = GUIDE.replace("PASS is 0 and FAIL is 1.", "PASS returns 0.")
    state, text = said(ev(quote="PASS is 0 and FAIL is 1.", heading="exit  CODES"), changed)
    assert state == "moved"
    assert text.startswith("## Exit codes")
    assert "### Rare codes" in text
    assert "## Margins" not in text
    assert said(ev(quote="PASS is 0 and FAIL is 1."), changed) == ("stale", "")
    assert said(ev(quote="PASS is 0", heading="Nowhere"), changed) == ("stale", "")


def test_heading_sections_end_at_the_same_or_a_higher_level() -> None:
    assert said(ev(heading="### Rare codes"))[1] == "### Rare codes\n\nA bug is 70.\n\n"
    assert said(ev(heading="Margins"))[1].endswith("5 points.\n")
    assert said(ev(heading="gate"))[1] == GUIDE
    assert said(ev(heading="Nope"))[0] == "stale"


def test_a_section_whose_text_changed_moved_only_when_the_old_one_is_known() -> None:
    changed = GUIDE.replace("5 points", "3 points")
    assert said(ev(heading="Margins"), changed)[0] == "resolved"
    assert said(ev(heading="Margins"), changed, GUIDE)[0] == "moved"
    assert said(ev(heading="Margins"), "Intro.\n\n" + GUIDE, GUIDE)[0] == "resolved"


def test_span() -> None:
    start = GUIDE.index("INCONCLUSIVE")
    span = ev(start=start, end=start + 12)
    assert said(span) == ("resolved", "INCONCLUSIVE")
    assert said(span, GUIDE.replace("INCONCLUSIVE", "UNDECIDED"), GUIDE) == ("stale", "")
    with_heading = ev(start=start, end=start + 12, heading="Exit codes")
    assert said(with_heading, GUIDE.replace("INCONCLUSIVE", "UNDECIDED"), GUIDE)[0] == "moved"
    assert said(ev(start=start, end=len(GUIDE) + 1)) == ("stale", "")


@pytest.mark.parametrize("heading", [None, "Exit codes"])
def test_a_span_whose_text_only_shifted_has_not_moved(heading: str | None) -> None:
    start = GUIDE.index("INCONCLUSIVE")
    span = ev(start=start, end=start + 12, **({"heading": heading} if heading else {}))
    shifted = GUIDE.replace("## Exit codes", "News.\n\n## Exit codes")
    assert said(span, shifted, GUIDE) == ("resolved", "INCONCLUSIVE")
    assert found(span, shifted, GUIDE).note == "the same text, 7 characters later"
    assert found(span, GUIDE.replace("# Gate\n", ""), GUIDE).note == "the same text, 7 characters earlier"


def test_the_same_text_under_another_heading_has_moved() -> None:
    start = GUIDE.index("INCONCLUSIVE")
    span = ev(start=start, end=start + 12, heading="Exit codes")
    elsewhere = GUIDE.replace(" INCONCLUSIVE is 3.", "") + "INCONCLUSIVE is 3.\n"
    assert said(span, elsewhere, GUIDE) == ("moved", "INCONCLUSIVE")
    anywhere = ev(start=start, end=start + 12)
    assert said(anywhere, elsewhere, GUIDE) == ("resolved", "INCONCLUSIVE")
    assert said(anywhere, elsewhere + "INCONCLUSIVE", GUIDE)[0] == "moved"  # which of the two is not known


def test_a_span_above_the_first_subsection_is_looked_for_there() -> None:
    start, end = GUIDE.index("## Exit codes"), GUIDE.index("### Rare codes")
    changed = GUIDE.replace("PASS is 0 and", "PASS is 0, or")
    above = ev(start=start, end=end, heading="Exit codes")
    assert said(above, changed, GUIDE) == ("moved", changed[start:end])
    whole = ev(start=start, end=GUIDE.index("## Margins"), heading="Exit codes")
    assert said(whole, changed, GUIDE) == ("moved", changed[start : changed.index("## Margins")])


def test_of_two_headings_of_one_name_the_one_in_the_same_place_is_followed() -> None:
    text = "# A\n\n## Setup\n\nFirst.\n\n## Setup\n\nSecond.\n"
    span = ev(start=text.index("Second"), end=text.index("Second") + 7, heading="Setup")
    assert said(span, text.replace("Second.", "2nd."), text) == ("moved", "## Setup\n\n2nd.\n")
    assert said(span, "# A\n\n## Setup\n\nOnly.\n", text) == ("moved", "## Setup\n\nOnly.\n")


def test_a_span_that_lies_outside_its_section_was_counted_in_another_text() -> None:
    start = GUIDE.index("INCONCLUSIVE")
    span = ev(start=start, end=start + 12, heading="Margins")
    assert said(span) == ("moved", "## Margins\n\nThe default margin is 5 points.\n")
    assert said(span, GUIDE, GUIDE) == ("moved", "## Margins\n\nThe default margin is 5 points.\n")
    assert said(ev(start=start, end=start + 12, heading="Nowhere"))[0] == "stale"


def test_a_span_is_followed_from_where_production_found_it() -> None:
    """Released twice since it was counted: the offsets of the gold set fit neither release any more."""
    start = GUIDE.index("INCONCLUSIVE")
    piece = ev(start=start, end=start + 12)
    gold = case("c1", evidence=[piece])
    live = "A new first line.\n" + GUIDE
    next_one = "Another one.\n" + live
    lies = found(piece, live, GUIDE)
    documents, before = {"gate.md": document("gate.md", next_one)}, {"gate.md": document("gate.md", live)}
    followed = resolve([gold], documents, before, {piece: lies})["c1"][0]
    assert (followed.state, next_one[followed.start : followed.end]) == ("resolved", "INCONCLUSIVE")
    lost = resolve([gold], documents, before)["c1"][0]  # as if it had been counted in the live documents
    assert next_one[lost.start : lost.end] != "INCONCLUSIVE"
    again = resolve([gold], before, before, {piece: lies})["c1"][0]
    assert (again.state, again.start, again.note) == ("resolved", lies.start, "")


def test_evidence_that_production_does_not_know_was_written_for_the_documents_at_hand() -> None:
    grown = "A new first line.\n" + GUIDE
    start = grown.index("INCONCLUSIVE")
    gold = case("c1", evidence=[{"document": "gate.md", "start": start, "end": start + 12}])
    found_there = resolve([gold], {"gate.md": document("gate.md", grown)}, {"gate.md": DOC}, {})["c1"][0]
    assert (found_there.state, found_there.start) == ("resolved", start)


def test_what_was_stale_in_production_comes_back_with_its_heading() -> None:
    piece = ev(start=3, end=9, heading="Margins")
    stale = ResolvedEvidence(document="gate.md", state="stale")
    back = resolve([case("c1", evidence=[piece])], {"gate.md": DOC}, {"gate.md": DOC}, {piece: stale})["c1"][0]
    assert (back.state, back.start) == ("moved", GUIDE.index("## Margins"))


def test_or_document_falls_back_to_the_page_and_says_so() -> None:
    start = GUIDE.index("INCONCLUSIVE")
    rewritten = "# Other\n\nNothing of it is left.\n"
    strict, lenient = (ev(start=start, end=start + 12, heading="Exit codes", or_document=way) for way in (False, True))
    assert said(strict, rewritten, GUIDE) == ("stale", "")
    assert said(lenient, rewritten, GUIDE) == ("moved", rewritten)
    assert "the whole document is used" in found(lenient, rewritten, GUIDE).note
    assert resolve_evidence(lenient, None, DOC).state == "stale"


def test_a_page_that_changed_its_format_keeps_its_evidence() -> None:
    old, new = document("a/gate.ipynb.md", GUIDE), document("a/gate.md", GUIDE)
    start = GUIDE.index("INCONCLUSIVE")
    piece = Evidence(document=old.id, start=start, end=start + 12)
    gold = [case("c1", evidence=[piece])]
    renamed = resolve(gold, {new.id: new}, {old.id: old})["c1"][0]
    assert (renamed.document, renamed.state, renamed.note) == ("a/gate.md", "moved", "stood in a/gate.ipynb.md")
    assert GUIDE[renamed.start : renamed.end] == "INCONCLUSIVE"
    settled = resolve(gold, {new.id: new}, {new.id: new}, {piece: renamed})["c1"][0]
    assert (settled.document, settled.state) == ("a/gate.md", "resolved")
    two = {name: document(name, GUIDE) for name in ("a/gate.md", "a/gate.rst")}
    assert resolve(gold, two, {old.id: old})["c1"][0].state == "stale"
    assert resolve(gold, {"b/gate.md": document("b/gate.md", GUIDE)}, {old.id: old})["c1"][0].state == "stale"


def test_whole_document_and_missing_document() -> None:
    assert said(ev()) == ("resolved", GUIDE)
    assert resolve_evidence(ev(), None, None).state == "stale"
    resolved = resolve([case("c1", evidence=[{"document": "gate.md"}, {"document": "no.md"}])], {"gate.md": DOC})
    assert [piece.state for piece in resolved["c1"]] == ["resolved", "stale"]


def test_offsets_are_code_points() -> None:
    text = "# Ü\n\n𝔊ate says ⛔ no.\n"
    result = found(ev(quote="⛔ no"), text)
    assert text[result.start : result.end] == "⛔ no"


TEXT = st.text(alphabet="ab \n.*(", min_size=1, max_size=60)


@given(before=TEXT, quote=TEXT.filter(str.strip), after=TEXT)
def test_a_quote_that_is_there_always_resolves_to_itself(before: str, quote: str, after: str) -> None:
    state, text = said(ev(quote=quote), before + quote + after)
    assert (state, text) == ("resolved", quote)


@given(text=TEXT.filter(str.strip), quote=TEXT.filter(str.strip))
def test_a_resolved_quote_has_the_words_of_the_quote(text: str, quote: str) -> None:
    result = found(ev(quote=quote), text)
    if result.state == "resolved":
        assert text[result.start : result.end].split() == quote.split()
    else:
        assert quote not in text


@given(prefix=TEXT, start=st.integers(0, 100), length=st.integers(1, 40))
def test_a_span_follows_its_text_when_the_document_grows(prefix: str, start: int, length: int) -> None:
    state, text = said(ev(start=start, end=start + length), prefix + GUIDE, GUIDE)
    assert text == GUIDE[start : start + length]
    assert state in {"resolved", "moved"}


@given(quote=TEXT.filter(str.strip), text=TEXT)
def test_occurrences_do_not_overlap_and_are_in_order(quote: str, text: str) -> None:
    spans = occurrences(quote, text)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


# ---------------------------------------------------------------- lint


def test_lint_is_silent_about_a_good_gold_set() -> None:
    good = [
        case("c1", evidence=[{"document": "gate.md", "quote": "PASS is 0"}]),
        case("c2", answerable=False, cluster="none", must_not_retrieve=["gate.md"]),
    ]
    assert lint(good, {"gate.md": DOC}) == []


def test_lint_names_every_problem() -> None:
    twice = document("twice.md", "# A\n\nSame.\n\n# A\n\nSame.\n")
    cases = [
        case("c1", evidence=[{"document": "gate.md", "quote": "PASS is 9"}], cluster="x"),
        case("c2", evidence=[{"document": "no.md"}], cluster="x"),
        case("c3", evidence=[{"document": "twice.md", "quote": "Same."}], cluster="x"),
        case("c4", evidence=[{"document": "twice.md", "heading": "A"}], cluster="x"),
        case("c5", answerable=True, cluster="x"),
        case("c6", answerable=False),
        case("c7", question="What  is c6?", answerable=False, cluster="x", must_not_retrieve=["no.md"]),
        case("c8", question="What is c6?", answerable=False, cluster="x", principal={"tenant": "acme"}),
    ]
    assert lint(cases, {"gate.md": DOC, "twice.md": twice}) == [
        "c1: evidence in gate.md: the quote is not in the document",
        "c2: evidence in no.md: the document is not in the knowledge base",
        "c3: evidence in twice.md: the quote stands 2 times; the first is used",
        "c4: evidence in twice.md: heading 'A' stands more than once",
        "c5: is answerable, but has neither evidence nor an expected answer",
        "c6: names no cluster, and has no evidence to take it from",
        "c7: must_not_retrieve: no.md is not in the knowledge base",
        "c7: asks the same question as c6",
    ]
