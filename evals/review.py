"""(report, baseline, labels) -> the changed answers that a person should judge, and both reports with their judgement.

A judge that errs widens every interval and can call a harmless change a loss. Where production's and the candidate's
answers differ, a person says of both which is right, without being told which is whose; what they say stands in place
of the correctness judge's score on both sides. An answer that is the same on both sides has the difference zero under
any judge, so only changed answers need a person. A label belongs to the text of an answer under one gold case: it
outlives every run in which that answer comes again, and says nothing about any other.

Labels count only when all changed answers have them. Whoever stops as soon as the verdict pleases, or leaves out what
would not please, would otherwise choose the verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from goldgate.evals.golden import json_lines
from goldgate.pipeline.params import parse_record
from goldgate.pipeline.schema import CaseReport, Record, Report, Score
from goldgate.pipeline.store import digest_bytes

METRIC = "correctness"


class Label(Record):
    """What a person said about one answer; one line of labels.jsonl."""

    case: str = Field(min_length=1, description="Id of the gold case, for people.")
    case_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="The gold case as it was when it was judged.")
    answer: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the answer's text, UTF-8.")
    right: bool
    by: str = Field(min_length=1, max_length=100)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")

    @property
    def key(self) -> tuple[str, str]:
        """What the label is about."""
        return self.case_digest, self.answer


Labels = Mapping[tuple[str, str], Label]
"""(case digest, answer digest) -> the last label given."""


@dataclass(frozen=True, slots=True)
class Item:
    """Two different answers to one question, in an order that tells nothing."""

    case: CaseReport
    answers: tuple[str, str]

    def about(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """What a label for each answer is about."""
        first, second = (answer_digest(text) for text in self.answers)
        return (self.case.case_digest, first), (self.case.case_digest, second)


def answer_digest(text: str) -> str:
    """Return the SHA-256 of an answer's text."""
    return digest_bytes(text.encode())


def load_labels(path: Path) -> dict[tuple[str, str], Label]:
    """Read labels, the last one for an answer counts; none where there is no file.

    Raises UsageError naming the line that is not a label.
    """
    found: dict[tuple[str, str], Label] = {}
    if not path.exists():
        return found
    for number, raw in json_lines(path, "one label per line", "write them with goldgate review"):
        label = parse_record(raw, Label, f"{path}:{number}")
        found[label.key] = label
    return found


def pending(report: Report, baseline: Report, labels: Labels) -> list[Item]:
    """Return the changed answers that lack a label on either side, by case id.

    Only answers that the correctness judge scores on both sides and that refuse on neither: whether a refusal is right
    needs no person. Which answer comes first depends on a digest, so that the order says nothing about whose it is.
    """
    items = [_item(new, old) for new, old in _changed(report, baseline)]
    return [item for item in items if not all(key in labels for key in item.about())]


def apply_labels(report: Report, baseline: Report, labels: Labels) -> tuple[Report, Report, dict[str, int]]:
    """Return both reports with people's scores in place of the judge's, and how many answers each person judged.

    Nothing changes unless every changed pair has both labels: one side judged by a person and the other by the judge
    would compare two instruments, and some pairs judged by a person would be a choice of pairs.
    """
    if pending(report, baseline, labels):
        return report, baseline, {}
    scores: dict[str, tuple[Label, Label]] = {}
    for new, old in _changed(report, baseline):
        found = [labels.get((case.case_digest, answer_digest(_text(case)))) for case in (new, old)]
        if found[0] is not None and found[1] is not None:
            scores[new.id] = found[0], found[1]
    if not scores:
        return report, baseline, {}
    people = Counter(label.by for pair in scores.values() for label in pair)
    judged = [
        side.model_copy(update={"cases": tuple(_scored(case, scores, which) for case in side.cases)})
        for which, side in enumerate((report, baseline))
    ]
    return judged[0], judged[1], dict(sorted(people.items()))


def _scored(case: CaseReport, scores: Mapping[str, tuple[Label, ...]], which: int) -> CaseReport:
    if case.id not in scores:
        return case
    label = scores[case.id][which]
    reason = f"{'right' if label.right else 'wrong'}, says {label.by}"
    score = Score(value=float(label.right), reason=reason)
    return case.model_copy(update={"scores": {**case.scores, METRIC: score}})


def _changed(report: Report, baseline: Report) -> list[tuple[CaseReport, CaseReport]]:
    """Return (candidate's, production's) cases whose answers differ and are scored by the correctness judge."""
    before = {case.id: case for case in baseline.cases}
    pairs = [(new, before[new.id]) for new in sorted(report.cases, key=lambda case: case.id) if new.id in before]
    return [(new, old) for new, old in pairs if new.case_digest == old.case_digest and _judged(new, old)]


def _judged(new: CaseReport, old: CaseReport) -> bool:
    if new.answer is None or old.answer is None or new.answer.text == old.answer.text:
        return False
    if new.answer.abstained or old.answer.abstained:
        return False
    return METRIC in new.scores and METRIC in old.scores


def _text(case: CaseReport) -> str:
    return case.answer.text if case.answer is not None else ""


def _item(new: CaseReport, old: CaseReport) -> Item:
    texts = sorted((_text(new), _text(old)), key=lambda text: answer_digest(new.case_digest + text))
    return Item(new, (texts[0], texts[1]))


def label_lines(labels: Iterable[Label]) -> str:
    """Return labels as JSON lines."""
    return "".join(json.dumps(label.model_dump(mode="json"), ensure_ascii=False) + "\n" for label in labels)
