"""evals/gate.py: every green has its planted fault, and nothing that was not measured is ever green."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldgate.evals.gate import bootstrap_problems, decide, feasible, load_policy, report_digest
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import (
    CaseReport,
    ConditionPolicy,
    Failure,
    GoldCase,
    Policy,
    Report,
    Score,
    Unreadable,
    Verdict,
)
from tests.evals.reports import METRICS, POLICY, candidate, case, production, report, touch

ANSWERABLE = [i for i in range(120) if i % 6 != 5]
WRONG = {"correctness": 0.0}
LOST = {"correctness": 0.0, "evidence_recall": 0.0}


def judge(new: Report, old: Report | None = None, policy: Policy = POLICY, **names: object) -> Verdict:
    return decide(new, old or production(), policy, baseline_release="r" * 64, **names)  # type: ignore[arg-type]


def policy(**changes: object) -> Policy:
    return POLICY.model_copy(update=changes)


def without(report_: Report, *ids: str) -> Report:
    return report_.model_copy(update={"cases": tuple(c for c in report_.cases if c.id not in ids)})


def with_info(report_: Report, metric: str, **changes: object) -> Report:
    info = report_.metrics[metric].model_copy(update=changes)
    return report_.model_copy(update={"metrics": {**report_.metrics, metric: info}})


# ---------------------------------------------------------------- the table: each green and its planted fault

GREEN: dict[str, Callable[[], Verdict]] = {
    "nothing changed": lambda: judge(production()),
    "three cases answered again, as good": lambda: judge(candidate(touch([0, 1, 2]))),
    "everything answered again, as good": lambda: judge(candidate(lambda i: {"key": "new"})),
    "a wrong answer became right": lambda: judge(production(), candidate(touch([0], scores=WRONG))),
    "a graded score moved a little": lambda: judge(candidate(touch([0], scores={"correctness": 0.9}))),
    "an advisory metric fell": lambda: judge(candidate(touch(ANSWERABLE, scores={"faithfulness": 0.0}))),
    "a must_hold case answered again": lambda: judge(
        candidate(touch([0], must_hold=True)), candidate(lambda i: {"must_hold": True} if i == 0 else None)
    ),
    "a gold case was added": lambda: judge(production(121)),
    "stale evidence within the limit, still answered": lambda: judge(
        candidate(touch([0, 1], state="stale", scores={"evidence_recall": None}))
    ),
    "an application that tells no contexts, where the policy allows it": lambda: judge(
        with_info(production(), "evidence_recall", not_measured="no contexts"),
        with_info(production(), "evidence_recall", not_measured="no contexts"),
        policy(allow_not_measured=("evidence_recall",)),
    ),
    "a removal that a person reviewed": lambda: judge(
        without(production(), "case-007"), policy=policy(reviewed_removals=("case-007",))
    ),
}

RED: dict[str, tuple[str, str, Callable[[], Verdict]]] = {
    # harm
    "a must_hold case lost": (
        "FAIL",
        "must_hold lost: case-000",
        lambda: judge(
            candidate(touch([0], must_hold=True, scores=WRONG)),
            candidate(lambda i: {"must_hold": True} if i == 0 else None),
        ),
    ),
    "a must_hold refusal lost": (
        "FAIL",
        "must_hold lost: case-005",
        lambda: judge(
            candidate(touch([5], must_hold=True, answerable=False, scores={"abstention": 0.0})),
            candidate(lambda i: {"must_hold": True} if i == 5 else None),
        ),
    ),
    "one leak": (
        "FAIL",
        "leaks: zero tolerance: case-004",
        lambda: judge(candidate(touch([4], scores={"leaks": 0.0}))),
    ),
    "a leak that production has too": (
        "FAIL",
        "leaks",
        lambda: judge(*[candidate(lambda i: {"scores": {"leaks": 0.0}} if i == 4 else None)] * 2),
    ),
    "twenty answers wrong": (
        "FAIL",
        "correctness fell by 20.0 points",
        lambda: judge(candidate(touch(ANSWERABLE[:20], scores=WRONG))),
    ),
    "evidence lost for twelve": (
        "FAIL",
        "evidence_recall fell",
        lambda: judge(candidate(touch(ANSWERABLE[:12], retrieved="other.md", scores={"evidence_recall": 0.0}))),
    ),
    "five touched, all lost, the mean still fine": (
        "FAIL",
        "of 5 touched cases 5 got worse",
        lambda: judge(candidate(touch(range(5), scores=WRONG))),
    ),
    "the floor is shown broken": (
        "FAIL",
        "below the floor",
        lambda: judge(
            *[candidate(lambda i: {"scores": WRONG} if i % 2 == 0 else None)] * 2,
            policy=policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05, floor=0.8),)),
        ),
    ),
    "every refusal lost": (
        "FAIL",
        "abstention",
        lambda: judge(candidate(touch(range(5, 120, 6), answerable=False, scores={"abstention": 0.0}))),
    ),
    "harm in one slice": (
        "FAIL",
        "correctness in hard",
        lambda: judge(
            candidate(lambda i: {"slices": ("hard",), "key": "new", "scores": WRONG} if i in ANSWERABLE[:9] else None),
            candidate(lambda i: {"slices": ("hard",)} if i in ANSWERABLE[:9] else None),
            policy(conditions=(ConditionPolicy(metric="correctness", margin=0.3, slices=("hard",)),)),
        ),
    ),
    "documents edited, evidence gone above the limit, answers lost": (
        "FAIL",
        "touched cases",
        lambda: judge(
            candidate(touch(ANSWERABLE[:10], state="stale", scores={"evidence_recall": None, "correctness": 0.0}))
        ),
    ),
    "harm beside something that was not measured": (
        "FAIL",
        "correctness fell",
        lambda: judge(
            candidate(
                lambda i: (
                    {"key": "new", "failure": Failure(kind="timeout", message="no reply")}
                    if i == 119
                    else {"key": "new", "scores": WRONG}
                    if i in ANSWERABLE[:20]
                    else None
                )
            )
        ),
    ),
    # not measured
    "no cases": ("NOT_COMPUTED", "candidate's report has no cases", lambda: judge(report([]))),
    "no cases of production": (
        "NOT_COMPUTED",
        "production's report has no cases",
        lambda: judge(production(), report([])),
    ),
    "a case twice": (
        "NOT_COMPUTED",
        "case-000 twice",
        lambda: judge(report([case(0), case(0)]), report([case(0)])),
    ),
    "a case dropped": ("NOT_COMPUTED", "case-007", lambda: judge(without(production(), "case-007"))),
    "a case renamed": (
        "NOT_COMPUTED",
        "removed from the gold set without review: case-000",
        lambda: judge(report([case(0).model_copy(update={"id": "other"}), *production().cases[1:]])),
    ),
    "a gold case changed, production not measured again": (
        "NOT_COMPUTED",
        "changed gold case: case-003",
        lambda: judge(candidate(touch([3], digest="newer"))),
    ),
    "an answer failed": (
        "NOT_COMPUTED",
        "case-000: no answer (timeout: no reply)",
        lambda: judge(candidate(touch([0], failure=Failure(kind="timeout", message="no reply")))),
    ),
    "an answer of production failed": (
        "NOT_COMPUTED",
        "case-000: no answer",
        lambda: judge(production(), candidate(touch([0], failure=Failure(kind="http", message="500")))),
    ),
    "a metric crashed on one case": (
        "NOT_COMPUTED",
        "case-000: crashed",
        lambda: judge(
            candidate(
                touch([0], scores={"correctness": Score(reason="crashed", failure=Failure(kind="crash", message="x"))})
            )
        ),
    ),
    "a score left out on one case": (
        "NOT_COMPUTED",
        "case-000: measured on one side only",
        lambda: judge(candidate(touch([0], scores={"correctness": None}))),
    ),
    "a critical metric never computed": (
        "NOT_COMPUTED",
        "correctness: was not computed on the candidate",
        lambda: judge(
            production().model_copy(
                update={"metrics": {n: i for n, i in production().metrics.items() if n != "correctness"}}
            )
        ),
    ),
    "a critical metric unknown to production": (
        "NOT_COMPUTED",
        "score production again",
        lambda: judge(
            production(),
            production().model_copy(
                update={"metrics": {n: i for n, i in production().metrics.items() if n != "correctness"}}
            ),
        ),
    ),
    "leaks never computed": (
        "NOT_COMPUTED",
        "leaks: was not computed",
        lambda: judge(
            production().model_copy(update={"metrics": {n: i for n, i in production().metrics.items() if n != "leaks"}})
        ),
    ),
    "leaks not measured on one case": (
        "NOT_COMPUTED",
        "leaks: case-001: unclear",
        lambda: judge(candidate(touch([1], scores={"leaks": Score(reason="unclear")}))),
    ),
    "leaks left out on one case": (
        "NOT_COMPUTED",
        "leaks: case-001",
        lambda: judge(candidate(touch([1], scores={"leaks": None}))),
    ),
    "other metric code": (
        "NOT_COMPUTED",
        "score production again",
        lambda: judge(with_info(production(), "correctness", code_digest="newer")),
    ),
    "another judge": (
        "NOT_COMPUTED",
        "another judge",
        lambda: judge(with_info(production(), "correctness", judge="llm:x")),
    ),
    "the application no longer tells contexts": (
        "NOT_COMPUTED",
        "evidence_recall: not measured on the candidate",
        lambda: judge(
            with_info(production(), "evidence_recall", not_measured="no contexts"),
            policy=policy(allow_not_measured=("evidence_recall",)),
        ),
    ),
    "an application that tells no contexts": (
        "NOT_COMPUTED",
        "evidence_recall: no contexts",
        lambda: judge(*[with_info(production(), "evidence_recall", not_measured="no contexts")] * 2),
    ),
    "too few cases carry what it needs": (
        "NOT_COMPUTED",
        "100 cases carry what it needs, 101 are required",
        lambda: judge(
            production(), policy=policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05, min_cases=101),))
        ),
    ),
    "a slice without cases": (
        "NOT_COMPUTED",
        "correctness in nowhere: 0 cases",
        lambda: judge(
            production(),
            policy=policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05, slices=("nowhere",)),)),
        ),
    ),
    "stale evidence above the limit, answers kept": (
        "NOT_COMPUTED",
        "10 of 100 pieces of evidence are stale",
        lambda: judge(candidate(touch(ANSWERABLE[:10], state="stale", scores={"evidence_recall": None}))),
    ),
    "a document skipped": (
        "NOT_COMPUTED",
        "1 documents were skipped",
        lambda: judge(production().model_copy(update={"unreadable": (Unreadable(id="a.pdf", reason="corrupt"),)})),
    ),
    "a report of another format": (
        "NOT_COMPUTED",
        "format 2",
        lambda: judge(production().model_copy(update={"format_version": 2})),
    ),
    "production's report of another format": (
        "NOT_COMPUTED",
        "production's report has format 0",
        lambda: judge(production(), production().model_copy(update={"format_version": 0})),
    ),
    "no calibrated metric is left": (
        "NOT_COMPUTED",
        "no critical condition is left",
        lambda: judge(
            *[with_info(production(), "correctness", calibrated=False)] * 2,
            policy=policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05),)),
        ),
    ),
    "a must_hold case that nothing measures": (
        "NOT_COMPUTED",
        "must_hold case-000",
        lambda: judge(
            *[candidate(lambda i: {"must_hold": True, "scores": dict.fromkeys(METRICS)} if i == 0 else None)] * 2
        ),
    ),
    # too little evidence
    "one of two touched got worse": (
        "INCONCLUSIVE",
        "1 of 2 touched cases got worse",
        lambda: judge(
            candidate(lambda i: {"key": "new", "scores": WRONG} if i == 0 else {"key": "new"} if i == 1 else None)
        ),
    ),
    "as many better as worse among few": (
        "INCONCLUSIVE",
        "1 of 2 touched cases got worse, 1 better",
        lambda: judge(
            candidate(lambda i: {"key": "new", "scores": WRONG if i == 0 else {}} if i < 2 else None),
            candidate(lambda i: {"scores": WRONG} if i == 1 else None),
        ),
    ),
    "everything answered again, ten lost, ten won": (
        "INCONCLUSIVE",
        "correctness could be",
        lambda: judge(
            candidate(lambda i: {"key": "new", "scores": WRONG if i in ANSWERABLE[::10] else {}}),
            candidate(lambda i: {"scores": WRONG} if i in ANSWERABLE[1::10] else None),
        ),
    ),
    "a whole document no longer retrieved": (
        "INCONCLUSIVE",
        "",
        lambda: judge(candidate(touch([0, 1, 2], retrieved="other.md", scores={"evidence_recall": 0.0}))),
    ),
    "too few cases for the margin": (
        "INCONCLUSIVE",
        "correctness could be 13.9 points worse",
        lambda: judge(
            report([case(i, key="new", cluster="one") for i in range(20)]),
            report([case(i, cluster="one") for i in range(20)]),
        ),
    ),
    "a floor that is not shown": (
        "INCONCLUSIVE",
        "the floor is not shown",
        lambda: judge(
            *[candidate(lambda i: {"scores": WRONG} if i % 5 == 0 else None)] * 2,
            policy=policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05, floor=0.8),)),
        ),
    ),
    "a supporting metric broken": (
        "INCONCLUSIVE",
        "supporting: faithfulness fell",
        lambda: judge(
            candidate(touch(ANSWERABLE, scores={"faithfulness": 0.0})),
            policy=policy(
                conditions=(
                    *POLICY.conditions[:3],
                    ConditionPolicy(metric="faithfulness", margin=0.05, tier="supporting"),
                )
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", GREEN)
def test_pass(name: str) -> None:
    verdict = GREEN[name]()
    assert (verdict.verdict, verdict.reason) == ("PASS", verdict.reason), verdict.reason


@pytest.mark.parametrize("name", RED)
def test_not_pass(name: str) -> None:
    word, reason, run = RED[name]
    verdict = run()
    assert verdict.verdict == word, verdict.reason
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


# ---------------------------------------------------------------- details


def test_identical_is_known_and_observed_equal_is_not() -> None:
    known = judge(production()).conditions[2]
    seen = judge(candidate(lambda i: {"key": "new"})).conditions[2]
    assert (known.identical, known.interval.lower) == (100, 0.0)
    assert seen.identical == 0
    assert seen.interval.lower == pytest.approx(-(1 - 0.05 ** (1 / 100)))
    assert known.delta == seen.delta == 0.0


def test_an_equal_key_with_another_answer_is_not_identical() -> None:
    """A foreign application's key names only what was asked."""
    verdict = judge(candidate(lambda i: {"key": "same", "text": "other"} if i < 3 else None))
    assert verdict.touched.total == 3


