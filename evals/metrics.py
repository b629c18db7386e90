"""DeepEval test case -> score: goldgate's metrics as DeepEval metrics, without an LLM and without the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Read by DeepEval when it is imported: no telemetry, no .env file of the folder this runs in, no folder left there.
os.environ["DEEPEVAL_TELEMETRY_OPT_OUT"] = "YES"
os.environ["DEEPEVAL_DISABLE_DOTENV"] = "1"
os.environ.setdefault("DEEPEVAL_CACHE_FOLDER", str(Path(tempfile.gettempdir()) / "deepeval"))

from deepeval.metrics import BaseMetric
from deepeval.test_case import LLMTestCase

from goldgate.evals.scores import METRICS as COMPUTED
from goldgate.evals.scores import CaseContext, compute, metric_named
from goldgate.pipeline.schema import Score

CONTEXT = "goldgate"
"""Key of `LLMTestCase.metadata` that holds the CaseContext."""


def build_test_case(context: CaseContext) -> LLMTestCase:
    """Express a gold case and its answer as a DeepEval test case."""
    answer = context.answer
    passages = answer.passages if answer is not None else None
    return LLMTestCase(
        input=context.question,
        actual_output=answer.text if answer is not None else None,
        expected_output=context.case.expected_answer,
        retrieval_context=[passage.text for passage in passages] if passages is not None else None,
        name=context.case.id,
        metadata={CONTEXT: context},
    )


class GoldgateMetric(BaseMetric):  # type: ignore[misc]  # DeepEval publishes no types
    """One metric of `goldgate.evals.scores`. `measured` is None where the metric does not apply to the case.

    `score` is None when nothing was measured: then `error` says why and `success` is False. It is never 0 for that.
    """

    metric_name = ""

    def __init__(self, threshold: float = 1.0) -> None:
        """`threshold` is what DeepEval calls success; the gate does not use it."""
        self.threshold = threshold
        self.measured: Score | None = None
        self.async_mode = False
        self.include_reason = True

    def measure(self, test_case: LLMTestCase, *_: object, **__: object) -> float | None:
        """Judge a test case made by `build_test_case`; returns the score or None."""
        context = (test_case.metadata or {}).get(CONTEXT)
        if not isinstance(context, CaseContext):
            raise TypeError(f"{self.metric_name} needs a test case made by build_test_case")
        self.measured = compute(self.metric_name, context)
        self.score = self.measured.value if self.measured else None
        self.reason = self.measured.reason if self.measured else "does not apply"
        self.error = self.reason if self.measured and self.measured.value is None else None
        self.skipped = self.measured is None
        self.success = self.is_successful()
        return self.score

    async def a_measure(self, test_case: LLMTestCase, *_: object, **__: object) -> float | None:
        """As `measure`."""
        return self.measure(test_case)

    def is_successful(self) -> bool:
        """Whether the score reached the threshold; what does not apply is no failure, what was not measured is one."""
        if self.measured is None:
            return self.skipped
        return self.measured.value is not None and self.measured.value >= self.threshold

    @property
    def __name__(self) -> str:
        """The metric's name, as in params.toml."""
        return self.metric_name


def _class(name: str) -> type[GoldgateMetric]:
    title = "".join(part.capitalize() for part in name.split("_")) + "Metric"
    return type(title, (GoldgateMetric,), {"metric_name": name, "__doc__": f"DeepEval metric `{name}`."})


METRICS: dict[str, type[GoldgateMetric]] = {name: _class(name) for name in COMPUTED}
"""Metric name -> DeepEval metric class."""


def create_metric(name: str) -> GoldgateMetric:
    """Return a fresh metric. Raises UsageError with the nearest known name."""
    metric_named(name)
    return METRICS[name]()


def measure_case(names: tuple[str, ...], context: CaseContext) -> dict[str, Score]:
    """Run the metrics on one case through DeepEval's interface; what does not apply is absent."""
    test_case = build_test_case(context)
    scores = {}
    for name in names:
        metric = create_metric(name)
        metric.measure(test_case)
        if metric.measured is not None:
            scores[name] = metric.measured
    return scores
