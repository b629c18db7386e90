"""The suite and the report: the same bytes both ways, and never a report when a case was left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from goldgate.evals import evaluate as module
from goldgate.evals import scores
from goldgate.evals.evaluate import evaluate, load_inputs, problems_of, run_suite, summarize
from goldgate.evals.judge import Similarity
from goldgate.pipeline.embedder import Embedder
from goldgate.pipeline.errors import NotComputed, UsageError
from goldgate.pipeline.params import EvaluateParams, Params, PromptParams
from goldgate.pipeline.schema import CaseAnswer, CaseReport, Failure, GoldCase, Report, Score, Timings
from tests.evals.samples import GUIDE, answered, case, document, passage, write_build, write_gold

ROOT = Path(__file__).resolve().parents[2]
DOC = document("gate.md", GUIDE)
CODES = "PASS is 0 and FAIL is 1. INCONCLUSIVE is 3."
MARGIN = "The default margin is 5 points."


def cases() -> list[GoldCase]:
    return [
        case("z-codes", question="Which code is FAIL?", must_say=("1",), answerable=True, slices=("numbers",),
             evidence=({"document": "gate.md", "quote": CODES},), cluster="gate"),
        case("a-margin", question="What is the default margin?", expected_answer="5 points", answerable=True,
             evidence=({"document": "gate.md", "heading": "Margins"},), slices=("numbers", "policy")),
        case("m-unknown", question="Who founded Rome?", answerable=False),
    ]  # fmt: skip


def answers() -> list[CaseAnswer]:
    return [
        answered("z-codes", "FAIL is 1.", passage(DOC, CODES), timings=Timings(total_ms=1.5)),
        answered("a-margin", "The default margin is 3 points.", passage(DOC, MARGIN)),
        answered("m-unknown", "I don't know.", passage(DOC, MARGIN)),
    ]


@dataclass
class Workspace:
    build: Path
    gold: Path
    params: Params
    similarity: Similarity

    def run(self, **options: object) -> Report:
        return run_suite(self.build, self.gold, self.params, similarity=self.similarity, **options)  # type: ignore[arg-type]

    def scores(self, report: Report, name: str) -> dict[str, float | None]:
        return {c.id: c.scores[name].value for c in report.cases if name in c.scores}


@pytest.fixture
def workspace(tmp_path: Path, hashing: Embedder) -> Workspace:
    build = write_build(tmp_path / "build", [DOC], answers())
    gold = write_gold(tmp_path / "golden" / "cases.jsonl", cases())
    return Workspace(build, gold, Params(), Similarity(hashing))


def test_every_case_is_scored_and_the_gate_decides_the_rest(workspace: Workspace) -> None:
    seen: list[tuple[str, int, int]] = []
    report = workspace.run(progress=lambda *step: seen.append(step))
    assert [c.id for c in report.cases] == ["a-margin", "m-unknown", "z-codes"]
    assert workspace.scores(report, "evidence_recall") == {"a-margin": 1, "z-codes": 1}
    assert workspace.scores(report, "correctness") == {"a-margin": 0, "z-codes": 1}
    assert workspace.scores(report, "abstention") == {"a-margin": 1, "m-unknown": 1, "z-codes": 1}
    assert workspace.scores(report, "leaks") == {"a-margin": 1, "m-unknown": 1, "z-codes": 1}
    assert workspace.scores(report, "faithfulness") == {"a-margin": 0, "z-codes": 1}
    assert seen[-1] == ("evaluate", 3, 3)
    assert report.documents == {"gate.md": module.digest_bytes(GUIDE.encode())}
    assert {name: info.judge for name, info in report.metrics.items()}["evidence_recall"] == "spans"
    assert all(info.not_measured == "" for info in report.metrics.values())


def test_nothing_is_printed_and_nothing_left_behind(
    workspace: Workspace, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    workspace.run()
    assert capfd.readouterr() == ("", "")
    assert list(here.iterdir()) == []


def test_system_and_parts_are_read_from_the_build_folder(workspace: Workspace) -> None:
    (workspace.build / "parts.json").write_text('{"system": "http", "declared": "abc"}')
    report = workspace.run()
    assert (report.system, report.parts) == ("http", {"declared": "abc"})
    (workspace.build / "parts.json").write_text('{"system": "htpt"}')
    with pytest.raises(UsageError, match="names system 'htpt'"):
        workspace.run()
    (workspace.build / "parts.json").write_text("[")
    with pytest.raises(UsageError, match=r"parts\.json cannot be read"):
        workspace.run()


def test_reciting_the_system_prompt_is_a_leak_of_the_builtin_system(workspace: Workspace, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.toml"
    prompt.write_text('system = "You are a careful clerk who never tells the combination of the safe."')
    workspace.params = workspace.params.model_copy(update={"prompt": PromptParams(file=str(prompt))})
    recited = answered("a-margin", "I am a careful clerk who never tells the combination of the safe. 5 points.")
    write_build(workspace.build, [DOC], [recited, *answers()[::2]])
    assert workspace.scores(workspace.run(), "leaks")["a-margin"] == 0
    assert workspace.scores(workspace.run(system="http"), "leaks")["a-margin"] == 1


def test_the_report_is_the_same_bytes_on_every_way(workspace: Workspace) -> None:
    workspace.run()
    first = (workspace.build / "report.json").read_bytes()
    shuffled = list(reversed(cases()))
    write_gold(workspace.gold, shuffled)
    workspace.run()
    assert (workspace.build / "report.json").read_bytes() == first
    pure = evaluate(load_inputs(workspace.build, workspace.gold, workspace.params, similarity=workspace.similarity))
    assert module.json_bytes(pure) == first
    assert Report.model_validate_json(first) == pure
    assert "1.5" not in first.decode()  # timings are in timings.json


def test_another_answer_changes_the_report(workspace: Workspace) -> None:
    workspace.run()
    first = (workspace.build / "report.json").read_bytes()
    write_build(workspace.build, [DOC], [answered("a-margin", "The default margin is 5 points."), *answers()[::2]])
    report = workspace.run()
    assert workspace.scores(report, "correctness")["a-margin"] == 1
    assert workspace.scores(report, "evidence_recall")["a-margin"] == 0  # nothing was retrieved for it
    assert (workspace.build / "report.json").read_bytes() != first


def test_metrics_and_plots_for_dvc(workspace: Workspace) -> None:
    report = workspace.run()
    summary = json.loads((workspace.build / "metrics.json").read_text())
    assert summary == summarize(report)
    assert summary["correctness"] == {
        "mean": 0.5, "n": 2, "slices": {"numbers": {"mean": 0.5, "n": 2}, "policy": {"mean": 0.0, "n": 1}},
    }  # fmt: skip
    plot = (workspace.build / "plots" / "correctness.csv").read_text()
    assert plot == "case,cluster,score\na-margin,gate.md,0.0\nz-codes,gate,1.0\n"


# ---------------------------------------------------------------- never green when not measured


@pytest.mark.parametrize("kind", ["empty", "timeout", "http", "rate_limited", "malformed"])
def test_a_failed_answer_never_scores(workspace: Workspace, kind: str) -> None:
    failure = Failure.model_validate({"kind": kind, "message": "it broke"})
    write_build(workspace.build, [DOC], [*answers()[:2], CaseAnswer(case="m-unknown", key="k", failure=failure)])
    report = workspace.run()
    failed = next(c for c in report.cases if c.id == "m-unknown")
    assert set(failed.scores) == {"abstention", "leaks", "faithfulness"}
    assert all(score.value is None and score.failure == failure for score in failed.scores.values())
    assert summarize(report)["abstention"]["n"] == 2


def test_a_metric_that_throws_is_not_measured(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(context: scores.CaseContext) -> Score:
        raise ZeroDivisionError("planted")

    broken = scores.Metric(explode, scores.METRICS["correctness"].applies, "local")
    monkeypatch.setitem(scores.METRICS, "correctness", broken)
    report = workspace.run()
    for measured in (c.scores["correctness"] for c in report.cases if "correctness" in c.scores):
        assert measured.value is None
        assert measured.failure is not None
        assert measured.failure.kind == "crash"
        assert "planted" in measured.reason


def test_a_missing_answer_is_not_computed_and_leaves_no_report(workspace: Workspace) -> None:
    workspace.run()
    write_build(workspace.build, [DOC], answers()[:2])
    with pytest.raises(NotComputed, match=r"1 of 3 gold cases have no answer.*m-unknown"):
        workspace.run()
    assert not (workspace.build / "report.json").exists()
    assert not (workspace.build / "metrics.json").exists()


def test_the_environment_cannot_deselect(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k z-codes")
    assert len(workspace.run().cases) == 3
    assert os.environ["PYTEST_ADDOPTS"] == "-k z-codes"


class Meddler:
    """A plugin that would hide cases from the suite."""

    def __init__(self, how: str) -> None:
        self.how = how

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip, expect to fail, drop or repeat one case."""
        if self.how == "drop":
            del items[0]
        elif self.how == "repeat":
            items.append(items[0])
        else:
            items[0].add_marker(pytest.mark.skip if self.how == "skip" else pytest.mark.xfail)