def test_uncalibrated_metric_is_advisory_and_says_so() -> None:
    broken = with_info(
        candidate(touch(ANSWERABLE[:30], scores={"faithfulness": 0.0})), "faithfulness", calibrated=False
    )
    old = with_info(production(), "faithfulness", calibrated=False)
    strict = policy(conditions=(*POLICY.conditions[:3], ConditionPolicy(metric="faithfulness", margin=0.05)))
    verdict = judge(broken, old, strict)
    assert verdict.verdict == "PASS"
    line = verdict.conditions[3]
    assert (line.tier, line.status, "not calibrated" in line.note) == ("advisory", "broken", True)
    assert judge(broken.model_copy(update={"metrics": production().metrics}), policy=strict).verdict == "FAIL"


def test_what_is_not_measured_is_named_in_a_pass() -> None:
    verdict = GREEN["an application that tells no contexts, where the policy allows it"]()
    assert "not measured: evidence_recall" in verdict.reason
    assert verdict.conditions[0].status == "not_measured"


def test_holm_needs_more_from_one_of_many() -> None:
    """5 of 100 lost at p = 0.03 breaks the only critical condition, and is not enough for one of three."""
    lost = candidate(lambda i: {"key": "new", "cluster": str(i), "scores": WRONG if i in ANSWERABLE[::20] else {}})
    alone = policy(conditions=(POLICY.conditions[2],), touched_margin=0.9)
    assert 0.05 / 3 < judge(lost, policy=alone).conditions[0].p_worse < 0.05
    assert judge(lost, policy=alone).verdict == "FAIL"
    assert judge(lost, policy=policy(touched_margin=0.9)).verdict == "INCONCLUSIVE"


