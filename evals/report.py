"""(verdict, report, baseline) -> text, Markdown and HTML for people: the verdict first, then why, then what to do next.

All three are pure: the same input gives the same bytes. Questions, answers and documents are foreign text: HTML is
escaped by jinja2, Markdown is neutralised, and terminal output holds printable characters only.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from goldgate.evals.conditions import NO_BASELINE, name_of
from goldgate.evals.diagnose import security_lines
from goldgate.evals.pairs import compare, lost_documents
from goldgate.pipeline.errors import one_line
from goldgate.pipeline.schema import Answer, CaseReport, Condition, EvidenceChange, Report, Verdict

if TYPE_CHECKING:
    import jinja2

WIDTH = 100
"""Columns of terminal output."""

NO_BASELINE_REASON = "no_baseline"
"""The reason of a verdict that lacks nothing but a production to compare with."""

MAX_CASES = 200
"""Changed cases on the HTML page; a pull request comment shows MAX_COMMENT_CASES."""

MAX_COMMENT_CASES = 20
MAX_COMMENT = 60_000
"""Characters of a comment; GitHub takes 65 536."""

MAX_GROUPS = 60
"""Documents with evidence to review in terminal output and in a comment; the HTML page shows all."""

MAX_TEXT = 4_000
"""Characters of one answer or passage on the HTML page."""

WORDS = {
    "PASS": "may go live",
    "FAIL": "must not go live",
    "INCONCLUSIVE": "not enough evidence",
    "NOT_COMPUTED": "not everything was measured",
    None: "no production to compare with",
}
STATUS = {
    "holds": "holds",
    "broken": "broken",
    "inconclusive": "unclear",
    "not_computed": "not computed",
    "not_measured": "not measured",
}


def render_text(verdict: Verdict, report: Report | None = None, baseline: Report | None = None) -> str:
    """Render for a terminal, at most 100 columns. The reports add nothing today; they may be left out."""
    del report, baseline
    blocks = [
        _headline_text(verdict), _conditions_text(verdict), _cases_text(verdict), _evidence_text(verdict),
        _next_text(verdict),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_markdown(verdict: Verdict, report: Report | None = None, baseline: Report | None = None) -> str:
    """Render for one pull-request comment, details folded, at most 60 000 characters."""
    for limit in (MAX_COMMENT_CASES, 5, 0):
        text = _environment().get_template("report.md.j2").render(_view(verdict, report, baseline, limit))
        if len(text) <= MAX_COMMENT:
            break
    return text


def render_html(verdict: Verdict, report: Report | None = None, baseline: Report | None = None) -> str:
    """Render one page that loads nothing and runs no script."""
    return _environment().get_template("report.html.j2").render(_view(verdict, report, baseline, MAX_CASES))


def pages(verdict: Verdict, report: Report | None = None, baseline: Report | None = None) -> dict[str, bytes]:
    """Return report.html and report.md as UTF-8, by name."""
    texts = {
        "report.html": render_html(verdict, report, baseline),
        "report.md": render_markdown(verdict, report, baseline),
    }
    return {name: text.encode("utf-8", errors="replace") for name, text in texts.items()}


# ---------------------------------------------------------------- terminal


def _headline_text(verdict: Verdict) -> str:
    lines = [f"{verdict.verdict or 'NO BASELINE'}  {WORDS[verdict.verdict]}"]
    if verdict.diagnosis is not None and not verdict.diagnosis.headline.endswith(WORDS[verdict.verdict]):
        lines += _wrapped(verdict.diagnosis.headline)
    for line in security_lines(verdict):
        lines += _wrapped(f"security: {line}")
    if verdict.reason != NO_BASELINE_REASON:
        lines += _wrapped(f"why: {verdict.reason}")
    return "\n".join(lines)


def _conditions_text(verdict: Verdict) -> str:
    if not verdict.conditions:
        return ""
    rows: list[tuple[str, ...]] = [("condition", "status", "cases", "before", "after", "difference (bounds)", "margin")]
    rows += [_condition_row(condition) for condition in verdict.conditions]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = min(widths[0], 32)
    lines = ["  ".join(cell[: widths[i]].ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    lines[1:1] = ["  ".join("-" * width for width in widths)]
    told = {"", "zero tolerance", NO_BASELINE}
    notes = [f"{name_of(c)}: {c.note}" for c in verdict.conditions if c.note not in told]
    return "\n".join([line[:WIDTH] for line in lines] + [part for note in notes for part in _wrapped(note)])


def _condition_row(condition: Condition) -> tuple[str, ...]:
    name = one_line(name_of(condition))
    bounds = ""
    if condition.interval is not None:
        bounds = f"{points(condition.delta)} ({points(condition.interval.lower)} .. {points(condition.interval.upper)})"
    cases = f"{condition.n}" + (f" ({condition.identical} same)" if condition.identical else "")
    return (
        name if condition.tier == "critical" else f"{name} [{condition.tier}]", STATUS[condition.status], cases,
        percent(condition.baseline), percent(condition.candidate), bounds,
        f"{100 * condition.margin:.1f}" if condition.margin is not None else "",
    )  # fmt: skip


def _cases_text(verdict: Verdict) -> str:
    touched = verdict.touched
    lines: list[str] = []
    if touched is not None and touched.total:
        counts = f"{touched.total} answers changed: {touched.better} better, {touched.worse} worse"
        lines.append(f"{counts} ({STATUS[touched.status]})")
        shown = sorted(touched.cases, key=lambda c: (c.candidate >= c.baseline, c.case))
        for change in shown[:10]:
            word = "worse " if change.candidate < change.baseline else "better"
            scores = f"{change.metric} {change.baseline:.2f} -> {change.candidate:.2f}"
            lines += _wrapped(f"{word}  {change.case}  {scores}  {change.question}", lines=2)
        if len(shown) > 10:
            lines.append(f"  and {len(shown) - 10} more, in the report")
    if verdict.reviewed:
        lines += _wrapped(f"judged by people: {_people(verdict)}")
    if verdict.must_hold is not None and verdict.must_hold.lost:
        lines += _wrapped(f"must_hold lost: {', '.join(verdict.must_hold.lost)}")
    for state in ("added", "changed", "removed"):
        names = [name for name, word in verdict.changed_cases.items() if word == state]
        if names:
            lines += _wrapped(f"gold cases {state}: {', '.join(names)}", lines=3)
    if verdict.skipped_documents:
        lines += _wrapped(f"documents skipped: {', '.join(d.id for d in verdict.skipped_documents)}", lines=3)
    return "\n".join(lines)


def _people(verdict: Verdict) -> str:
    return ", ".join(f"{count} answers by {one_line(name)}" for name, count in verdict.reviewed.items())


def _evidence_text(verdict: Verdict) -> str:
    if not verdict.evidence:
        return ""
    groups = review_groups(verdict.evidence)
    lines = _wrapped(f"evidence to review: {evidence_counts(verdict.evidence)}")
    for (state, document, note), cases in groups[:MAX_GROUPS]:
        lines += _wrapped(f"{state}  {document}: {note}: {', '.join(cases)}")
    if len(groups) > MAX_GROUPS:
        lines.append(f"  and {len(groups) - MAX_GROUPS} more, in the report")
    return "\n".join(lines)


def evidence_counts(changes: Sequence[EvidenceChange]) -> str:
    """Say how many pieces of evidence are stale and how many moved."""
    stale = sum(change.state == "stale" for change in changes)
    counts = [f"{stale} stale, not scored"] if stale else []
    moved = len(changes) - stale
    return "; ".join([*counts, *([f"{moved} moved, scored at the new place"] if moved else [])])


def review_groups(changes: Sequence[EvidenceChange]) -> list[tuple[tuple[str, str, str], tuple[str, ...]]]:
    """Group what has one state, document and note, so that a person opens each document once."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        groups.setdefault((change.state, change.document, change.note), []).append(change.case)
    order = sorted(groups, key=lambda key: (key[0] != "stale", *key))
    return [(key, tuple(groups[key])) for key in order]


