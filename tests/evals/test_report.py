"""evals/report.py: three renderings, none of which a hostile text can break out of."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from goldgate.evals.gate import decide
from goldgate.evals.report import (
    MAX_COMMENT,
    WIDTH,
    neutral,
    pages,
    points,
    render_html,
    render_markdown,
    render_text,
)
from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.schema import EvidenceChange, Failure, Report, Unreadable, Verdict
from goldgate.pipeline.store import write_files
from tests.evals.reports import POLICY, candidate, production, touch
from tests.evals.test_gate import GREEN, RED

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> | [x](https://evil.example) ![y](https://evil.example/y) "
    "@everyone `</details>` \x1b[31mred\n# head"
)


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def hostile() -> tuple[Verdict, Report, Report]:
    old = candidate(lambda i: {"question": HOSTILE} if i == 0 else None)
    wrong = {"text": HOSTILE, "question": HOSTILE, "document": HOSTILE, "scores": {"correctness": 0.0}}
    failed = {"failure": Failure(kind="error", message=HOSTILE)}
    new = candidate(
        lambda i: {"key": "new", **(wrong if i == 0 else failed)} if i < 2 else None,
        unreadable=(Unreadable(id=HOSTILE, reason=HOSTILE),),
    )
    return decide(new, old, POLICY, baseline_release="r" * 64), new, old


def harmful() -> tuple[Verdict, Report, Report]:
    new = candidate(touch(range(12), retrieved="other.md", scores={"correctness": 0.0, "evidence_recall": 0.0}))
    new = new.model_copy(update={"parts": new.parts | {"retrieval": "b"}})
    return decide(new, production(), POLICY, baseline_release="r" * 64), new, production()


def reviewed(*changes: EvidenceChange) -> Verdict:
    return harmful()[0].model_copy(update={"evidence": changes})


def test_evidence_to_review_is_named_by_document_in_all_three() -> None:
    note = "the text under this heading changed"
    moved = [EvidenceChange(case=f"case-{i}", document="a.md", state="moved", note=note) for i in range(3)]
    gone = EvidenceChange(case="case-9", document="b.md", state="stale", note="no longer there")
    verdict = reviewed(gone, *moved)
    text = render_text(verdict)
    assert "evidence to review: 1 stale, not scored; 3 moved, scored at the new place" in text
    assert "stale  b.md: no longer there: case-9" in text
    assert f"moved  a.md: {note}: case-0, case-1, case-2" in text
    html = " ".join(Page(render_html(verdict)).words)
    markdown = render_markdown(verdict)
    assert all(word in html and word in markdown for word in ("case-0", "case-1", "case-2", "case-9", "a.md", note))
    assert "evidence to review" not in render_text(reviewed()).lower()


def test_the_text_of_evidence_to_review_is_only_text() -> None:
    verdict = reviewed(EvidenceChange(case="c", document=HOSTILE, state="stale", note=HOSTILE))
    assert not {"script", "img"} & set(Page(render_html(verdict)).tags)
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(render_markdown(verdict))
    assert not {"script", "img", "a"} & set(Page(html).tags)
    assert "\x1b" not in render_text(verdict)


def test_html_escapes_everything() -> None:
    page = Page(render_html(*hostile()))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert any("<script>alert(1)</script>" in words for words in page.words)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_html_loads_nothing() -> None:
    text = render_html(*harmful())
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_html_says_verdict_why_and_next_in_this_order() -> None:
    verdict, new, old = harmful()
    text = " ".join(Page(render_html(verdict, new, old)).words)
    assert verdict.diagnosis is not None
    order = [
        "FAIL",
        verdict.diagnosis.headline,
        "Do next",
        "Conditions",
        "Touched cases",
        "Evidence lost",
        "What was compared",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "answer 0 new" in text  # after
    assert "text of other.md 0" in text
    assert text.count("Evidence lost") >= 10


def test_html_draws_every_interval() -> None:
    verdict, new, old = harmful()
    text = render_html(verdict, new, old)
    assert Page(text).tags.count("svg") == sum(c.interval is not None for c in verdict.conditions)
    assert 'aria-label="' in text


def test_markdown_is_only_our_structure() -> None:
    text = render_markdown(*hostile())
    assert "<script>" not in text
    assert "evil.example" in text  # told, not linked
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text)
    page = Page(html)
    assert not {"script", "img", "a"} & set(page.tags)
    assert page.tags.count("details") == text.count("<details>")
    assert "@everyone" not in text
    assert page.tags.count("h1") == 0


def test_markdown_table_has_a_row_for_each_condition() -> None:
    verdict, new, old = harmful()
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(render_markdown(verdict, new, old))
    assert Page(html).tags.count("tr") == 1 + len(verdict.conditions)


def test_markdown_fits_one_comment() -> None:
    n = 900
    long = "word " * 2000
    new = candidate(lambda i: {"key": "new", "text": long + str(i), "scores": {"correctness": 0.0}}, n)
    old = candidate(lambda i: {"text": long}, n)
    text = render_markdown(decide(new, old, POLICY, baseline_release="r" * 64), new, old)
    assert len(text) <= MAX_COMMENT
    assert "more, in report.html" in text


@pytest.mark.parametrize("name", [*GREEN, *RED])
def test_text_is_plain_and_narrow(name: str) -> None:
    verdict = GREEN[name]() if name in GREEN else RED[name][2]()
    text = render_text(verdict)
    assert text.startswith(f"{verdict.verdict}  ")
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert verdict.diagnosis is not None
    assert "why: " in text


def test_text_holds_no_control_character() -> None:
    text = render_text(hostile()[0])
    assert all(c.isprintable() or c == "\n" for c in text)


def test_text_names_the_worse_cases_first() -> None:
    lines = render_text(harmful()[0]).splitlines()
    assert lines[0] == "FAIL  must not go live"
    assert "because of retrieval" in lines[1]
    assert any(line.startswith("worse   case-000  correctness 1.00 -> 0.00") for line in lines)
    assert any(line.startswith("do next: ") for line in lines)


def test_without_reports_and_without_baseline() -> None:
    verdict = decide(production(), None, POLICY)
    assert render_text(verdict).startswith("NO BASELINE  ")
    assert "no_baseline" in render_html(verdict, production(), None)
    assert render_markdown(harmful()[0])
    assert render_html(harmful()[0])


def test_a_leak_has_its_own_line_beside_a_headline_about_another_part() -> None:
    def change(i: int) -> dict[str, object] | None:
        lost = {"key": "new", "retrieved": "other.md", "scores": {"correctness": 0.0, "evidence_recall": 0.0}}
        return {"key": "new", "scores": {"leaks": 0.0}} if i == 20 else lost if i < 12 else None

    new = candidate(change)
    new = new.model_copy(update={"parts": new.parts | {"retrieval": "b"}})
    verdict = decide(new, production(), POLICY, baseline_release="r" * 64)
    line = "text that must never be shown came out, in leaks: case-020"
    text, markdown, page = (
        render(verdict, new, production()) for render in (render_text, render_markdown, render_html)
    )
    assert f"\nsecurity: {line}\n" in text
    assert f"\n**Security:** {line}\n" in markdown
    assert markdown.index(line) < markdown.index("<details>")
    assert f'<strong class="broken">Security:</strong> {line}</p>' in page
    assert page.index("because of retrieval") < page.index(line) < page.index("<h2>")
    for render in (render_text, render_markdown, render_html):
        assert "ecurity:" not in render(*harmful())


def test_the_same_input_gives_the_same_bytes() -> None:
    for render in (render_text, render_markdown, render_html):
        assert render(*harmful()) == render(*harmful())


def test_files_are_written(tmp_path: Path) -> None:
    write_files(tmp_path, pages(*harmful()))
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("### FAIL")
    (tmp_path / "a file").touch()
    with pytest.raises(EnvironmentFailure, match=r"report\.html, report\.md in .*a file cannot be written"):
        write_files(tmp_path / "a file", pages(*harmful()))


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (0.0, "0.0"), (-0.0001, "0.0"), (-0.0123, "-1.2"), (0.05, "+5.0")]
)
def test_points(value: float | None, shown: str) -> None:
    assert points(value) == shown


def test_neutral_is_one_line() -> None:
    assert "\n" not in neutral("a\nb\r\nc" + os.linesep)
    assert neutral("x" * 700).endswith("…")