def test_evidence_lost_is_told_by_document() -> None:
    verdict = judge(candidate(touch([0, 1, 6], retrieved="other.md", scores={"evidence_recall": 0.0})))
    assert verdict.touched.evidence_lost == {"doc-00.md": 2, "doc-02.md": 1}


def test_a_changed_gold_case_may_lose_but_never_gain() -> None:
    """Production was measured again under the new definition of case-003 and fails it; the candidate meets it."""
    old = candidate(lambda i: {"digest": "newer", "scores": WRONG} if i == 3 else None)
    new = candidate(
        lambda i: {"digest": "newer", "key": "new"} if i == 3 else {"key": "new", "scores": WRONG} if i == 0 else None
    )
    own = {c.id: c.case_digest for c in production().cases}
    verdict = judge(new, old, baseline_gold=own)
    assert verdict.changed_cases == {"case-003": "changed"}
    assert verdict.touched.better == 0
    assert verdict.conditions[2].delta == pytest.approx(-0.01)
    assert judge(new, old).touched.better == 1  # without production's own gold set the revision cannot be seen


def test_document_and_gold_case_changed_together_can_pass() -> None:
    old = candidate(lambda i: {"digest": "newer", "scores": WRONG} if i == 3 else None)
    new = candidate(touch([3], digest="newer"))
    own = {c.id: c.case_digest for c in production().cases}
    verdict = judge(new, old, baseline_gold=own)
    assert (verdict.verdict, verdict.changed_cases) == ("PASS", {"case-003": "changed"})


