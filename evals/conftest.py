"""pytest items -> report.json: gathers the scores of test_gold.py and writes the report when every case was run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from goldgate.evals import evaluate
from goldgate.evals.evaluate import Handover, Inputs
from goldgate.evals.promote import production_documents, production_places
from goldgate.pipeline.errors import GoldgateError
from goldgate.pipeline.params import load_params
from goldgate.pipeline.schema import Document, Evidence, ResolvedEvidence, Score
from goldgate.pipeline.store import DEFAULT_STORE, STORE_VARIABLE, Store

PROPERTY = "goldgate"
_HANDOVER = pytest.StashKey[Handover]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where gold set, build folder and parameters are."""
    group = parser.getgroup("goldgate")
    group.addoption("--golden", default="golden/cases.jsonl", help="gold set (default: golden/cases.jsonl)")
    group.addoption("--build", default="build", help="build folder with answers.jsonl (default: build)")
    group.addoption("--params", default="params.toml", help="parameters (default: params.toml)")
    group.addoption("--store", default=None, help="store (default: GOLDGATE_STORE, else .goldgate)")
    group.addoption("--app", default="default", help="application whose production the evidence is followed from")


def pytest_configure(config: pytest.Config) -> None:
    """Take the inputs from `run_suite`, or read what the options name."""
    handover = next((p for p in config.pluginmanager.get_plugins() if isinstance(p, Handover)), None)
    try:
        config.stash[_HANDOVER] = handover or _load(config)
    except GoldgateError as error:
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(Gatherer(config.stash[_HANDOVER], config), "goldgate-gatherer")


def _load(config: pytest.Config) -> Handover:
    build, path = Path(config.getoption("--build")), Path(config.getoption("--params"))
    if not hasattr(config, "workerinput"):  # of pytest-xdist, only the controller writes
        evaluate.discard_report(build)
    params = load_params(path)
    prompt = params.prompt.model_copy(update={"file": str(path.parent / params.prompt.file)})
    previous, places = _production(config.getoption("--store"), config.getoption("--app"))
    inputs = evaluate.load_inputs(
        build,
        Path(config.getoption("--golden")),
        params.model_copy(update={"prompt": prompt}),
        previous=previous,
        places=places,
    )
    return Handover(inputs, build)


def _production(
    store: str | None, application: str
) -> tuple[dict[str, Document] | None, dict[Evidence, ResolvedEvidence] | None]:
    """Return production's documents and where it found the evidence; None without a store: none is made for this."""
    root = Path(store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
    if not root.is_dir():
        return None, None
    opened = Store.open(store)
    return production_documents(opened, application), production_places(opened, application)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item per gold case."""
    if "gold_case" in metafunc.fixturenames:
        cases = metafunc.config.stash[_HANDOVER].inputs.cases
        metafunc.parametrize("gold_case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def inputs(request: pytest.FixtureRequest) -> Inputs:
    """Everything that decides the report."""
    found = request.config.stash[_HANDOVER].inputs
    found.prefetch()
    return found


class Gatherer:
    """Collects each item's scores from its report, which also crosses from pytest-xdist's workers."""

    def __init__(self, handover: Handover, config: pytest.Config) -> None:
        """Start with no scores."""
        self._handover = handover
        self._config = config
        self._measured: dict[str, dict[str, Score]] = {}
        self._twice: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the scores of an item that ran; a skipped one, or one expected to fail, did not run."""
        outcome: Any = report.outcome  # pytest-rerunfailures adds "rerun"
        if report.when != "call" or outcome not in {"passed", "failed"} or hasattr(report, "wasxfail"):
            return
        for name, value in report.user_properties:
            if name == PROPERTY and isinstance(value, dict):
                case = str(value["case"])
                if case in self._measured:
                    self._twice.add(case)
                self._measured[case] = {n: Score.model_validate(s) for n, s in value["scores"].items()}
        if self._handover.progress:
            self._handover.progress("evaluate", len(self._measured), len(self._handover.inputs.cases))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report, or fail the session when a case was left out or run twice."""
        if hasattr(self._config, "workerinput") or self._config.option.collectonly:
            return
        measured = {case: scores for case, scores in self._measured.items() if case not in self._twice}
        try:
            self._handover.report = evaluate.assemble(self._handover.inputs, measured)
            evaluate.write_report(self._handover.build, self._handover.report)
        except GoldgateError as error:
            self._handover.error = error
            if exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED  # never green when not measured

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:  # noqa: ANN401 (pytest's own plugin)
        """Say where the report is, or why there is none."""
        if self._handover.error is not None:
            terminalreporter.write_line(f"no report: {self._handover.error}")
        elif self._handover.report is not None:
            terminalreporter.write_line(f"report: {self._handover.build / evaluate.REPORT}")
