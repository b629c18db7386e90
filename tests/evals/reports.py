"""Reports for the gate's tests: small, complete, and each fault planted by one argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from goldgate.pipeline.schema import (
    Answer,
    CaseReport,
    ConditionPolicy,
    Failure,
    MetricInfo,
    Passage,
    Policy,
    Report,
    ResolvedEvidence,
    Score,
)

DIGEST = "d" * 64
METRICS = ("evidence_recall", "abstention", "correctness", "faithfulness", "leaks")

POLICY = Policy(
    conditions=(
        ConditionPolicy(metric="evidence_recall", margin=0.05),
        ConditionPolicy(metric="abstention", margin=0.05),
        ConditionPolicy(metric="correctness", margin=0.05),
        ConditionPolicy(metric="faithfulness", margin=0.05, tier="advisory"),
    )
)


def passage(document: str, start: int = 0, end: int = 100, text: str = "") -> Passage:
    text = text or f"text of {document} {start}"
    return Passage(chunk=f"{document}:{start}", document=document, start=start, end=end, text=text, score=1.0)


def case(
    number: int,
    *,
    key: str = "same",
    text: str = "",
    document: str = "",
    retrieved: str | None = None,
    state: str = "resolved",
    scores: Mapping[str, float | Score | None] | None = None,
    failure: Failure | None = None,
    digest: str = "gold",
    must_hold: bool = False,
    answerable: bool = True,
    cluster: str | None = None,
    slices: tuple[str, ...] = (),
    question: str = "",
) -> CaseReport:
    """A case that scores 1 everywhere, with the scores in `scores` instead; None leaves a metric out."""
    document = document or f"doc-{number // 3:02}.md"
    source = document if retrieved is None else retrieved
    values: dict[str, float | Score | None] = dict.fromkeys(METRICS, 1.0)
    if not answerable:
        values["correctness"] = values["evidence_recall"] = values["faithfulness"] = None
    values |= dict(scores or {})
    made = {n: v if isinstance(v, Score) else Score(value=v) for n, v in values.items() if v is not None}
    evidence = ResolvedEvidence(document=document, start=10, end=60, state=state)  # type: ignore[arg-type]
    said = text or (f"answer {number}" if key == "same" else f"answer {number} {key}")
    return CaseReport(
        id=f"case-{number:03}",
        question=question or f"question {number}?",
        cluster=document if cluster is None else cluster,
        slices=slices,
        must_hold=must_hold,
        answerable=answerable,
        case_digest=f"{digest}-{number}",
        key=f"{key}-{number}",
        answer=None if failure else Answer(text=said, passages=(passage(source),)),
        failure=failure,
        evidence=(evidence,) if answerable else (),
        scores={} if failure else made,
    )


def report(cases: Iterable[CaseReport], **changes: object) -> Report:
    made = tuple(cases)
    base = Report(
        system="builtin",
        parts={"knowledge_base": "a", "retrieval": "a", "prompt": "a", "model": "a", "embedder": "a", "code": "a"},
        gold_digest="gold",
        metrics={n: MetricInfo(name=n, judge="spans", calibrated=True, code_digest="code") for n in METRICS},
        cases=made,
        documents={f"doc-{i:02}.md": "text" for i in range(60)},
    )
    return base.model_copy(update=changes)


def production(n: int = 120) -> Report:
    """Everything right: every sixth case must be refused."""
    return report(case(i, answerable=i % 6 != 5) for i in range(n))


def candidate(change: Callable[[int], dict[str, object] | None], n: int = 120, **changes: object) -> Report:
    """Production's cases, each with the arguments that `change(number)` gives; None leaves it as it is."""
    made = []
    for i in range(n):
        arguments: dict[str, object] = {"answerable": i % 6 != 5} | (change(i) or {})
        made.append(case(i, **arguments))  # type: ignore[arg-type]
    return report(made, **changes)


def touch(numbers: Iterable[int], **arguments: object) -> Callable[[int], dict[str, object] | None]:
    """Change these cases only."""
    chosen = set(numbers)
    return lambda i: {"key": "new", **arguments} if i in chosen else None