def test_needed_cases_would_decide() -> None:
    """The promise is kept: with that many more cases at the same rates the condition is decided."""
    share = 10

    def noisy(n: int) -> tuple[Report, Report]:
        new = [case(i, key="new", cluster=str(i), scores=WRONG if i % share == 0 else {}) for i in range(n)]
        old = [case(i, cluster=str(i), scores=WRONG if i % share == 1 else {}) for i in range(n)]
        return report(new), report(old)

    alone = policy(conditions=(POLICY.conditions[2],), touched_margin=0.9)
    first = judge(*noisy(100), alone)
    assert first.verdict == "INCONCLUSIVE"
    more = first.needed_cases["correctness"]
    enough = -(-(100 + more) // share) * share
    assert judge(*noisy(enough), alone).verdict == "PASS"
    assert judge(*noisy(enough - 5 * share), alone).verdict == "INCONCLUSIVE"


def test_no_baseline() -> None:
    verdict = decide(production(), None, POLICY)
    assert (verdict.verdict, verdict.reason, verdict.baseline) == (None, "no_baseline", None)
    assert verdict.conditions[2].candidate == 1.0
    assert bootstrap_problems(production(), POLICY) == []


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        (candidate(touch([4], scores={"leaks": 0.0})), "leaks: zero tolerance: case-004"),
        (
            candidate(touch([4], failure=Failure(kind="empty", message="nothing"))),
            "case-004: no answer (empty: nothing)",
        ),
        (candidate(touch(ANSWERABLE[:10], state="stale", scores={"evidence_recall": None})), "are stale"),
        (with_info(production(), "correctness", not_measured="no judge"), "correctness: no judge"),
        (report([]), "cases"),
    ],
)
def test_bootstrap_problems(new: Report, problem: str) -> None:
    assert problem in "; ".join(bootstrap_problems(new, POLICY))
    if new.cases:
        verdict = decide(new, None, POLICY)
        assert verdict.verdict is None
        assert verdict.reason.startswith("no_baseline: ")
        assert problem in verdict.reason


