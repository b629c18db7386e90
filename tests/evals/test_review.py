"""People judge the changed answers, blind, and the verdict is decided again with what they say."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from goldgate.cli import main
from goldgate.evals.gate import decide
from goldgate.evals.review import Label, answer_digest, apply_labels, label_lines, load_labels, pending
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Report, Verdict
from tests.evals.reports import POLICY, candidate, case, production, report, touch
from tests.test_workflow import TOWNS, enter, measure, release, write_project

D = "a" * 64


def label(which: Report, case_id: str, right: bool, by: str = "ann", **changes: str) -> Label:
    """What a person says about the answer of a side to a case."""
    found = next(case for case in which.cases if case.id == case_id)
    assert found.answer is not None
    fields = {"case_digest": D, "answer": answer_digest(found.answer.text), "date": "2026-01-02"} | changes
    return Label(case=case_id, right=right, by=by, **fields)


def by_key(*labels: Label) -> dict[tuple[str, str], Label]:
    return {one.key: one for one in labels}


def sealed(which: Report) -> Report:
    """With case digests of the right form."""
    return which.model_copy(update={"cases": tuple(c.model_copy(update={"case_digest": D}) for c in which.cases)})


WORSE = touch((n for n in range(12) if n % 6 != 5), key="new", scores={"correctness": 0.0})
OLD, NEW = sealed(production()), sealed(candidate(WORSE))
CHANGED = [c.id for c, o in zip(NEW.cases, OLD.cases, strict=True) if c.key != o.key and "correctness" in c.scores]


def test_people_overrule_the_judge_on_both_sides() -> None:
    """Ten answers that the judge calls wrong and a person calls right: the change does no harm."""
    assert decide(NEW, OLD, POLICY).verdict == "FAIL"
    labels = by_key(*(label(side, name, right=True) for side in (OLD, NEW) for name in CHANGED))
    new, old, people = apply_labels(NEW, OLD, labels)
    assert people == {"ann": 2 * len(CHANGED)}
    assert decide(new, old, POLICY).verdict == "PASS"


def test_people_who_agree_with_the_judge_change_nothing() -> None:
    labels = by_key(*(label(OLD, n, right=True) for n in CHANGED), *(label(NEW, n, right=False) for n in CHANGED))
    assert decide(*apply_labels(NEW, OLD, labels)[:2], POLICY).verdict == "FAIL"


@pytest.mark.parametrize("side", [OLD, NEW])
def test_one_side_alone_counts_for_nothing(side: Report) -> None:
    assert apply_labels(NEW, OLD, by_key(*(label(side, n, right=True) for n in CHANGED))) == (NEW, OLD, {})


def test_a_choice_of_pairs_counts_for_nothing() -> None:
    """Whoever judges all pairs but one, or stops when the verdict pleases, has chosen the verdict."""
    most = by_key(*(label(side, name, right=True) for side in (OLD, NEW) for name in CHANGED[1:]))
    assert apply_labels(NEW, OLD, most) == (NEW, OLD, {})


def test_refusals_need_no_person() -> None:
    cases = [
        c.model_copy(update={"answer": c.answer.model_copy(update={"abstained": True})}) if c.id in CHANGED[:3] else c
        for c in NEW.cases
        if c.answer is not None
    ]
    refusing = NEW.model_copy(update={"cases": tuple(cases)})
    assert [item.case.id for item in pending(refusing, OLD, {})] == CHANGED[3:]


def test_a_label_is_about_one_answer_to_one_case() -> None:
    other = by_key(*(label(side, n, right=True, case_digest="b" * 64) for side in (OLD, NEW) for n in CHANGED))
    assert apply_labels(NEW, OLD, other) == (NEW, OLD, {})
    texts = by_key(*(label(side, n, right=True, answer="c" * 64) for side in (OLD, NEW) for n in CHANGED))
    assert apply_labels(NEW, OLD, texts) == (NEW, OLD, {})


def test_only_changed_answers_that_the_judge_scores_are_asked_about() -> None:
    assert (
        [item.case.id for item in pending(NEW, OLD, {})] == CHANGED == [f"case-{n:03}" for n in range(12) if n % 6 != 5]
    )
    done = by_key(
        label(OLD, CHANGED[0], right=True), label(NEW, CHANGED[0], right=True), label(NEW, CHANGED[1], right=True)
    )
    assert [item.case.id for item in pending(NEW, OLD, done)] == CHANGED[1:]


def test_the_order_tells_nothing() -> None:
    """The same pair is shown alike whichever side is the candidate, and neither side comes first more often."""
    n = 300
    old = sealed(report(case(i) for i in range(n)))
    new = sealed(report(case(i, key="new") for i in range(n)))
    items = pending(new, old, {})
    assert [item.answers for item in items] == [item.answers for item in pending(old, new, {})]
    first = sum(item.answers[0].endswith("new") for item in items)
    assert 110 < first < 190


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ('"a"', "labels.jsonl:2"),
        ('{"case": "a"}', "case_digest"),
        ('{"case": "a", "right": 1, "extra": 2}', "case_digest"),
        ("[]", "labels.jsonl:2"),
    ],
)
def test_a_line_that_is_no_label_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(label_lines([label(OLD, "case-000", right=True)]) + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"labels\.jsonl:2") as caught:
        load_labels(path)
    assert told in str(caught.value)


def test_the_last_label_counts_and_no_file_is_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    assert load_labels(path) == {}
    first, second = label(OLD, "case-000", right=True), label(OLD, "case-000", right=False, by="bob")
    path.write_text(label_lines([first, second]), encoding="utf-8")
    assert load_labels(path) == {first.key: second}


# ---------------------------------------------------------------- at the terminal


@pytest.fixture
def reworded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A project whose candidate says "the third day" where the gold set wants "day 3", on eight pages."""
    folder = enter(write_project(tmp_path / "project"), monkeypatch)
    measure()
    assert main(["promote", release(capsys, "--bootstrap")]) == 0
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
    for town in TOWNS[:8]:
        path = folder / "knowledge" / f"{town.lower()}.md"
        text = path.read_text(encoding="utf-8")
        for day, word in enumerate(words, start=1):
            text = text.replace(f"held on day {day} of the week", f"held on the {word} day of the week")
        path.write_text(text, encoding="utf-8")
    measure()
    capsys.readouterr()
    return folder


