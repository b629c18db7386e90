"""gold case -> scores: the suite that `goldgate evaluate` and `pytest evals/` run, one item per gold case.

An item fails when something that applies was not measured, on a leak, and when a must_hold case is wrong. Any other
score below 1 is left to the gate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from goldgate.evals.evaluate import Inputs, problems_of
from goldgate.evals.metrics import measure_case
from goldgate.pipeline.schema import GoldCase


def test_gold(gold_case: GoldCase, inputs: Inputs, record_property: Callable[[str, object], None]) -> None:
    """Measure one case by the DeepEval metrics."""
    measured = measure_case(inputs.measurable, inputs.contexts[gold_case.id])
    scores = {name: score.model_dump(mode="json") for name, score in measured.items()}
    record_property("goldgate", {"case": gold_case.id, "scores": scores})
    problems = problems_of(gold_case, measured)
    if problems:
        pytest.fail("; ".join(problems), pytrace=False)