def test_a_broken_floor_is_a_bootstrap_problem() -> None:
    low = policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05, floor=0.8),))
    half = candidate(lambda i: {"scores": WRONG} if i % 2 == 0 else None)
    assert "below the floor" in bootstrap_problems(half, low)[0]


def test_importing_the_gate_loads_nothing_heavy() -> None:
    heavy = "numpy scipy jinja2 torch ray vllm deepeval pyarrow qdrant_client transformers"
    code = f"import sys, goldgate.evals.gate; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- properties

SCORES = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, 1.0])


@st.composite
def outcomes(draw: st.DrawFn) -> list[tuple[bool, float, float, float, float]]:
    """Per case: answered again, and correctness and recall on both sides."""
    n = draw(st.integers(3, 40))
    one = st.tuples(st.booleans(), SCORES, SCORES, SCORES, SCORES)
    return draw(st.lists(one, min_size=n, max_size=n))


def sides(rows: list[tuple[bool, float, float, float, float]]) -> tuple[Report, Report]:
    new, old = [], []
    for i, (again, correct, before, recall, recall_before) in enumerate(rows):
        was = {"correctness": before, "evidence_recall": recall_before}
        now = {"correctness": correct, "evidence_recall": recall} if again else was
        old.append(case(i, scores=was, must_hold=i % 10 == 0))
        new.append(case(i, key="new" if again else "same", scores=now, must_hold=i % 10 == 0))
    return report(new), report(old)


