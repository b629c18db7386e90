"""evals/diagnose.py: the part to blame, for one planted fault each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from goldgate.evals.diagnose import diagnose
from goldgate.evals.gate import decide
from goldgate.pipeline.schema import Diagnosis, Failure, Report, Score
from tests.evals.reports import POLICY, candidate, case, passage, production, report, touch

WRONG = {"correctness": 0.0}
GONE = {"correctness": 0.0, "evidence_recall": 0.0}
ANSWERABLE = [i for i in range(120) if i % 6 != 5][:12]


def parts(**changed: str) -> dict[str, object]:
    return {"parts": production().parts | changed}


def documents(**changed: str) -> dict[str, str]:
    return production().documents | {f"{name}.md": text for name, text in changed.items()}


def told(new: Report, old: Report | None = None) -> Diagnosis:
    verdict = decide(new, old or production(), POLICY, baseline_release="r" * 64)
    assert verdict.diagnosis is not None
    return verdict.diagnosis


def edited(*names: str) -> dict[str, object]:
    changed = {name.replace("-", "_"): "edited" for name in names}
    return {"documents": production().documents | {f"{n.replace('_', '-')}.md": t for n, t in changed.items()}}


FAULTS: dict[str, tuple[str, str, Callable[[], Report]]] = {
    "retrieval setting": (
        "retrieval",
        "evidence in doc-00.md is no longer retrieved",
        lambda: candidate(touch(ANSWERABLE, retrieved="other.md", scores=GONE), **parts(retrieval="b")),
    ),
    "embedder": (
        "retrieval",
        "no longer retrieved",
        lambda: candidate(
            touch(ANSWERABLE, retrieved="other.md", scores=GONE), **parts(embedder="b", knowledge_base="b")
        ),
    ),
    "chunking": (
        "retrieval",
        "no longer retrieved",
        lambda: candidate(touch(ANSWERABLE, retrieved="other.md", scores=GONE), **parts(knowledge_base="b")),
    ),
    "passages among which the evidence drowns": (
        "retrieval",
        "among other passages",
        lambda: candidate(touch(ANSWERABLE, scores=WRONG, retrieved="doc-00.md"), **parts(retrieval="b")),
    ),
    "evidence cut out of documents": (
        "document",
        "the evidence is no longer in doc-00.md",
        lambda: candidate(
            touch(ANSWERABLE, state="stale", scores={"correctness": 0.0, "evidence_recall": None}),
            **parts(knowledge_base="b"),
            **edited("doc-00", "doc-01", "doc-02", "doc-03", "doc-04"),
        ),
    ),
    "documents say something else": (
        "document",
        "doc-00.md changed",
        lambda: candidate(
            touch(ANSWERABLE, scores=WRONG),
            **parts(knowledge_base="b"),
            **edited("doc-00", "doc-01", "doc-02", "doc-03", "doc-04"),
        ),
    ),
    "a new document crowds the others out": (
        "document",
        "poison.md took the place of doc-00.md",
        lambda: candidate(
            touch(ANSWERABLE, retrieved="poison.md", scores=GONE),
            **parts(knowledge_base="b"),
            documents=production().documents | {"poison.md": "new"},
        ),
    ),
    "prompt": ("prompt", "the prompt changed", lambda: candidate(touch(ANSWERABLE, scores=WRONG), **parts(prompt="b"))),
    "model": (
        "generation",
        "the model changed",
        lambda: candidate(touch(ANSWERABLE, scores=WRONG), **parts(model="b")),
    ),
    "prompt and model, less faithful": (
        "generation",
        "less faithful",
        lambda: candidate(touch(ANSWERABLE, scores=WRONG | {"faithfulness": 0.0}), **parts(model="b", prompt="b")),
    ),
    "answer code": (
        "generation",
        "the code of the answer path",
        lambda: candidate(touch(ANSWERABLE, scores=WRONG), **parts(code="b")),
    ),
    "nothing known changed, less faithful": (
        "generation",
        "less faithful",
        lambda: candidate(touch(ANSWERABLE, scores=WRONG | {"faithfulness": 0.0})),
    ),
    "nothing known changed": ("unknown", "no part", lambda: candidate(touch(ANSWERABLE, scores=WRONG))),
    "a leak": ("security", "case-004", lambda: candidate(touch([4], scores={"leaks": 0.0}), **parts(prompt="b"))),
    "a gold case removed": ("gold", "not everything was measured", lambda: report(production().cases[1:])),
    "stale evidence after an edit, answers kept": (
        "document",
        "not everything was measured",
        lambda: candidate(
            touch(ANSWERABLE, state="stale", scores={"evidence_recall": None}),
            **parts(knowledge_base="b"),
            **edited("doc-00"),
        ),
    ),
    "an answer that failed": (
        "unknown",
        "not everything was measured",
        lambda: candidate(touch([0], failure=Failure(kind="timeout", message="late"))),
    ),
    "nothing": ("none", "none of 120 answers changed", production),
    "a harmless edit": (
        "none",
        "3 of 120 answers changed, none worse",
        lambda: candidate(touch(range(3)), **edited("doc-00")),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_part_to_blame(name: str) -> None:
    part, words, plant = FAULTS[name]
    diagnosis = told(plant())
    assert (diagnosis.part, words in " ".join((diagnosis.headline, *diagnosis.evidence))) == (part, True), diagnosis


def test_the_first_line_needs_no_statistics() -> None:
    new = candidate(
        lambda i: (
            {"key": "new", "retrieved": "other.md", "scores": GONE}
            if i in ANSWERABLE[:5]
            else {"key": "new"}
            if i in (20, 21)
            else None
        ),
        **parts(retrieval="b"),
    )
    diagnosis = told(new)
    assert diagnosis.headline.startswith("7 of 120 answers changed, 5 worse, because of retrieval: ")
    assert "retrieval" in diagnosis.do_next


def test_better_is_told_too() -> None:
    old = candidate(lambda i: {"scores": WRONG} if i == 0 else None)
    assert told(candidate(touch([0])), old).headline == "1 of 120 answers changed, none worse, 1 better"


def test_a_gold_case_that_production_meets_better() -> None:
    own = {c.id: c.case_digest for c in production().cases}
    new = candidate(touch(ANSWERABLE, digest="newer", scores=WRONG))
    old = candidate(lambda i: {"digest": "newer"} if i in ANSWERABLE else None)
    verdict = decide(new, old, POLICY, baseline_release="r", baseline_gold=own)
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.part == "gold"


def test_parts_may_be_named_by_the_caller() -> None:
    new = candidate(touch(ANSWERABLE, scores=WRONG))
    verdict = decide(new, production(), POLICY, baseline_release="r")
    assert diagnose(new, production(), verdict, ["prompt"]).part == "prompt"
    assert diagnose(new, production(), verdict, ["model"]).part == "generation"


def test_the_majority_is_named_and_the_rest_counted() -> None:
    def change(i: int) -> dict[str, object] | None:
        if i in ANSWERABLE[:8]:
            return {"key": "new", "retrieved": "other.md", "scores": GONE}
        return {"key": "new", "scores": WRONG} if i in ANSWERABLE[8:] else None

    diagnosis = told(candidate(change, **parts(retrieval="b", prompt="b")))
    assert diagnosis.part == "retrieval"
    assert "4 worse for another reason: the prompt" in diagnosis.evidence
    assert any(line.startswith("evidence lost from retrieval: doc-00.md (3)") for line in diagnosis.evidence)


LEAK = {"leaks": 0.0}
HIT = "text that must never be shown came out, in leaks: case-004"


def with_a_leak(lost: list[int], *, leaking: tuple[int, ...] = (4,), better: int = 0) -> tuple[Report, Report]:
    """A retrieval setting that loses the evidence of `lost`, and answers in which a canary came out."""

    def change(i: int) -> dict[str, object] | None:
        if i in leaking:
            return {"key": "new", "scores": LEAK}
        if i in lost:
            return {"key": "new", "retrieved": "other.md", "scores": GONE}
        return {"key": "new"} if 60 <= i < 60 + better else None

    old = candidate(lambda i: {"scores": WRONG} if 60 <= i < 60 + better else None)
    return candidate(change, **parts(retrieval="b")), old


def test_one_leak_does_not_hide_what_lost_many_cases() -> None:
    lost = [i for i in ANSWERABLE if i != 4]
    diagnosis = told(*with_a_leak(lost))
    alone = told(*with_a_leak(lost, leaking=()))
    assert (diagnosis.part, alone.part) == ("retrieval", "retrieval")
    assert "because of retrieval: evidence in doc-00.md is no longer retrieved" in diagnosis.headline
    assert diagnosis.evidence == (HIT, *alone.evidence)
    assert diagnosis.do_next.startswith("do not release; find out how this text reached the answer; besides, ")
    assert diagnosis.do_next.endswith(alone.do_next)


@pytest.mark.parametrize(
    ("lost", "leaking", "better"),
    [
        ([0], (4,), 0),  # as many leaks as losses
        ([0, 1, 2], (4, 6, 7, 8), 0),  # more leaks than losses
        ([0, 1], (4,), 6),  # without the leak nobody would speak of two losses among eight changes
    ],
)
def test_security_is_named_where_it_explains_the_verdict(
    lost: list[int], leaking: tuple[int, ...], better: int
) -> None:
    diagnosis = told(*with_a_leak(lost, leaking=leaking, better=better))
    assert diagnosis.part == "security"
    assert diagnosis.headline.startswith(HIT)
    assert f"{len(lost)} worse for another reason: retrieval" in diagnosis.evidence
    assert diagnosis.do_next == "do not release; find out how this text reached the answer"


def test_a_leak_alone_is_security_whatever_changed() -> None:
    for part in ("retrieval", "prompt", "model", "knowledge_base"):
        diagnosis = told(candidate(touch([4], scores=LEAK), **parts(**{part: "b"})))
        assert (diagnosis.part, diagnosis.headline) == ("security", HIT)
        assert f"changed: {part}" in diagnosis.evidence


def test_an_application_over_http_is_never_told_to_make_a_release() -> None:
    same, nothing = report(production().cases, system="http"), None
    for old in (same, nothing):
        verdict = decide(same, old, POLICY, baseline_release="r" if old else None)
        assert verdict.diagnosis is not None
        assert "goldgate release" not in verdict.diagnosis.do_next
        assert "goldgate gate --against" in verdict.diagnosis.do_next


def test_passages_are_optional() -> None:
    """A foreign application tells no passages."""

    def blind(one: Report) -> Report:
        cases = [
            c.model_copy(update={"answer": c.answer.model_copy(update={"passages": None}) if c.answer else None})
            for c in one.cases
        ]
        return one.model_copy(update={"cases": tuple(cases)})

    diagnosis = told(blind(candidate(touch(ANSWERABLE, scores=WRONG), **parts(prompt="b"))), blind(production()))
    assert diagnosis.part == "prompt"


def test_no_baseline() -> None:
    verdict = decide(production(), None, POLICY)
    assert verdict.diagnosis is not None
    assert "bootstrap" in verdict.diagnosis.do_next
    assert passage("a").document == "a"
    assert case(0, scores={"leaks": Score(value=0.0)}).scores["leaks"].value == 0.0