@pytest.mark.parametrize("how", ["skip", "xfail", "drop", "repeat"])
def test_a_case_left_out_or_run_twice_gives_no_report(
    workspace: Workspace, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pytest.main
    monkeypatch.setattr(
        module.pytest, "main", lambda arguments, plugins: original(arguments, plugins=[*plugins, Meddler(how)])
    )
    with pytest.raises(NotComputed, match="2 of 3 gold cases were measured"):
        workspace.run()
    assert not (workspace.build / "report.json").exists()


def test_assemble_refuses_scores_of_other_cases(workspace: Workspace) -> None:
    inputs = load_inputs(workspace.build, workspace.gold, workspace.params, similarity=workspace.similarity)
    measured = {c.id: {"leaks": Score(value=1.0)} for c in inputs.cases}
    assert module.assemble(inputs, measured).cases
    with pytest.raises(NotComputed, match="2 of 3"):
        module.assemble(inputs, {name: s for name, s in measured.items() if name != "m-unknown"})
    with pytest.raises(NotComputed):
        module.assemble(inputs, measured | {"stranger": {}})


def test_stale_evidence_is_never_scored(workspace: Workspace) -> None:
    write_build(workspace.build, [document("gate.md", GUIDE.replace("INCONCLUSIVE", "UNDECIDED"))], answers())
    report = workspace.run()
    stale = next(c for c in report.cases if c.id == "z-codes")
    assert [piece.state for piece in stale.evidence] == ["stale"]
    assert "evidence_recall" not in stale.scores


def test_a_system_without_contexts_is_not_measured_by_name(workspace: Workspace) -> None:
    quiet = [answered(a.case, a.answer.text, known=False) for a in answers() if a.answer]
    write_build(workspace.build, [DOC], quiet)
    report = workspace.run(system="http")
    for name in ("evidence_recall", "evidence_precision", "contextual_relevance", "faithfulness"):
        assert report.metrics[name].not_measured == scores.NO_PASSAGES
        assert not workspace.scores(report, name)
    assert report.metrics["correctness"].not_measured == ""
    assert workspace.scores(report, "correctness") == {"a-margin": 0, "z-codes": 1}


def test_without_the_embedding_model_its_metrics_are_not_measured(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    report = run_suite(workspace.build, workspace.gold, workspace.params)
    for name in ("contextual_relevance", "answer_relevance", "faithfulness"):
        assert report.metrics[name].not_measured == scores.NO_EMBEDDER
        assert not workspace.scores(report, name)
    assert workspace.scores(report, "evidence_recall") == {"a-margin": 1, "z-codes": 1}


def test_without_documents_evidence_is_not_measured(workspace: Workspace) -> None:
    (workspace.build / "documents.parquet").unlink()
    report = workspace.run(system="http")
    assert report.metrics["evidence_recall"].not_measured == scores.NO_DOCUMENTS
    assert report.metrics["abstention"].not_measured == ""


def test_a_metric_that_no_case_needs_is_not_measured(workspace: Workspace) -> None:
    write_gold(workspace.gold, [case("m-unknown", question="Who founded Rome?", answerable=False)])
    report = workspace.run()
    assert report.metrics["correctness"].not_measured == scores.NO_CASES
    assert report.metrics["abstention"].not_measured == ""


# ---------------------------------------------------------------- bad input


def test_a_misspelt_metric_names_the_nearest(workspace: Workspace) -> None:
    workspace.params = Params(evaluate=EvaluateParams(metrics=("correctnes",)))
    with pytest.raises(UsageError, match="metric correctnes is unknown; did you mean correctness"):
        workspace.run()


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "answers.jsonl:4: not an answer"), ('{"case":"z-codes","key":"k"}', "answers.jsonl:4: not an answer")],
)
def test_a_broken_answer_line_is_named(workspace: Workspace, line: str, message: str) -> None:
    with (workspace.build / "answers.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(UsageError, match=message):
        workspace.run()


def test_a_case_answered_twice_is_named(workspace: Workspace) -> None:
    write_build(workspace.build, [DOC], [*answers(), answers()[0]])
    with pytest.raises(UsageError, match="z-codes is answered twice"):
        workspace.run()


# ---------------------------------------------------------------- what fails an item


def measured(**values: float | None) -> dict[str, Score]:
    return {name: Score(value=v, reason="why") for name, v in values.items()}


@pytest.mark.parametrize(
    ("fields", "values", "problems"),
    [
        ({"answerable": True}, {"correctness": 0.0, "abstention": 0.0}, 0),
        ({"answerable": True}, {"correctness": None}, 1),
        ({"answerable": True}, {"leaks": 0.0}, 1),
        ({"must_say": ["a", "b"], "must_hold": True}, {"correctness": 0.5}, 1),
        ({"must_say": ["a", "b"], "must_hold": True}, {"correctness": 1.0}, 0),
        ({"expected_answer": "a", "must_hold": True}, {"correctness": 0.6}, 0),
        ({"expected_answer": "a", "must_hold": True}, {"correctness": 0.4}, 1),
        ({"answerable": False, "must_hold": True}, {"abstention": 0.0}, 1),
    ],
)
def test_what_fails_an_item(fields: dict[str, object], values: dict[str, float | None], problems: int) -> None:
    assert len(problems_of(case(**fields), measured(**values))) == problems


# ---------------------------------------------------------------- pytest evals/


@pytest.fixture
def by_hand(workspace: Workspace) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pytest evals/` from the repository root, with a hashing judge in place of the real embedding model."""
    plugin = workspace.build.parent / "hashing_judge.py"
    plugin.write_text(
        "from goldgate.evals import evaluate\n"
        "from goldgate.pipeline.params import EmbedParams\n"
        "evaluate.JUDGE_EMBEDDING = EmbedParams(model='hashing')\n"
    )
    params = workspace.build.parent / "params.toml"
    shutil.copy(ROOT / "params.toml", params)

    def run(*arguments: str, autoload: bool = False) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "pytest", "evals/", "-p", "hashing_judge", "-q",
            f"--build={workspace.build}", f"--golden={workspace.gold}", f"--params={params}",
            f"--store={workspace.build.parent / 'store'}", *arguments,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment["PYTHONPATH"] = str(plugin.parent)
        if not autoload:  # quicker: the plugins of a full environment take long to load
            environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            command += ["-p", "pytest_timeout"]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_pytest_evals_writes_the_same_report(
    workspace: Workspace, by_hand: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    workspace.run()
    first = (workspace.build / "report.json").read_bytes()
    (workspace.build / "report.json").unlink()
    done = by_hand(autoload=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workspace.build / "report.json").read_bytes() == first


def test_a_partial_run_writes_no_report_and_is_not_green(
    workspace: Workspace, by_hand: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    workspace.run()
    done = by_hand("-k", "z-codes")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of 3 gold cases were measured" in done.stdout
    assert not (workspace.build / "report.json").exists()


def test_bad_gold_is_one_line_in_pytest(
    workspace: Workspace, by_hand: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    workspace.gold.write_text('{"id": "x", "question": "q"}\n')
    done = by_hand()
    assert done.returncode == 4
    assert "cases.jsonl:1: the record: has no expectation" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_leak_fails_its_item_and_still_gives_a_report(
    workspace: Workspace, by_hand: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    secret = cases()
    secret[2] = secret[2].model_copy(update={"must_not_say": ("I don't know",)})
    write_gold(workspace.gold, secret)
    done = by_hand()
    assert done.returncode == 1
    assert 'leak: says "I don\'t know"' in done.stdout
    report = Report.model_validate_json((workspace.build / "report.json").read_bytes())
    leaked: CaseReport = next(c for c in report.cases if c.id == "m-unknown")
    assert leaked.scores["leaks"].value == 0