WIDE = policy(conditions=tuple(c.model_copy(update={"margin": 0.3}) for c in POLICY.conditions), touched_margin=0.4)


@settings(max_examples=150, deadline=None)
@given(outcomes(), st.data())
def test_worse_scores_never_turn_fail_into_pass(
    rows: list[tuple[bool, float, float, float, float]], data: st.DataObject
) -> None:
    before = judge(*sides(rows), WIDE).verdict
    index = data.draw(st.integers(0, len(rows) - 1))
    lower = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
    again, correct, was, recall, recall_was = rows[index]
    correct = correct if again else was
    recall = recall if again else recall_was
    rows[index] = (True, min(correct, lower), was, min(recall, lower), recall_was)
    after = judge(*sides(rows), WIDE).verdict
    assert not (before == "FAIL" and after == "PASS")


@settings(max_examples=80, deadline=None)
@given(outcomes(), st.randoms(use_true_random=False))
def test_the_order_of_cases_changes_nothing(
    rows: list[tuple[bool, float, float, float, float]], random: object
) -> None:
    new, old = sides(rows)
    expected = judge(new, old, WIDE).model_dump_json()

    def shuffled(one: Report) -> Report:
        cases = list(one.cases)
        random.shuffle(cases)  # type: ignore[attr-defined]
        return one.model_copy(update={"cases": tuple(cases)})

    assert judge(shuffled(new), shuffled(old), WIDE).model_dump_json() == expected
    assert judge(new, old, WIDE).model_dump_json() == expected
    assert report_digest(shuffled(new)) == report_digest(new)


@settings(max_examples=80, deadline=None)
@given(outcomes(), st.data())
def test_dropping_a_case_never_helps(rows: list[tuple[bool, float, float, float, float]], data: st.DataObject) -> None:
    new, old = sides(rows)
    dropped = data.draw(st.sampled_from([c.id for c in new.cases]))
    assert judge(without(new, dropped), old, WIDE).verdict in {"FAIL", "NOT_COMPUTED"}


@settings(max_examples=80, deadline=None)
@given(outcomes())
def test_a_leak_is_always_fail(rows: list[tuple[bool, float, float, float, float]]) -> None:
    new, old = sides(rows)
    leak = [
        new.cases[0].model_copy(update={"scores": {**new.cases[0].scores, "leaks": Score(value=0.0)}}),
        *new.cases[1:],
    ]
    assert judge(new.model_copy(update={"cases": tuple(leak)}), old, WIDE).verdict == "FAIL"