def _next_text(verdict: Verdict) -> str:
    lines: list[str] = []
    if verdict.diagnosis is not None:
        for line in verdict.diagnosis.evidence:
            lines += _wrapped(f"- {line}")
        if verdict.diagnosis.do_next:
            lines += _wrapped(f"do next: {verdict.diagnosis.do_next}")
    for metric, count in verdict.needed_cases.items():
        lines.append(f"{count} more cases would decide {metric}")
    return "\n".join(lines)


def _wrapped(text: str, lines: int | None = None) -> list[str]:
    return textwrap.wrap(
        one_line(text), WIDTH, subsequent_indent="    ", max_lines=lines, placeholder=" ...",
        break_on_hyphens=False,  # a case id is copied whole
    )  # fmt: skip


# ---------------------------------------------------------------- the view


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval on a line from `-span` to `span`, in per cent of the width."""

    lower: float
    upper: float
    delta: float
    margin: float


@dataclass(frozen=True, slots=True)
class Line:
    """A condition for a template."""

    condition: Condition
    name: str
    status: str
    bar: Bar | None


@dataclass(frozen=True, slots=True)
class ChangedCase:
    """A changed case, before and after."""

    id: str
    question: str
    direction: str
    note: str
    scores: tuple[tuple[str, str, str], ...]
    before: CaseReport | None
    after: CaseReport | None
    lost: tuple[str, ...]


def _view(verdict: Verdict, report: Report | None, baseline: Report | None, limit: int) -> dict[str, object]:
    changed = _changed_cases(verdict, report, baseline)
    span = _span(verdict.conditions)
    return {
        "verdict": verdict,
        "word": verdict.verdict or "NO BASELINE",
        "meaning": WORDS[verdict.verdict],
        "lines": [Line(c, name_of(c), STATUS[c.status], _bar(c, span)) for c in verdict.conditions],
        "span": span,
        "leaks": security_lines(verdict),
        "changed": changed[:limit],
        "more": max(len(changed) - limit, 0),
        "review": review_groups(verdict.evidence),
        "review_counts": evidence_counts(verdict.evidence),
        "max_groups": MAX_GROUPS,
        "status": STATUS,
        "report": report,
        "baseline": baseline,
    }


def _span(conditions: Sequence[Condition]) -> float:
    widest = [abs(v) for c in conditions if c.interval for v in (c.interval.lower, c.interval.upper, c.margin or 0.0)]
    return min(max([*widest, 0.02]) * 1.1, 1.0)


def _bar(condition: Condition, span: float) -> Bar | None:
    if condition.interval is None or condition.delta is None:
        return None

    def place(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / span)), 2)

    interval = condition.interval
    return Bar(place(interval.lower), place(interval.upper), place(condition.delta), place(-(condition.margin or 0.0)))


def _changed_cases(verdict: Verdict, report: Report | None, baseline: Report | None) -> list[ChangedCase]:
    """Cases answered again: worse first, then better, then the others; without reports only what the verdict holds."""
    changes = {c.case: c for c in (verdict.touched.cases if verdict.touched else ())}
    lost = set(verdict.must_hold.lost if verdict.must_hold else ())
    direction = {name: "worse" if c.candidate < c.baseline else "better" for name, c in changes.items()}
    direction |= dict.fromkeys(lost, "worse")
    found: list[ChangedCase] = []
    if report is None or baseline is None:
        for name in direction:
            question = changes[name].question if name in changes else ""
            found.append(ChangedCase(name, question, direction[name], "", (), None, None, ()))
    else:
        for pair in compare(report, baseline, None).pairs:
            if pair.identical and pair.id not in direction:
                continue
            gone, stale = lost_documents(pair)
            note = "must_hold lost" if pair.id in lost else ""
            word = direction.get(pair.id, "as good")
            found.append(
                ChangedCase(
                    pair.id,
                    pair.new.question,
                    word,
                    note,
                    _scores(pair.old, pair.new),
                    pair.old,
                    pair.new,
                    tuple(sorted(gone | stale)),
                )
            )
    order = {"worse": 0, "better": 1, "as good": 2}
    return sorted(found, key=lambda case: (order[case.direction], case.id))


def _scores(old: CaseReport, new: CaseReport) -> tuple[tuple[str, str, str], ...]:
    def shown(case: CaseReport, metric: str) -> str:
        score = case.scores.get(metric)
        if score is None:
            return "-"
        return f"{score.value:.2f}" if score.value is not None else "not measured"

    return tuple((m, shown(old, m), shown(new, m)) for m in sorted({*old.scores, *new.scores}))


# ---------------------------------------------------------------- filters


def percent(value: float | None) -> str:
    """0.123 -> "12.3 %"."""
    return "" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """-0.0123 -> "-1.2"; never "-0.0"."""
    if value is None:
        return ""
    rounded = round(100 * value, 1) + 0.0
    return f"{rounded:+.1f}" if rounded else "0.0"


def neutral(text: object, limit: int = 600) -> str:
    """Foreign text as one line of Markdown that is only text: no HTML, no link, no image, no mention, no table cell."""
    line = one_line(" ".join(str(text).split()))
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    line = html.escape(line, quote=False)
    line = re.sub(r"[\\`*_{}\[\]|~!$]|^[-+=]|^\d+(?=[.)])|(?<=:)//|(?<=www)\.", _entities, line)
    # A zero-width space after these keeps GitHub from notifying people and linking issues.
    return line.replace("@", "@\u200b").replace("#", "#\u200b").replace("&#\u200b", "&#")


def _entities(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" for character in match[0])


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """At most `limit` characters."""
    return text if len(text) <= limit else text[:limit] + " …"


def said(answer: Answer | None) -> str:
    """What was answered."""
    return answer.text if answer is not None else ""


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, points=points, neutral=neutral, shortened=shortened, said=said)
    return environment