def keys(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_review_decides_again(
    reworded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate"]) in {1, 3}
    capsys.readouterr()
    keys(monkeypatch, "no idea\n12\nb\nboth\nB\n")  # what is no key is asked again; then the input ends
    assert main(["review", "--by", "ann"]) in {1, 3}
    told = capsys.readouterr().err
    assert "1 of 8: On which day is the market of" in told
    assert "must say: day" in told
    assert "3 pairs judged" in told
    assert "5 left: what people say counts when all changed answers are judged" in told
    assert Verdict.model_validate_json((reworded / "build" / "verdict.json").read_bytes()).reviewed == {}
    assert len((reworded / "golden" / "labels.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    keys(monkeypatch, "b\ns\nb\nb\nb\n")
    main(["review", "--by", "bob"])
    keys(monkeypatch, "b\n")
    capsys.readouterr()
    assert main(["review", "--by", "bob", "--json"]) == 0
    found = Verdict.model_validate_json(capsys.readouterr().out)
    assert found.reviewed == {"ann": 6, "bob": 10}
    assert main(["report"]) == 0
    assert "judged by people: 6 answers by ann, 10 answers by bob" in capsys.readouterr().out


def test_a_person_who_finds_harm_is_believed(
    reworded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither answer is right, then production's alone: losses that people confirm stay losses."""
    monkeypatch.setattr("goldgate.reviewing._choice", lambda: "n")
    assert main(["review"]) == 0, "two wrong answers differ by nothing"
    (reworded / "golden" / "labels.jsonl").unlink()
    shown: list[str] = []
    monkeypatch.setattr("goldgate.reviewing._show", lambda _count, item, _case: shown.append(item.answers[0]))
    monkeypatch.setattr("goldgate.reviewing._choice", lambda: "2" if "day of the week" in shown[-1] else "1")
    assert main(["review"]) == 1
    capsys.readouterr()


def test_the_labels_that_judged_are_released(
    reworded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys(monkeypatch, "b\n" * 8)
    assert main(["review"]) == 0
    path = reworded / "golden" / "labels.jsonl"
    kept = path.read_text(encoding="utf-8")
    path.write_text(kept.replace("true", "false"), encoding="utf-8")
    assert main(["release"]) == 5
    assert "labels.jsonl changed after the verdict" in capsys.readouterr().err
    path.write_text(kept, encoding="utf-8")
    digest = release(capsys)
    (folder,) = (reworded / ".goldgate" / "releases").glob(f"{digest[:12]}*")
    assert (folder / "labels.jsonl").read_text(encoding="utf-8") == kept
    assert main(["promote", digest]) == 0


def test_harm_that_people_found_after_the_verdict_is_not_released(
    reworded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The review was broken off before it could decide again, or the labels came by a merge."""
    keys(monkeypatch, "b\n" * 8)
    assert main(["review"]) == 0
    with (reworded / "golden" / "labels.jsonl").open("a", encoding="utf-8") as file:
        file.write(label_lines([label(OLD, "case-000", right=False)]))
    assert main(["release"]) == 5
    assert "labels.jsonl changed after the verdict" in capsys.readouterr().err


def test_a_gold_set_that_was_edited_is_measured_first(
    reworded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is shown to the person must be what the label is filed under."""
    path = reworded / "golden" / "cases.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("day 3", "day 4"), encoding="utf-8")
    keys(monkeypatch, "b\n" * 8)
    assert main(["review"]) == 2
    assert "is not the gold set of this report" in capsys.readouterr().err
    assert not (reworded / "golden" / "labels.jsonl").exists()


@pytest.mark.parametrize("name", ["x" * 101, "a\nb", " ", "\u2028"])
def test_a_name_that_is_none(reworded: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["review", "--by", name]) == 2
    assert "is no name" in capsys.readouterr().err


def test_a_file_that_ends_within_a_line(reworded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reworded / "golden" / "labels.jsonl"
    path.write_text(label_lines([label(OLD, "case-000", right=False)]).rstrip("\n"), encoding="utf-8")
    keys(monkeypatch, "b\n" * 8)
    assert main(["review"]) == 0
    assert len(load_labels(path)) == 17


def test_there_is_nothing_to_review_without_production(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(write_project(tmp_path / "project"), monkeypatch)
    measure()
    assert main(["review"]) == 2
    assert "there is no production to compare with" in capsys.readouterr().err


def test_labels_are_json_lines_for_people() -> None:
    (line,) = label_lines([label(OLD, "case-000", right=True, by="Zoë")]).splitlines()
    assert json.loads(line)["by"] == "Zoë"
    assert "Zoë" in line