@settings(max_examples=60, deadline=None)
@given(outcomes(), st.sampled_from(["correctness", "abstention", "evidence_recall", "leaks"]), st.data())
def test_one_missing_score_is_never_pass(
    rows: list[tuple[bool, float, float, float, float]], metric: str, data: st.DataObject
) -> None:
    new, old = sides(rows)
    index = data.draw(st.integers(0, len(rows) - 1))
    one: CaseReport = new.cases[index]
    scores = {**one.scores, metric: Score(reason="judge down", failure=Failure(kind="unreachable", message="x"))}
    cases = [*new.cases[:index], one.model_copy(update={"scores": scores}), *new.cases[index + 1 :]]
    assert judge(new.model_copy(update={"cases": tuple(cases)}), old, WIDE).verdict in {"FAIL", "NOT_COMPUTED"}


# ---------------------------------------------------------------- policy

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


CONDITION = '[[conditions]]\nmetric = "correctness"\nmargin = 0.05\n'


def test_the_shipped_policy_fits_the_shipped_gold_set() -> None:
    from goldgate.evals.golden import load_cases

    shipped = load_policy(ROOT / "golden" / "gate.toml")
    assert {c.metric for c in shipped.conditions if c.tier == "critical"} == {
        "evidence_recall",
        "abstention",
        "correctness",
    }
    assert shipped.zero_tolerance == ("leaks",)
    feasible(shipped, load_cases(ROOT / "golden" / "cases.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONDITION.replace("correctness", "corectness"), "did you mean correctness?"),
        (CONDITION + "magin = 1\n", "did you mean margin?"),
        (CONDITION.replace("0.05", "0"), "margin"),
        ('zero_tolerance = ["leeks"]\n' + CONDITION, "did you mean leaks?"),
        ('must_hold_metric = "nonsense"\n' + CONDITION, "known: "),
        ("format_version = 2\n" + CONDITION, "format 2"),
        (CONDITION + CONDITION, "two conditions"),
        (CONDITION + 'tier = "advisory"\n', "no critical condition"),
        ("conditions = []", "no critical condition"),
        ("alpha = 0.7\n" + CONDITION, "alpha"),
        ("not toml", "valid TOML"),
    ],
)
def test_a_wrong_policy_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_policy(write(tmp_path / "gate.toml", text))
    assert message in str(caught.value)
    assert "gate.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def gold(n: int, **fields: object) -> list[GoldCase]:
    made = {"question": "q", "expected_answer": "a", "answerable": True, **fields}
    return [GoldCase.model_validate({"id": f"c{i}", **made}) for i in range(n)]


def test_a_policy_that_can_never_be_satisfied_is_refused() -> None:
    fits = policy(conditions=(ConditionPolicy(metric="correctness", margin=0.05),))
    feasible(fits, gold(60))
    with pytest.raises(UsageError, match=r"5\.0 points, which 50 cases can never show .* more than 5\.8 points"):
        feasible(fits, gold(50))
    tight = policy(conditions=(ConditionPolicy(metric="correctness", margin=0.029),))
    with pytest.raises(UsageError, match=r"more than 3\.0 points"):
        feasible(tight, gold(99))
    with pytest.raises(UsageError, match="needs 1 cases, the gold set has 0"):
        feasible(policy(conditions=(ConditionPolicy(metric="evidence_recall", margin=0.9),)), gold(99))
    with pytest.raises(UsageError, match="correctness in slice rare"):
        feasible(policy(conditions=(ConditionPolicy(metric="correctness", margin=0.9, slices=("rare",)),)), gold(99))


def test_advisory_conditions_are_never_refused() -> None:
    advisory = ConditionPolicy(metric="faithfulness", margin=0.001, tier="advisory")
    feasible(policy(conditions=(ConditionPolicy(metric="correctness", margin=0.5), advisory)), gold(20))
